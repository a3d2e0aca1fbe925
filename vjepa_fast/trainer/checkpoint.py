"""Checkpoints: everything that training needs, under the FAIR names, written atomically.

``<folder>/checkpoints/step-00000100.pt`` is a ``torch.save`` dict that loads with ``weights_only=True``::

    encoder, predictor, target_encoder   tensors under module.backbone.*, as the published evaluation reads them
    heads                                learnable parts of the objectives
    opt, scaler                          optimiser state; scale of the loss under float16
    epoch, step                          epochs and optimiser steps completed
    sampler                              first data step still to be drawn (masks are functions of it), and the sample
                                         of each stream that it begins at, whatever the batches before held
    rng                                  torch generators
    metrics                              values of steps that are not yet in metrics.jsonl
    spikes                               under optimization.spike_std the losses that the next is compared with
    config, versions                     plain dicts
    digests                              of all of the above (`models.digests`); absent from those of before 0.2
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch

from vjepa_fast.errors import CheckpointError, TrainingError
from vjepa_fast.files import atomic_file, first_line
from vjepa_fast.models import digests, limits
from vjepa_fast.models.digests import DamagedError
from vjepa_fast.trainer import contents

FOLDER = "checkpoints"
FREE = "free space or choose another folder with --set folder=DIR"
KEYS = (
    "encoder", "predictor", "target_encoder", "heads", "opt", "epoch", "step", "sampler", "rng", "metrics", "config",
    "versions"
)  # fmt: skip
WEIGHTS = ("encoder", "predictor", "target_encoder", "heads")


def path_of(folder: str | Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is in a run folder."""
    return Path(folder) / FOLDER / f"step-{step:08d}.pt"


def step_of(path: Path) -> int | None:
    """The step in a checkpoint's name, None for any other file."""
    number = path.name.removeprefix("step-").removesuffix(".pt")
    return int(number) if path.name == f"step-{number}.pt" and number.isdigit() else None


def all_in(folder: str | Path) -> list[Path]:
    """Finished checkpoints of a run folder, oldest first."""
    found = [(step_of(p), p) for p in (Path(folder) / FOLDER).glob("step-*.pt")]
    return [p for _, p in sorted((s, p) for s, p in found if s is not None)]


def latest(folder: str | Path) -> Path | None:
    """The newest checkpoint of a run folder, None if there is none."""
    found = all_in(folder)
    return found[-1] if found else None


class _Watched:
    """An open file that calls ``look`` before each write."""

    def __init__(self, file: IO[bytes], look: Callable[[], None]):
        self.file, self.look, self.flush = file, look, file.flush

    def write(self, data: bytes) -> int:
        self.look()
        return self.file.write(data)


def save(folder: str | Path, state: Mapping[str, Any], keep: int = 2, look: Callable[[], None] = lambda: None) -> Path:
    """Write ``state`` (all of `KEYS`) with its digests as the checkpoint of its step, then remove all but the newest
    ``keep``. The run folder must be there, ``checkpoints/`` is made.

    ``look`` is called again and again; where it raises, the save is given up and nothing is left of it.

    Raises:
        TrainingError: a weight or a moment of the optimiser is not finite; nothing is written.
        UserError: not writable or disk full; the earlier checkpoints stand.
    """
    missing = [k for k in KEYS if k not in state]
    assert not missing, f"incomplete checkpoint: {missing}"
    if bad := not_finite(state):
        raise TrainingError(
            f"step {state['step']}: {bad} is not finite; this step is not saved, the checkpoint before stands; "
            "lower optimization.lr or set optimization.clip_grad, and start again"
        )
    path = path_of(folder, state["step"])
    with atomic_file(path, "wb", FREE, parents=False) as f:
        torch.save({**state, digests.ENTRY: digests.digests_of(state, look)}, cast("IO[bytes]", _Watched(f, look)))
    look()
    for old in all_in(folder)[: -max(1, keep)]:
        old.unlink(missing_ok=True)
    return path


def remove_unfinished(folder: str | Path) -> None:
    """Remove what a killed process left half-written."""
    for path in (Path(folder) / FOLDER).glob(".step-*.tmp"):
        path.unlink(missing_ok=True)


def load(path: str | Path) -> dict[str, Any]:
    """Read a training checkpoint (or the newest of a run folder) onto the CPU, and hold it against its digests.

    Raises:
        CheckpointError: missing, or not a training checkpoint of this package; `DamagedError`, of this class, where it
            is not what was written, or holds what cannot be trained on.
    """
    path = Path(path)
    if path.is_dir():
        newest = latest(path)
        if newest is None:
            raise CheckpointError(f"{path}: holds no {FOLDER}/step-*.pt to resume from")
        path = newest
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    data = _read(path)
    missing = [k for k in KEYS if k not in data] if isinstance(data, dict) else list(KEYS)
    if missing:
        raise DamagedError(f"{path}: not a training checkpoint of vjepa-fast, {', '.join(missing)} missing")
    digests.verify(data, path)
    contents.check(data, path)
    if bad := not_finite(data):
        raise DamagedError(f"{path}: {bad} is not finite; take an earlier checkpoint")
    return data


def _read(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"
        if zipped:
            limits.check_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        limits.check_content(content, path)
        return content
    except DamagedError:
        raise
    except MemoryError:
        raise CheckpointError(f"{path}: takes more memory than there is") from None
    except PermissionError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # zip, pickle and torch each have their own
        raise DamagedError(
            f"{path}: cannot be read, damaged or not a checkpoint ({first_line(error)}); "
            "delete it to resume from the one before"
        ) from error


def not_finite(state: Mapping[str, Any]) -> str:
    """The first weight or moment of the optimiser with a value that is not finite, by its place; empty if none."""
    named = {f"{part}/{name}": t for part in WEIGHTS for name, t in state[part].items()}
    for n, moments in state["opt"].get("state", {}).items():
        named.update((f"opt/state/{n}/{name}", t) for name, t in moments.items() if isinstance(t, torch.Tensor))
    named = {name: t for name, t in named.items() if t.is_floating_point() and t.numel()}
    if not named:
        return ""
    flags = torch.stack([torch.isfinite(t).all().reshape(()) for t in named.values()])  # one wait for the device
    return next((name for name, fine in zip(named, flags.tolist()) if not fine), "")


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """States of torch's generators: ``cpu``, and ``cuda`` of a CUDA device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `rng_state` returned. DamagedError where the generator of the device does not take it."""
    try:
        torch.set_rng_state(state["cpu"])
        if device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], device)
    except (RuntimeError, TypeError) as error:
        raise DamagedError(f"checkpoint: rng: not a state of torch's generator ({first_line(error)})") from error
