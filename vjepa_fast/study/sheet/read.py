"""The clips of one training step and their masks, with what is written under them: numbers and times of the frames.

Legend: F frames, S crop size, M masks, (T, H, W) the grid of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from vjepa_fast.config.schema import Config, DataConfig
from vjepa_fast.data.decoders import choose_decoder
from vjepa_fast.data.decoders.index_cache import INDICES
from vjepa_fast.data.loader import ClipGroup, ClipLoader
from vjepa_fast.data.manifests.manifest import load_manifest
from vjepa_fast.data.media import ReadOptions
from vjepa_fast.data.sampling import Sampling
from vjepa_fast.errors import UserError
from vjepa_fast.files import parse_json
from vjepa_fast.trainer.building import build_samplers
from vjepa_fast.trainer.step import IMAGE_GROUPS

NEITHER, CONTEXT, PREDICTED = 0, 1, 2


@dataclass(frozen=True, eq=False)
class ShownClip:
    """One clip.

    Attributes:
        path: its file. label: of the manifest. name: of the label's class, empty if not known.
        facts: of the file: size, codec, rate, frames, rotation.
        frames: uint8 ``[F, S, S, 3]``, augmented.
        numbers: int64 ``[F]``, place of each frame in the file; seconds: float64 ``[F]``, when it is shown; None for an
            image.
        masks: uint8 ``[M, T, H, W]``: `CONTEXT`, `PREDICTED` or `NEITHER`.
    """

    path: str
    label: int
    name: str
    facts: str
    frames: np.ndarray
    numbers: np.ndarray | None
    seconds: np.ndarray | None
    masks: np.ndarray


@dataclass(frozen=True, eq=False)
class Sheet:
    """What is shown: ``manifest``, the recipe's ``settings`` in words, ``clips``, ``bad``: (path, reason) of each."""

    manifest: str
    settings: list[tuple[str, str]]
    clips: list[ShownClip]
    bad: list[tuple[str, str]]


def read_sheet(cfg: Config, manifest: str, *, clips: int = 8, step: int = 0) -> Sheet:
    """The first ``clips`` clips of a step, as a run with ``cfg`` on this manifest alone reads them.

    The whole batch is read, since masks of one batch are cut to one length. Images are read by ``img_data`` where the
    recipe has it.

    Raises:
        DataError: the manifest cannot be used, or too many samples cannot be read.
        ConfigError: settings that do not fit one another.
    """
    listed = load_manifest(manifest)
    img = listed.kind == "image" and cfg.img_data is not None
    section = cfg.img_data if img and cfg.img_data is not None else cfg.data
    data = replace(section, datasets=(manifest,), datasets_weights=None, dataset_fpcs=section.dataset_fpcs[:1])
    cfg = _with_data(cfg, data, img)
    first = step * cfg.optimization.accumulate
    with ClipLoader(cfg, start_step=first, img=img) as loader:
        batch, bad = next(loader), loader.bad.samples
    group = batch.groups[0]
    classes = _class_names(Path(listed.path))
    shown = []
    frames = group.clip.permute(0, 2, 3, 4, 1).cpu().numpy()
    masks = _masks(cfg, group, step)
    for i, (numbers, seconds) in enumerate(
        _numbers(cfg, data, img, first * data.batch_size, min(clips, data.batch_size))
    ):
        label = int(group.labels[i])
        name = classes[label] if label < len(classes) else ""
        facts = _facts(group.paths[i], data, image=listed.kind == "image")
        shown.append(ShownClip(group.paths[i], label, name, facts, frames[i], numbers, seconds, masks[:, i]))
    return Sheet(listed.path, _settings(cfg, data, step), shown, bad)


def _with_data(cfg: Config, data: DataConfig, img: bool) -> Config:
    return replace(cfg, img_data=data) if img else replace(cfg, data=data)


