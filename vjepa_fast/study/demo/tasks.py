"""The demo's pieces of work. Each is a function of plain arguments that runs in a worker process and returns plain
values.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

# Heavy imports are inside: a worker pays for what its task needs.


def render(
    name: str, folder: str, splits: dict, size: int, frames: int, fps: int, seed: int, key: str
) -> dict[str, str]:
    """Render a suite, or what is missing of it; manifests by split. What the demo rendered for another key goes
    first.
    """
    from vjepa_fast.data.synthetic import render_suite

    mark = Path(folder) / "demo_key.json"
    if mark.is_file() and json.loads(mark.read_text()) != key:
        shutil.rmtree(folder)
    if not Path(folder).exists():
        _marked(mark, key)
    return render_suite(name, folder, splits=splits, size=size, frames=frames, fps=fps, seed=seed, workers=1)


def train(config: dict, key: str, device: str) -> dict:
    """Pretrain, or go on; a folder of another plan is started anew."""
    from vjepa_fast import config as configs
    from vjepa_fast import trainer

    cfg = configs.from_dict(config)
    mark = Path(cfg.folder) / "demo_key.json"
    same = mark.is_file() and json.loads(mark.read_text()) == key
    if not same:
        mark.unlink(missing_ok=True)
    result = trainer.train(
        cfg, resume=_marked(mark, key) if same else False, device=device, on_log=lambda row: _marked(mark, key)
    )
    return {"folder": str(result.folder), "step": result.step, "checkpoint": str(result.checkpoint)}


def _marked(mark: Path, key: str) -> bool:
    if not mark.is_file():
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps(key))
    return True


def decode(manifests: dict[str, str], parts: list[str], view: dict, path: str) -> str:
    """Decode the centre views of a suite's parts once, into one file that all evaluations read."""
    import torch
    from safetensors.torch import save_file

    from vjepa_fast import data
    from vjepa_fast.evaluation import decode_clips

    tensors, meta = {}, {}
    for part in parts:
        clips = decode_clips(data.load_manifest(manifests[part]), **view)
        tensors[f"{part}.clips"], tensors[f"{part}.labels"] = clips.clips, torch.from_numpy(clips.labels)
        meta[f"{part}.hash"], meta["images"] = clips.hash, str(clips.images)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path + ".tmp", metadata=meta)
    Path(path + ".tmp").replace(path)
    return path


def load_clips(path: str, name: str) -> dict:
    """The ClipSets by part that :func:`decode` wrote."""
    from safetensors import safe_open

    from vjepa_fast.evaluation import ClipSet

    found = {}
    with safe_open(path, "pt") as file:
        meta = file.metadata()
        for part in sorted({k.split(".")[0] for k in file}):
            found[part] = ClipSet(
                file.get_tensor(f"{part}.clips"),
                file.get_tensor(f"{part}.labels").numpy(),
                meta[f"{part}.hash"],
                f"{name}-{part}",
                meta["images"] == "True",
            )
    return found


def _episodes(label: str, kind: str, base, novel, plan: dict) -> list:
    """Few-shot rows on novel classes, features centred by the mean of the base classes."""
    from vjepa_fast.evaluation import episode_rows
    from vjepa_fast.evaluation.fewshot import centred

    many = {"queries": plan["queries"], "episodes": plan["episodes"], "seed": plan["seed"]}
    return episode_rows(label, kind, "fewshot", centred(novel, base), **many)


def _rows(label: str, kind: str, features_of, clips: dict[str, str], plan: dict) -> list:
    """Probe and episode rows of one encoder over all suites; ``features_of(ClipSet)`` gives Features."""
    from vjepa_fast.evaluation import probe_rows

    rows = []
    for suite, path in clips.items():
        parts = {part: features_of(c) for part, c in load_clips(path, suite).items()}
        if suite == "fewshot":
            rows += _episodes(label, kind, parts["train"], parts["test"], plan)
        else:
            rows += probe_rows(label, kind, suite, parts["train"], parts["val"], parts["test"], seed=plan["seed"])
    return rows


