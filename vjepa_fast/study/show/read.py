"""What a page shows of a run and of videos: rows, masks on clips, maps of features and attention, nearest clips.

Legend: F frames, S crop size, (T, H, W) the grid of tokens.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vjepa_fast import models
from vjepa_fast.config import DataConfig
from vjepa_fast.config.schema import Config
from vjepa_fast.data.manifests.manifest import load_manifest, quoted
from vjepa_fast.data.manifests.root import Root
from vjepa_fast.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, suffix_of
from vjepa_fast.data.views.evaluation import eval_clip
from vjepa_fast.errors import DataError, UserError
from vjepa_fast.evaluation import ClipSet, extract_features
from vjepa_fast.evaluation.controls import random_encoder
from vjepa_fast.evaluation.run.encoders import checkpoint_config
from vjepa_fast.files import write_text
from vjepa_fast.models.vit import VisionTransformer
from vjepa_fast.study.demo.dense import dense_tokens
from vjepa_fast.study.demo.figures import pca_rgb
from vjepa_fast.study.demo.records import RunRecord
from vjepa_fast.study.records import read_metrics
from vjepa_fast.study.sheet.read import Sheet, read_sheet

NEAREST = 4  # clips shown beside each


@dataclass(frozen=True, eq=False)
class Map:
    """A clip of ``path``: frames uint8 ``[T, S, S, 3]``, one per token time; by encoder its maps ``[T, h, w, 3]`` and
    its attention rollout ``[T, H, W]``.
    """

    path: str
    frames: np.ndarray
    maps: dict[str, np.ndarray]
    rollouts: dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Near:
    """A clip and those that are nearest: frame uint8 ``[S, S, 3]`` of each, and (path, frame, cosine) of the others."""

    path: str
    frame: np.ndarray
    others: list[tuple[str, np.ndarray, float]]


@dataclass(frozen=True, eq=False)
class Shown:
    """The page's material; ``notes`` say what there is none of, and why."""

    title: str
    encoder: str
    settings: dict[str, str]
    run: RunRecord | None
    sheet: Sheet | None
    maps: list[Map]
    near: list[Near]
    notes: list[str] = field(default_factory=list)


