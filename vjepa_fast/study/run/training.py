"""One pretraining run: its length, its settings as text, and training it, in this process or under torchrun."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from vjepa_fast.config import Config
from vjepa_fast.errors import TrainingError
from vjepa_fast.files import read_json, write_json, write_text

KEY = "demo_key.json"  # what a folder was made for, so that one of another plan is not taken for a stopped one


def stretched(cfg: Config, scale: float) -> Config:
    """``cfg`` with ``scale`` times as many iterations, and the horizon of the EMA stretched with them."""
    if scale == 1.0:
        return cfg
    opt = dataclasses.replace(cfg.optimization, ipe=max(1, round(cfg.optimization.ipe * scale)))
    start, end = (1 - min(1.0, (1 - m) / scale) for m in cfg.target.ema)
    return dataclasses.replace(cfg, optimization=opt, target=dataclasses.replace(cfg.target, ema=(start, end)))


def settings_text(cfg: Config, weights: Mapping[str, float]) -> dict[str, str]:
    """A run's settings, one printable line each, for the report. ``weights``: sampling weight by data set."""
    data, model, opt = cfg.data, cfg.model, cfg.optimization
    decay = dict.fromkeys((opt.weight_decay, opt.final_weight_decay))
    return {
        "data": ", ".join(f"{w:g} {name}" for name, w in weights.items()),
        "clips": f"{max(data.dataset_fpcs)} frames, step {data.frame_sample_rate or 1}, {data.crop_size} px, "
        f"batch {data.batch_size}",
        "encoder": f"width {model.embed_dim or model.model_name}, depth {model.depth or ''}, {model.levels} levels, "
        f"tubelets {data.tubelet_size} x {data.patch_size} x {data.patch_size}",
        **(_levjepa_text(cfg) if cfg.method == "levjepa" else _vjepa_text(cfg)),
        "steps": str(int(opt.epochs * opt.ipe * opt.ipe_scale)),
        "learning rate": f"{opt.start_lr:g} to {opt.lr:g} to {opt.final_lr:g}, "
        f"warm-up {opt.warmup:g} of {opt.epochs} epochs",
        "weight decay": " to ".join(f"{w:g}" for w in decay),
        "compat": cfg.compat,
        "seed": str(cfg.seed),
    }


def _vjepa_text(cfg: Config) -> dict[str, str]:
    def term(name: str, fields: Mapping) -> str:
        return " ".join([name, *(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in fields.items())])

    specs = [
        f"{m.num_blocks} x {m.spatial_scale[0]:g}" + (" motion-guided" if m.motion_guided else "")
        for m in cfg.masks.specs
    ]
    target = cfg.target
    return {
        "predictor": f"width {cfg.model.pred_embed_dim}, depth {cfg.model.pred_depth}",
        "objectives": "; ".join(term(*item) for item in cfg.objectives.items()),
        "masks": "; ".join(specs),
        "target": f"{target.mode}, momentum {target.ema[0]:.5g} to {target.ema[1]:.5g}",
    }


def _levjepa_text(cfg: Config) -> dict[str, str]:
    own = cfg.levjepa
    local = f"{own.local_views} of {own.local_crop} px and {own.local_scale[0]:g} to {own.local_scale[1]:g} of the area"
    return {
        "predictor": f"none; projector {own.proj_hidden} to {own.proj_dim}",
        "objectives": f"invariance; {own.sigreg:g} sigreg, {own.num_slices} directions",
        "masks": f"none; {own.drop:g} of the tokens left out",
        "views": f"1 of {cfg.data.crop_size} px, {local}",
        "target": f"none; weights averaged every {own.average_every} steps for evaluation",
    }


def has_key(folder: str | os.PathLike, key: str | None = None) -> bool:
    """Whether a folder has the note that it was made for ``key``, a plan's (None: any note)."""
    mark = Path(folder) / KEY
    return mark.is_file() and (key is None or read_json(mark) == key)


def leave_key(folder: str | os.PathLike, key: str) -> None:
    """Leave the note in a folder that has none."""
    if not has_key(folder):
        write_json(Path(folder) / KEY, key)


def train(config: dict, key: str, device: str) -> dict:
    """Pretrain, or go on with a stopped run: {"folder", "step", "checkpoint"} of the finished one, plain values.

    A folder of another ``key`` is started anew.
    """
    from vjepa_fast import config as configs
    from vjepa_fast import trainer

    cfg = configs.from_dict(config)
    same = has_key(cfg.folder, key)
    if not same:
        (Path(cfg.folder) / KEY).unlink(missing_ok=True)
    result = trainer.train(cfg, resume=same, device=device, on_log=lambda row: leave_key(cfg.folder, key))
    return {"folder": str(result.folder), "step": result.step, "checkpoint": str(result.checkpoint)}


def train_under_torchrun(config: dict, key: str, processes: int, yaml: Path) -> str:
    """As `train`, on ``processes`` GPUs of this machine, configured by ``yaml``; returns the path of the checkpoint.

    Raises TrainingError that names the command and its exit code where it failed.
    """
    from vjepa_fast import config as configs
    from vjepa_fast.models.interop import newest_checkpoint

    cfg = configs.from_dict(config)
    mark = Path(cfg.folder) / "study_hash.txt"
    same = mark.is_file() and mark.read_text() == key
    write_text(yaml, configs.dump_yaml(cfg))
    resume = same or not (Path(cfg.folder) / "checkpoints").exists()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "vjepa_fast", "train", str(yaml), *([] if resume else ["--no-resume"])]
    write_text(mark, key)
    process = subprocess.Popen(command)
    try:
        code = process.wait()
    except BaseException:  # a stop: its trainers save and leave first
        process.terminate()
        process.wait()
        raise
    if code:
        raise TrainingError(f"{' '.join(command)}: exit code {code}; the run's log has its output")
    return str(newest_checkpoint(cfg.folder))
