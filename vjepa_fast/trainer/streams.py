"""The streams of data that a run reads, and where a resumed one goes on in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vjepa_fast.config.schema import Config
from vjepa_fast.data.loader import ClipLoader
from vjepa_fast.trainer.distributed import Distributed


def open_streams(cfg: Config, world: Distributed, done: int, saved: Mapping[str, Any] | None) -> list[ClipLoader]:
    """The loaders of ``data`` and, where there is one, ``img_data``, behind ``done`` steps of the run ``saved``.

    Raises:
        UserError: of `ClipLoader`.
    """
    kinds, samples = (False, True) if cfg.img_data is not None else (False,), _samples(saved, world.world)
    start = done * cfg.optimization.accumulate
    return [
        ClipLoader(cfg, rank=world.rank, world=world.world, start_step=start, start_sample=samples[img], img=img)
        for img in kinds
    ]


def position(step: int, loaders: Sequence[ClipLoader]) -> dict[str, Any]:
    """The entry ``sampler``: the first data step still to be drawn, and the sample at which each stream goes on."""
    return {"start_step": step, "start_samples": [loader.sample_at(step) for loader in loaders]}


def _samples(saved: Mapping[str, Any] | None, world: int) -> tuple[int | None, int | None]:
    """At which sample data and images go on, of all processes; None for a run from the start.

    A checkpoint of before these were saved says how large its batches were; of its processes this takes ``world``.
    """
    if saved is None:
        return None, None
    found = saved["sampler"].get("start_samples")
    if found is None:
        sections = (saved["config"].get(name) for name in ("data", "img_data"))
        found = [saved["sampler"]["start_step"] * world * s["batch_size"] for s in sections if s is not None]
    data, images = (*found, None)[:2]
    return data, images
