"""The demo's own pieces of work: functions of plain values that run in a worker process; heavy imports are inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vjepa_fast.data.synthetic import SUITES
from vjepa_fast.files import atomic_file
from vjepa_fast.study.run.clips import load_clips

if TYPE_CHECKING:
    from vjepa_fast.evaluation import ClipSet
    from vjepa_fast.models.vit import VisionTransformer

# the values of a plan that are ``plan`` below
PLAN = ("pooling", "supervised_steps", "supervised_batch", "episodes", "queries", "seed", "device")


def _rows(
    label: str, kind: str, encoder: VisionTransformer | str, clips: Mapping[str, str], plan: Mapping, cache_dir=None
) -> list[dict]:
    """Rows of one encoder (or "pixels") over all suites, read as a study reads it."""
    from vjepa_fast.study.instrument.read import How, suite_rows

    where = {"device": plan["device"], "cache_dir": cache_dir, "batch_size": 32}
    how = How(**{k: plan[k] for k in ("pooling", "episodes", "queries", "seed")}, where=where)
    rows = []
    for suite, path in clips.items():
        rows += suite_rows(label, kind, suite, encoder, load_clips(path, suite), SUITES[suite].few_shot, how)
    return [r.to_dict() for r in rows]


def evaluate(label: str, checkpoint: str, clips: dict[str, str], plan: dict, cache_dir: str) -> list[dict]:
    """Rows of a run's EMA target and of its student."""
    from vjepa_fast.models import load_encoder

    rows = []
    for which, name in (("target_encoder", label), ("encoder", f"{label}, student")):
        encoder = load_encoder(checkpoint, which=which, device=plan["device"])
        rows += _rows(name, "pretrained", encoder, clips, plan, cache_dir)
    return rows


def controls(config: dict, clips: dict[str, str], plan: dict) -> list[dict]:
    """Rows of the random-init encoder (the weights that every run starts from) and of raw pixels."""
    from vjepa_fast import config as configs
    from vjepa_fast.evaluation import random_encoder

    rows = _rows("random init", "random", random_encoder(configs.from_dict(config)), clips, plan)
    return rows + _rows("raw pixels", "pixels", "pixels", clips, plan)


def supervised(config: dict, suite: str, clips: str, plan: dict) -> list[dict]:
    """The supervised row of one suite; for few-shot: trained on the base classes, episodes on the novel ones."""
    from vjepa_fast import config as configs
    from vjepa_fast.evaluation import random_encoder, train_supervised
    from vjepa_fast.evaluation.run.rows import row_of

    parts, few = load_clips(clips, suite), SUITES[suite].few_shot
    train, val = base_split(parts["train"], plan["seed"]) if few else (parts["train"], parts["val"])
    model = train_supervised(
        random_encoder(configs.from_dict(config)),
        train,
        val,
        None if few else parts["test"],
        steps=plan["supervised_steps"],
        batch_size=plan["supervised_batch"],
        seed=plan["seed"],
        device=plan["device"],
    )
    label, kind = "supervised (small)", "supervised"
    if model.result is None:  # no test part: few-shot
        return _rows(label, kind, model.encoder, {suite: clips}, plan)
    labels = parts["test"].labels.tolist()
    chance = max(map(labels.count, set(labels))) / len(labels)
    return [row_of(model.result, label=label, kind=kind, suite=suite, probe=kind, chance=chance).to_dict()]


def base_split(train: ClipSet, seed: int) -> tuple[ClipSet, ClipSet]:
    """(train, val) ClipSets of base classes, labels counted from 0: a fifth of each class chooses, the rest trains."""
    import numpy as np

    from vjepa_fast.evaluation import ClipSet, Features, split_validation

    labels = np.unique(train.labels, return_inverse=True)[1].reshape(-1)
    index = Features(np.arange(len(labels), dtype=np.float32)[:, None], labels)
    first, second = (
        ClipSet(train.clips[p.x[:, 0].astype(int)], p.y, f"{train.hash}-{i}", train.name)
        for i, p in enumerate(split_validation(index, seed=seed))
    )
    return first, second


def pictures(config: dict, checkpoints: dict[str, str], clips: dict[str, str], seed: int, path: str) -> str:
    """Arrays of the mask and PCA pictures (one clip of each suite in ``clips``), in one .npz file."""
    import dataclasses

    import numpy as np
    import torch

    from vjepa_fast import config as configs
    from vjepa_fast import ops
    from vjepa_fast.evaluation import random_encoder
    from vjepa_fast.models import load_encoder
    from vjepa_fast.study.demo.dense import dense_tokens
    from vjepa_fast.study.demo.figures import pca_rgb

    cfg = configs.from_dict(config)
    encoders = {"random init": random_encoder(cfg), **{k: load_encoder(c) for k, c in checkpoints.items()}}
    arrays = {}
    for name, file in clips.items():
        clip = load_clips(file, name)["test"].clips[seed : seed + 1]
        tubelet = cfg.data.tubelet_size
        grid = (clip.shape[2] // tubelet, clip.shape[3] // cfg.data.patch_size, clip.shape[4] // cfg.data.patch_size)
        arrays[f"{name}/frames"] = clip[0, :, ::tubelet].permute(1, 2, 3, 0).numpy()
        saliency = ops.motion_saliency(clip, grid, cfg.data_aug.mean, cfg.data_aug.std)
        arrays[f"{name}/saliency"] = saliency[0].numpy()
        for kind in ("plain", "guided"):
            spec = dataclasses.replace(
                cfg.masks.specs[0],
                motion_guided=kind == "guided",
                motion_guided_strength=2.0,
                motion_guided_random_rate=0.1,
            )
            masks = ops.sample_block_masks(
                1, grid, [spec], saliency=saliency if kind == "guided" else None, seed=seed, step=0
            )
            flat = torch.zeros(grid[0] * grid[1] * grid[2], dtype=torch.bool)
            flat[masks.pred[0, 0, : int(masks.pred_len[0, 0])]] = True
            arrays[f"{name}/{kind}"] = flat.reshape(grid).numpy()
        for label, encoder in encoders.items():
            z, found = dense_tokens(encoder, clip, cfg.data.patch_size)
            arrays[f"{name}/pca/{label}"] = pca_rgb(z.float().numpy(), found)
    with atomic_file(path, "wb") as out:
        np.savez_compressed(out, **arrays)
    return path
