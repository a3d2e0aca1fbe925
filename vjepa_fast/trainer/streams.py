"""The batches of a run: its loaders, and the decoder that ``data.decoder: auto`` is, the same in all its processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vjepa_fast.config.schema import Config
from vjepa_fast.data.fastest import fastest, usable
from vjepa_fast.data.loader import ClipLoader
from vjepa_fast.trainer.distributed import Distributed


def open_streams(
    cfg: Config, world: Distributed, done: int, saved: dict[str, Any] | None
) -> tuple[list[ClipLoader], dict[str, str], list[str]]:
    """The loaders from step ``done`` on, decoders that were measured for ``versions``, and notes for the user.

    Where ``auto`` has a choice, a new run measures (`fastest`). A run that goes on from the checkpoint ``saved`` keeps
    what it measured, or PyAV if it did not.
    """
    start, loaders = done * cfg.optimization.accumulate, []
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
        loaders.append(ClipLoader(cfg, rank=world.rank, world=world.world, start_step=start, img=img))
    return loaders, measured, notes


def _auto(cfg: Config, world: Distributed, img: bool, key: str, saved: dict[str, Any] | None) -> tuple[str, str]:
    """(decoder, note); empty texts where there is nothing to choose."""
    if saved is not None:
        before = saved["versions"].get(key, "")
        if not before or before in usable():
            return before, ""
        return "", f"{key}: auto was {before}, which cannot be used here; it is pyav from now on"
    if len(usable()) < 2:
        return "", ""
    found = fastest(cfg, rank=world.rank, world=world.world, img=img)
    found = world.gather(found)[0]  # the first process decides for all
    return found.name, found.note(key.split(".")[0]) if found.clips_per_s else ""
