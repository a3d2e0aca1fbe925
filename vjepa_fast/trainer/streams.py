"""The batches of a run: its loaders, where a resumed one goes on in them, and the decoder that `auto` is.

The decoder is the same in all processes of a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vjepa_fast.config.schema import Config
from vjepa_fast.data.decoders.api import AUTO
from vjepa_fast.data.fastest import fastest, usable
from vjepa_fast.data.loader import ClipLoader
from vjepa_fast.files import write_text
from vjepa_fast.trainer.distributed import Distributed


def open_streams(
    cfg: Config, world: Distributed, done: int, saved: dict[str, Any] | None
) -> tuple[list[ClipLoader], dict[str, str], list[str]]:
    """The loaders from step ``done`` on, decoders that were measured for ``versions``, and notes for the user.

    Where ``auto`` has a choice, a new run measures (`fastest`). A run that goes on from the checkpoint ``saved`` keeps
    what it measured, or PyAV if it did not.
    """
    start, samples, loaders = done * cfg.optimization.accumulate, _samples(saved, world.world), list[ClipLoader]()
    measured: dict[str, str] = {}
    notes: list[str] = []
    for img in (False, True)[: 1 if cfg.img_data is None else 2]:
        section = "img_data" if img else "data"
        data = getattr(cfg, section)
        if data.decoder == "auto" and data.datasets:
            name, note = _auto(cfg, world, img, f"{section}.decoder", saved)
            notes += [note] if note else []
            measured |= {f"{section}.decoder": name} if name else {}
            cfg = replace(cfg, **{section: replace(data, decoder=name or "auto")})
        loaders.append(
            ClipLoader(cfg, rank=world.rank, world=world.world, start_step=start, start_sample=samples[img], img=img)
        )
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


def position(step: int, loaders: Sequence[ClipLoader]) -> dict[str, Any]:
    """The entry ``sampler``: the first data step still to be drawn, and the sample at which each stream goes on."""
    return {"start_step": step, "start_samples": [loader.sample_at(step) for loader in loaders]}


def list_bad(folder: Path, loaders: Sequence[ClipLoader], world: Distributed, listed: int) -> int:
    """Write the list of samples that could not be read (the loader logged each) where there are more than ``listed``;
    returns how many there are.
    """
    bad = [sample for loader in loaders for sample in loader.bad.samples]
    if len(bad) != listed:
        name = "bad_samples.jsonl" if world.main else f"bad_samples.{world.rank}.jsonl"
        lines = (json.dumps({"path": str(path), "reason": str(reason)}) for path, reason in bad)
        write_text(folder / name, "".join(line + "\n" for line in lines), parents=False)
    return len(bad)


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
