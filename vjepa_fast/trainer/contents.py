"""What kinds of values a training checkpoint must hold. Digests find damage in a file; this finds a file that was whole
and wrong, or that has no digests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.models.digests import DamagedError

Check = Callable[[Any], bool]


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(t, str) for item in value.items() for t in item)


def _dense(value: Any) -> bool:
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
    return plain and not value.is_meta


def _tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and _dense(v) for k, v in value.items())


def _optimiser(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    state, groups = value.get("state"), value.get("param_groups")
    return (
        isinstance(state, Mapping)
        and all(_count(n) and isinstance(of, Mapping) for n, of in state.items())
        and all(_dense(v) or isinstance(v, (int, float)) for of in state.values() for v in of.values())
        and isinstance(groups, list)
        and all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups)
        and all(_count(n) for g in groups for n in g["params"])
    )


def _sampler(value: Any) -> bool:
    if not isinstance(value, Mapping) or not _count(value.get("start_step")):
        return False
    samples = value.get("start_samples", [0])  # older ones have none
    return isinstance(samples, (list, tuple)) and 1 <= len(samples) <= 2 and all(map(_count, samples))


def _generators(value: Any) -> bool:
    if not isinstance(value, Mapping) or not all(_dense(v) and v.dtype == torch.uint8 for v in value.values()):
        return False
    try:
        torch.Generator().set_state(value["cpu"])
    except (KeyError, RuntimeError, TypeError):
        return False
    return True


def _rows(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    steps, terms, values, monitors = (value.get(k) for k in ("steps", "terms", "values", "monitors"))
    return (
        isinstance(steps, list)
        and all(map(_count, steps))
        and isinstance(terms, list)
        and all(isinstance(t, str) for t in terms)
        and _dense(values)
        and isinstance(values, Tensor)
        and values.is_floating_point()
        and values.ndim == 2
        and len(values) == len(steps)
        and (not steps or values.shape[1] == len(terms) + 2)
        and _tensors(monitors)
        and isinstance(monitors, Mapping)
        and all(v.numel() == 1 for v in monitors.values())
        and _count(value.get("skipped", 0))
        and ("spikes" not in value or _seen(value["spikes"], len(steps)))
    )


def _seen(value: Any, steps: int) -> bool:
    return _dense(value) and value.is_floating_point() and tuple(value.shape) == (steps, 3)


def _spikes(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    losses, *counts = (value.get(k) for k in ("losses", "count", "total"))
    return (
        _dense(losses)
        and isinstance(losses, Tensor)
        and losses.is_floating_point()
        and losses.ndim == 1
        and len(losses) > 0
        and bool(torch.isfinite(losses).all())
        and all(isinstance(n, Tensor) and _dense(n) and n.dtype == torch.int64 and n.ndim == 0 for n in counts)
        and all(int(n) >= 0 for n in counts if isinstance(n, Tensor))
    )


def _config(value: Any) -> bool:
    """The configuration that is compared with the present one, and read for what older checkpoints do not have."""
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        return False
    streams = [value.get("data"), value.get("img_data")]
    return isinstance(streams[0], Mapping) and all(
        s is None or (isinstance(s, Mapping) and _count(s.get("batch_size"))) for s in streams
    )


KINDS: dict[str, tuple[Check, str]] = {
    "encoder": (_tensors, "tensors by name"),
    "predictor": (_tensors, "tensors by name"),
    "target_encoder": (_tensors, "tensors by name"),
    "heads": (_tensors, "tensors by name"),
    "opt": (_optimiser, "an optimiser's state and param_groups"),
    "epoch": (_count, "a count"),
    "step": (_count, "a count"),
    "sampler": (_sampler, "start_step and start_samples, counts"),
    "rng": (_generators, "states of torch's generators"),
    "metrics": (_rows, "steps, terms, values and monitors that fit one another"),
    "config": (_config, "a configuration"),
    "versions": (_texts, "texts by name"),
}
OPTIONAL: dict[str, tuple[Check, str]] = {"spikes": (_spikes, "losses that are finite, and counts")}


def check(data: Mapping[str, Any], path: object) -> None:
    """Look at the kinds of all entries of a checkpoint.

    Raises:
        DamagedError: names the first entry that cannot be used, and what it should hold.
    """
    for name, (fits, what) in {**KINDS, **{k: v for k, v in OPTIONAL.items() if k in data}}.items():
        if not fits(data[name]):
            raise DamagedError(f"{path}: {name}: expected {what}; the file is damaged, take an earlier checkpoint")