def read_shown(
    target: str | Path,
    encoder: str | Path | None = None,
    *,
    clips: int = 3,
    among: int = 64,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> Shown:
    """Read what there is to show.

    Args:
        target: a run folder or checkpoint, whose own videos are shown; or a video, for which ``encoder`` is needed.
        encoder: run folder, checkpoint or weights whose features are shown.
        clips: how many clips. among: of how many clips of the run's data the nearest are looked for.
        device: where the encoder runs. say: told what comes next.

    Raises:
        UserError: neither a run nor a video, or a video without an encoder.
        CheckpointError: the checkpoint cannot be read. DataError: the video cannot be read.
    """
    target = Path(target).expanduser()
    video = suffix_of(str(target)) in VIDEO_SUFFIXES | IMAGE_SUFFIXES and not target.is_dir()
    if video and encoder is None:
        raise UserError(f"{target}: is a video; name the run whose features are shown with --encoder RUN")
    if video and not target.is_file():
        raise DataError(f"{target}: no such file")
    source = Path(encoder).expanduser() if encoder is not None else target
    say("loading the encoder")
    net, cfg = models.load_encoder(source), checkpoint_config(source)
    net.to(device)
    notes: list[str] = []
    run = _run(source)
    if run is None:
        notes.append(f"no curves: {source} is no run folder with rows in metrics.jsonl")
    listed = _listed(cfg, source, notes)
    shown = [str(target)] if video else _spread(listed, clips)
    sheet = None
    if cfg is not None and shown:
        say("reading clips and masks")
        sheet = _sheet(cfg, [str(target)] * clips if video else shown, notes)
    say(f"encoding {len(shown)} clips at many places, and {min(among, len(listed))} to compare")
    taken = [found for path in shown if (found := _clip(net, cfg, path, notes)) is not None]
    control = {} if cfg is None else {"random init": random_encoder(cfg).to(device)}
    maps = [_map(path, clip, {"trained": net, **control}, cfg, device) for path, clip in taken]
    near = _nearest(net, cfg, taken, [p for p in _spread(listed, among) if p not in shown], notes, device)
    settings = {} if cfg is None else _settings(cfg)
    return Shown(target.name or str(target), str(source), settings, run, sheet, maps, near, notes)


def _run(source: Path) -> RunRecord | None:
    """The rows of the run that a folder, or a checkpoint in one, belongs to."""
    folder = source if source.is_dir() else source.parent.parent
    rows = read_metrics(folder)
    return RunRecord(folder.name, folder.name, "", rows) if rows else None


def _listed(cfg: Config | None, source: Path, notes: list[str]) -> list[str]:
    """The videos or images that a run trained on."""
    if cfg is None:
        notes.append(f"no clips of the training data: {source} holds no configuration")
        return []
    found: list[str] = []
    for entry in cfg.data.datasets:
        try:
            found += load_manifest(entry, Root.of(cfg.data)).paths
        except UserError as error:
            notes.append(f"not shown: {error}")
    return list(dict.fromkeys(found))


def _spread(paths: Sequence[str], number: int) -> list[str]:
    """So many of them, evenly spread."""
    number = min(number, len(paths))
    return [paths[i * len(paths) // number] for i in range(number)]


def _sheet(cfg: Config, paths: list[str], notes: list[str]) -> Sheet | None:
    """These files as a training step of their own sees them."""
    data: DataConfig = replace(
        cfg.data, batch_size=max(2, len(paths)), num_workers=0, cache_mb=0, max_bad_fraction=1.0, pin_mem=False
    )
    cfg = replace(cfg, data=data, img_data=None, img_masks=None, optimization=replace(cfg.optimization, accumulate=1))
    if cfg.method != "vjepa":
        notes.append(f"no masks: method {cfg.method} draws none")
        return None
    with tempfile.TemporaryDirectory() as scratch:
        manifest = Path(scratch) / "shown.csv"
        write_text(manifest, "".join(f"{quoted(os.path.abspath(path))} 0\n" for path in paths))
        try:
            return read_sheet(cfg, str(manifest), clips=len(paths))
        except UserError as error:
            notes.append(f"no masks: {error}")
            return None


def _view(net: VisionTransformer, cfg: Config | None) -> dict[str, Any]:
    """How a clip is read for the encoder: arguments of `eval_clip`."""
    known = dict(getattr(net, "clip_settings", None) or {})
    frames = known.get("num_frames") or (max(cfg.data.dataset_fpcs) if cfg else 16)
    pace = next(({k: known[k]} for k in ("frame_step", "fps", "duration") if known.get(k)), {})
    return {"num_frames": frames, "crop_size": known.get("crop_size") or 224, "short": "hold", **pace}


def _clip(net: VisionTransformer, cfg: Config | None, path: str, notes: list[str]) -> tuple[str, torch.Tensor] | None:
    """(path, uint8 ``[3, F, S, S]``); None with a note where it cannot be read."""
    try:
        return path, eval_clip(path, **_view(net, cfg))
    except DataError as error:
        notes.append(f"not shown: {error}")
        return None


def _map(
    path: str, clip: torch.Tensor, nets: dict[str, VisionTransformer], cfg: Config | None, device: torch.device | str
) -> Map:
    first = next(iter(nets.values()))
    tubelet = clip.shape[1] // first.grid((1, *clip.shape))[0]
    patch = clip.shape[-1] // first.grid((1, *clip.shape))[2]
    frames = clip[:, ::tubelet].permute(1, 2, 3, 0).numpy()
    maps, rollouts = {}, {}
    for name, net in nets.items():
        z, grid = dense_tokens(net, clip[None].to(device), patch)
        maps[name] = pca_rgb(z.float().cpu().numpy(), grid)
        rollouts[name] = models.attention_rollout(net, clip[None].to(device))[0].cpu().numpy()
    return Map(path, frames, maps, rollouts)


def _nearest(
    net: VisionTransformer,
    cfg: Config | None,
    queries: list[tuple[str, torch.Tensor]],
    among: list[str],
    notes: list[str],
    device: torch.device | str,
) -> list[Near]:
    """For each query the nearest clips by cosine of the mean feature, less the mean of all."""
    lost: list[str] = []
    others = [found for path in among if (found := _clip(net, cfg, path, lost)) is not None]
    notes += lost[:3] + [f"{len(lost) - 3} more could not be read"] * (len(lost) > 3)
    if not queries or len(others) < 2:
        notes.append("no nearest clips: that takes three clips of the training data that can be read")
        return []
    clips = torch.stack([clip for _, clip in [*queries, *others]])
    held = ClipSet(clips, np.zeros(len(clips), np.int64), "shown")
    x = extract_features(net, held, pooling="mean", device=device).x.astype(np.float64)
    x = x - x.mean(0)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    cosine = x[: len(queries)] @ x[len(queries) :].T
    found = []
    for (path, clip), row in zip(queries, cosine):
        order = np.argsort(-row, kind="stable")[:NEAREST]
        found.append(Near(path, _middle(clip), [(others[i][0], _middle(others[i][1]), float(row[i])) for i in order]))
    return found


def _middle(clip: torch.Tensor) -> np.ndarray:
    return clip[:, clip.shape[1] // 2].permute(1, 2, 0).numpy()


def _settings(cfg: Config) -> dict[str, str]:
    data, o = cfg.data, cfg.optimization
    loss = ", ".join(cfg.objectives) if cfg.method == "vjepa" else cfg.method
    clips = data.batch_size * o.accumulate
    return {
        "model": cfg.model.model_name if cfg.model.embed_dim is None else f"{cfg.model.embed_dim} wide",
        "clips": f"{max(data.dataset_fpcs)} frames of {data.crop_size} px",
        "loss": loss,
        "length": f"{o.epochs * o.ipe:,} steps of {clips} clips, lr {o.lr:g}",
        "data": ", ".join(data.datasets),
    }


def refuse_out(path: str | Path) -> Path:
    """The path of a page; UserError unless it ends in .html."""
    if (path := Path(path)).suffix.lower() != ".html":
        raise UserError(f"--out {path}: expected a name that ends in .html")
    return path
