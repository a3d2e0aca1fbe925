"""What is needed to make a step again that was not finite: ``failure-00000012.pt`` in the run folder.

A ``torch.save`` dict that loads with ``weights_only=True``::

    step          optimiser steps made, the failed one included
    values        terms that were not finite, as texts by name
    batches       per micro-batch its groups (clips, paths, first sample, ...) and masks
    encoder, predictor, target_encoder, heads    weights
    weights_step  steps behind the weights: step - 1, or fewer where those of the step before were gone
    scaler, rng, dtype, config, versions         as in a checkpoint
    digests       of all of the above

``vjepa-fast replay`` reads it (`replay`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vjepa_fast import config as configs
from vjepa_fast.config.schema import Config
from vjepa_fast.data.loader import ClipGroup, ClipLoader
from vjepa_fast.errors import CheckpointError
from vjepa_fast.files import atomic_file, first_line
from vjepa_fast.masks.drawn import DrawnMasks
from vjepa_fast.models import digests
from vjepa_fast.ops.block_masks import BlockMasks
from vjepa_fast.trainer import checkpoint
from vjepa_fast.trainer.nonfinite import NonFiniteError
from vjepa_fast.trainer.prefetch import Prefetcher, Staged

if TYPE_CHECKING:
    from vjepa_fast.trainer.trainer import Trainer

KEYS = ("step", "values", "batches", *checkpoint.WEIGHTS, "weights_step", "dtype", "config")


def path_of(folder: str | Path, step: int, rank: int = 0) -> Path:
    """Where the bundle of a failed step is; processes beside the first have their number in it."""
    return Path(folder) / (f"failure-{step:08d}" + (f".rank{rank}" if rank else "") + ".pt")


def write_bundle(trainer: Trainer, error: NonFiniteError) -> Path | None:
    """Write the bundle of the step that ``error`` names, in the process whose values were not finite; None elsewhere,
    and where it cannot be written: the failure is the news.
    """
    if not error.here:
        return None
    path = path_of(trainer.folder, error.step, trainer.world.rank)
    try:
        content = _content(trainer, error)
        with atomic_file(path, "wb", checkpoint.FREE, parents=False) as f:
            torch.save({**content, digests.ENTRY: digests.digests_of(content)}, f)
    except Exception as problem:
        trainer.saver.say(f"warning: no {path.name} was written: {first_line(problem)}")
        return None
    trainer.saver.say(f"`vjepa-fast replay {path}` makes step {error.step} again and names where it fails")
    return path


def _content(trainer: Trainer, error: NonFiniteError) -> dict[str, Any]:
    state, behind = trainer.step.state_dict(), error.step - 1
    guard = trainer.step.guard
    kept = guard.failed or (guard.cfg.on_nonfinite == "skip" and error.last)
    if not kept:
        saved = trainer.saver.path
        if saved is not None:
            state, behind = (content := checkpoint.load(saved)), int(content["step"])
        else:
            state, behind = type(trainer.step)(trainer.cfg, device=trainer.device).state_dict(), 0
    index = error.step - 1
    batches = _batches(trainer, index)
    return {
        "step": error.step,
        "values": dict(error.values),
        "batches": [pack(trainer.step.stage(batch, index)) for batch in batches],
        **{name: {k: v.detach().cpu() for k, v in state[name].items()} for name in checkpoint.WEIGHTS},
        "weights_step": behind,
        "scaler": dict(state.get("scaler") or {}),
        "rng": checkpoint.rng_state(trainer.device),
        "dtype": str(trainer.step.dtype).removeprefix("torch."),
        "config": configs.to_dict(trainer.cfg),
        "versions": trainer.versions,
    }


def _batches(trainer: Trainer, index: int) -> Sequence[Any]:
    """The batches of a step, read again: they are a function of it."""
    loaders: list[ClipLoader] = []
    for loader in trainer.loaders:
        data = dataclasses.replace(loader.data, num_workers=0)
        cfg = dataclasses.replace(trainer.cfg, **{loader.section: data})
        start, first = index * len(loader.share.own), loader.sample_at(index)
        loaders.append(ClipLoader(cfg, start_step=start, start_sample=first, img=loader.img, share=loader.share))
    try:
        streams = [iter(loader) for loader in loaders]
        times = [len(loader.share.own) for loader in loaders]
        return Prefetcher(streams, trainer.step.stage, trainer.device, accumulate=times, ahead=False).take(index)
    finally:
        for loader in loaders:
            loader.close()


def pack(batch: Staged) -> dict[str, Any]:
    """A batch as plain values and tensors on the CPU."""
    groups = [
        {f.name: _cpu(getattr(group, f.name)) for f in dataclasses.fields(group) if getattr(group, f.name) is not None}
        for group in batch.groups
    ]
    masks = [
        {**{f.name: _cpu(getattr(m.masks, f.name)) for f in dataclasses.fields(m.masks)}, "packed": m.packed}
        for m in batch.masks
    ]
    return {"groups": groups, "masks": masks, "step": batch.step}


def unpack(content: Mapping[str, Any], device: torch.device) -> Staged:
    """What `pack` was given, on the device."""
    groups = [ClipGroup(**{k: _to(v, device) if k in ("clip", "local") else v for k, v in g.items()}) for g in
              content["groups"]]  # fmt: skip
    masks = [
        DrawnMasks(BlockMasks(**{k: _to(v, device) for k, v in m.items() if k != "packed"}), m["packed"])
        for m in content["masks"]
    ]
    return Staged(groups, content["step"], masks)


def _cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def load(path: str | Path) -> tuple[dict[str, Any], Config]:
    """(content, configuration) of a bundle, held against its digests.

    Raises:
        CheckpointError: missing, damaged or no bundle.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; a run that fails writes failure-STEP.pt to its folder")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read, damaged or no bundle ({first_line(error)})") from error
    missing = [k for k in KEYS if k not in content] if isinstance(content, dict) else list(KEYS)
    if missing:
        raise CheckpointError(f"{path}: not a bundle of a failed step, {', '.join(missing)} missing")
    digests.verify(content, path)
    return content, configs.from_dict(content["config"])