@dataclass(frozen=True)
class _Noted(Sampling):
    """Sampling that notes the frames it chose last: (numbers, seconds)."""

    noted: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def indices(
        self,
        path: str,
        total: int,
        video_fps: float,
        num_frames: int,
        start: str | float,
        generator: np.random.Generator | None,
        times: np.ndarray | None = None,
    ) -> np.ndarray:
        numbers = super().indices(path, total, video_fps, num_frames, start, generator, times)
        self.noted[:] = [(numbers, numbers / video_fps if times is None else times[numbers])]
        return numbers


def _numbers(
    cfg: Config, data: DataConfig, img: bool, position: int, clips: int
) -> Iterator[tuple[np.ndarray | None, np.ndarray | None]]:
    """Which frames the clips from a position on are: the same samples once more, one a step."""
    one = replace(data, batch_size=1, num_workers=0, max_bad_fraction=1.0)
    with ClipLoader(_with_data(cfg, one, img), start_step=position, img=img) as loader:
        reader = loader._reader  # noqa: SLF001 (nobody else wants to look on)
        sampling = _Noted(**{f: getattr(reader.sampling, f) for f in Sampling.__dataclass_fields__})
        reader.sampling = sampling
        for _ in range(clips):
            sampling.noted.clear()
            next(loader)
            yield sampling.noted[0] if sampling.noted else (None, None)


def _masks(cfg: Config, group: ClipGroup, step: int) -> np.ndarray:
    """uint8 ``[M, B, T, H, W]`` of a batch's only group, as a training step draws them."""
    image = group.modality == "image"
    sampler = build_samplers(cfg)[image]
    keys = {"step": step, "first_sample": group.first_sample, "group": IMAGE_GROUPS * image}
    drawn = sampler.draw(group.clip, **keys).masks
    grid = sampler.grid(group.clip.shape)
    maps = np.full((*drawn.enc.shape[:2], int(np.prod(grid))), NEITHER, np.uint8)
    for tokens, lengths, value in ((drawn.pred, drawn.pred_len, PREDICTED), (drawn.enc, drawn.enc_len, CONTEXT)):
        for s, row in enumerate(lengths.tolist()):
            for b, length in enumerate(row):
                maps[s, b, tokens[s, b, :length].cpu().numpy()] = value
    return maps.reshape(*drawn.enc.shape[:2], *grid)


def _facts(path: str, data: DataConfig, image: bool) -> str:
    """Size, codec, rate, length and rotation of a file, in words."""
    if image:
        return "image"
    options = ReadOptions.of(data)
    try:
        info = choose_decoder(data.decoder, options=options).probe(path)
    except UserError:  # it was read a moment ago
        return ""
    index = INDICES.known(path)
    facts = [f"{info['width']} x {info['height']} {info['codec']}", f"{info['frames']} frames"]
    facts.append(f"{info['fps']:.4g} frames/s" + ("" if index is None or index.constant else " on average"))
    if index is not None and index.turn != [1, 0, 0, 1]:
        facts.append("turned as its display matrix says")
    return ", ".join(facts)


def _class_names(manifest: Path) -> list[str]:
    """Names of the labels, where the file that `vjepa-fast data manifest` writes is there."""
    for file in (manifest.with_name(f"{manifest.stem}_classes.json"), manifest.with_name("classes.json")):
        try:
            names = parse_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(names, list):
            return [str(name) for name in names]
    return []


def _settings(cfg: Config, data: DataConfig, step: int) -> list[tuple[str, str]]:
    every = f"step {data.frame_sample_rate or 1}"
    if data.fps or data.duration:
        every = f"{data.fps} a second" if data.fps else f"over {data.duration:g} s"
    frames = data.dataset_fpcs[0]
    what = "single frames" if frames == 1 else f"{frames} frames, {every}"
    low, high = cfg.data_aug.random_resize_scale
    return [
        ("clips", f"{what}, {data.crop_size} x {data.crop_size} pixels"),
        ("crop", f"{low:.0%} to {high:.0%} of the picture; mirrored: {cfg.data_aug.horizontal_flip:.0%}"),
        ("tokens", f"{data.tubelet_size} frames x {data.patch_size} x {data.patch_size} pixels"),
        ("sample", f"seed {cfg.seed}, step {step}, batch of {data.batch_size} in one process"),
    ]