def _features(encoder, plan: dict, cache_dir: str | None, clips):
    from vjepa_fast.evaluation import extract_features

    return extract_features(
        encoder, clips, pooling=plan["pooling"], batch_size=32, device=plan["device"], cache_dir=cache_dir
    )


def evaluate(label: str, checkpoint: str, clips: dict[str, str], plan: dict, cache_dir: str) -> list[dict]:
    """Rows of a run's EMA target and of its student."""
    from vjepa_fast.models import load_encoder

    rows = []
    for which, name in (("target_encoder", label), ("encoder", f"{label}, student")):
        encoder = load_encoder(checkpoint, which=which, device=plan["device"])
        rows += _rows(name, "pretrained", partial(_features, encoder, plan, cache_dir), clips, plan)
    return [r.to_dict() for r in rows]


def controls(config: dict, clips: dict[str, str], plan: dict) -> list[dict]:
    """Rows of the random-init encoder (the weights that every run starts from) and of raw pixels."""
    from vjepa_fast import config as configs
    from vjepa_fast.evaluation import pixel_features, random_encoder

    encoder = random_encoder(configs.from_dict(config))
    rows = _rows("random init", "random", partial(_features, encoder, plan, None), clips, plan)
    rows += _rows("raw pixels", "pixels", pixel_features, clips, plan)
    return [r.to_dict() for r in rows]


def supervised(config: dict, suite: str, clips: str, plan: dict) -> list[dict]:
    """The supervised row of one suite; for few-shot: trained on the base classes, episodes on the novel ones."""
    from vjepa_fast import config as configs
    from vjepa_fast.evaluation import random_encoder, train_supervised
    from vjepa_fast.evaluation.run.rows import row_of

    parts = load_clips(clips, suite)
    label = "supervised (small)"
    few = suite == "fewshot"
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
    if few:
        base, novel = (_features(model.encoder, plan, None, parts[part]) for part in ("train", "test"))
        rows = _episodes(label, "supervised", base, novel, plan)
        return [r.to_dict() for r in rows]
    chance = max(int((parts["test"].labels == c).sum()) for c in set(parts["test"].labels.tolist())) / len(
        parts["test"]
    )
    return [
        row_of(model.result, label=label, kind="supervised", suite=suite, probe="supervised", chance=chance).to_dict()
    ]


def base_split(train, seed: int):
    """(train, val) ClipSets of base classes, labels counted from 0: a fifth of each class chooses, the rest trains."""
    import numpy as np

    from vjepa_fast.evaluation import ClipSet, Features, split_validation

    labels = np.unique(train.labels, return_inverse=True)[1].reshape(-1)
    index = Features(np.arange(len(labels), dtype=np.float32)[:, None], labels)
    return tuple(
        ClipSet(train.clips[p.x[:, 0].astype(int)], p.y, f"{train.hash}-{i}", train.name)
        for i, p in enumerate(split_validation(index, seed=seed))
    )


def pictures(
    configs_by_run: dict[str, dict],
    checkpoints: dict[str, str],
    clips: dict[str, str],
    names: list[str],
    seed: int,
    path: str,
) -> str:
    """Arrays of the mask and PCA pictures (one clip of each suite in ``names``), in one .npz file."""
    import dataclasses

    import numpy as np
    import torch

    from vjepa_fast import config as configs
    from vjepa_fast import ops
    from vjepa_fast.evaluation import encode, random_encoder
    from vjepa_fast.models import load_encoder
    from vjepa_fast.study.figures import pca_rgb

    cfg = configs.from_dict(next(iter(configs_by_run.values())))
    encoders = {"random init": random_encoder(cfg), **{k: load_encoder(c) for k, c in checkpoints.items()}}
    arrays = {}
    for name in names:
        clip = load_clips(clips[name], name)["test"].clips[seed : seed + 1]
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
            with torch.no_grad():
                z, found = encode(encoder, clip)
            arrays[f"{name}/pca/{label}"] = pca_rgb(z[0].float().numpy(), found)
    with open(path + ".tmp", "wb") as file:
        np.savez_compressed(file, **arrays)
    Path(path + ".tmp").replace(path)
    return path
