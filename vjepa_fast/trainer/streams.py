"""The batches of a run: its loaders, where a resumed one goes on in them, and the decoder that `auto` is.

The decoder is the same in all processes of a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vjepa_fast.config.schema import Config
from vjepa_fast.data.decoders.api import AUTO
from vjepa_fast.data.fastest import fastest, usable
from vjepa_fast.data.loader import ClipLoader, Share
from vjepa_fast.errors import ConfigError
from vjepa_fast.trainer.distributed import Distributed


def open_streams(
    cfg: Config, world: Distributed, done: int, saved: dict[str, Any] | None
) -> tuple[list[ClipLoader], dict[str, str], list[str]]:
    """The loaders from step ``done`` on, decoders that were measured for ``versions``, and notes for the user.

    Where ``auto`` has a choice, a new run measures (`fastest`). A run that goes on from the checkpoint ``saved`` keeps
    what it measured, or PyAV if it did not.
    """
    samples, loaders = _samples(saved, world.world), list[ClipLoader]()
    measured: dict[str, str] = {}
    notes: list[str] = []
    for img, share in enumerate(shares(cfg, world.rank, world.world)):
        img = bool(img)
        section = "img_data" if img else "data"
        data = getattr(cfg, section)
        if data.decoder == "auto" and data.datasets:
            name, note = _auto(cfg, world, img, f"{section}.decoder", saved)
            notes += [note] if note else []
            measured |= {f"{section}.decoder": name} if name else {}
            cfg = replace(cfg, **{section: replace(data, decoder=name or "auto")})
        start = done * len(share.own)
        loaders.append(ClipLoader(cfg, start_step=start, start_sample=samples[img], img=img, share=share))
    return loaders, measured, notes


def _auto(cfg: Config, world: Distributed, img: bool, key: str, saved: dict[str, Any] | None) -> tuple[str, str]:
    """(decoder, note); empty texts where there is nothing to choose."""
    if saved is not None:
        before = saved["versions"].get(key, "")
        if not before or before in usable():
            return before, ""
        return "", f"{key}: auto was {before}, which cannot be used here; it is pyav from now on"
    if len(usable()) < 2 or AUTO not in usable():  # the others are compared with PyAV
        return "", ""
    found = fastest(cfg, rank=world.rank, world=world.world, img=img)
    found = world.gather(found)[0]  # the first process decides for all
    return found.name, found.note(key.split(".")[0]) if found.clips_per_s else ""


def shares(cfg: Config, rank: int, world: int) -> list[Share]:
    """Which batches of an optimiser step one of ``world`` processes reads, of ``data`` and, where it is given, of
    ``img_data``.

    A step has ``world x optimization.accumulate`` batches, numbered with the processes side by side and their
    micro-batches one after another; so a step is the same, sample by sample, for every split of the same number. With
    ``img_data.rank_ratio`` the last int(ratio x number) of them are images and the others videos, as the published code
    splits its processes; without, each number is a batch of both.

    Raises:
        ConfigError: that share is none or all of them.
    """
    times = cfg.optimization.accumulate
    together, mine = world * times, [part * world + rank for part in range(times)]
    if cfg.img_data is None or cfg.img_data.rank_ratio is None:
        return [Share(tuple(mine), together)] * (1 if cfg.img_data is None else 2)
    images = int(together * cfg.img_data.rank_ratio)
    if not images:
        least = math.ceil(math.ceil(1 / cfg.img_data.rank_ratio) / world)
        raise ConfigError(
            f"img_data.rank_ratio: {cfg.img_data.rank_ratio:g} of {together} batches per step (processes x "
            f"optimization.accumulate) is no batch of images; set optimization.accumulate={least} or more"
        )
    videos = together - images
    return [
        Share(tuple(n for n in mine if n < videos), videos),
        Share(tuple(n - videos for n in mine if n >= videos), images),
    ]


def position(cfg: Config, step: int, loaders: Sequence[ClipLoader]) -> dict[str, Any]:
    """The entry ``sampler``: the first data step still to be drawn, and the sample at which each stream goes on."""
    start = step * cfg.optimization.accumulate
    return {"start_step": start, "start_samples": [loader.sample_at(step) for loader in loaders]}


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
