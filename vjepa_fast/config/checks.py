"""Constraints between values; those of single values are declared with their fields in ``schema.py``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import chain

from vjepa_fast.config.fields import default_of, join, refusals
from vjepa_fast.config.schema import Config, DataConfig
from vjepa_fast.errors import ConfigError

_PREDICTOR = (
    "pred_embed_dim pred_depth pred_num_heads pred_init pred_use_silu num_mask_tokens mask_token_index "
    "zero_init_mask_tokens normalize_predictor predict_all"
)
_UNUSED = {  # sections that a method does not read, and of those that it reads in part the keys
    "vjepa": {"levjepa": ()},
    "levjepa": {
        **dict.fromkeys(("masks", "img_data", "img_masks", "objectives", "loss", "target", "compat"), ()),
        "model": tuple(_PREDICTOR.split()),
        "runtime": ("capacity_quantum", "pad_to_multiple"),
    },
}


def check(config: Config) -> None:
    """Raise a one-line `ConfigError` for the first value of ``config`` that cannot be used."""
    for text in chain(refusals(config), _conflicts(config)):
        raise ConfigError(text)


def not_multiple(value: int, of: int, key: str, of_key: str) -> str | None:
    """What is wrong if ``value`` is not a positive multiple of ``of``; the keys name both in the message."""
    if value > 0 and value % of == 0:
        return None
    return f"{key}: {value} is not a multiple of {of_key} {of}; use {max(1, round(value / of)) * of}, for example"


def not_tubelets(frames: int, tubelet: int, key: str, of_key: str) -> str | None:
    """As `not_multiple`, for the frames of a clip."""
    text = not_multiple(frames, tubelet, key, of_key)
    if text is not None and frames == 1:
        text += "; for still images set model.img_temporal_dim_size: 1"
    return text


def refuse(text: str | None) -> None:
    """Raise `ConfigError` with ``text``, if there is one."""
    if text is not None:
        raise ConfigError(text)


def token_grid(frames: int, height: int, width: int, *, tubelet: int, patch: int) -> tuple[int, int, int]:
    """(T, H, W): the tokens along each axis of a clip of so many frames and pixels.

    Raises:
        ConfigError: frames do not divide into tubelets, or pixels into patches.
    """
    refuse(not_tubelets(frames, tubelet, "frames of a clip", "data.tubelet_size"))
    refuse(not_multiple(height, patch, "height of a clip", "data.patch_size"))
    refuse(not_multiple(width, patch, "width of a clip", "data.patch_size"))
    return frames // tubelet, height // patch, width // patch


def check_stream(section: str, data: DataConfig) -> None:
    """As `check`, for what is read alone; ``section`` is data or img_data."""
    for text in chain(refusals(data, section), _datasets(section, data)):
        raise ConfigError(text)


def _conflicts(config: Config) -> Iterator[str]:
    model, target = config.model, config.target
    yield from _method(config)
    yield from _stream("data", config.data, model.img_temporal_dim_size)
    if config.img_data is not None:
        yield from _stream("img_data", config.img_data, model.img_temporal_dim_size)
        yield from _images(config, config.img_data)
    if config.data.rank_ratio is not None:
        yield "data.rank_ratio: is a key of img_data: the share of the batches that are images"
    if config.img_data is None and config.img_masks is not None:
        yield "img_masks: needs img_data, which is not given"
    for section, masks in (("masks", config.masks), ("img_masks", config.img_masks)):
        for i, spec in enumerate(masks.specs if masks is not None else ()):
            if spec.full_complement and spec.pred_full_complement:
                yield f"{section}.specs.{i}.pred_full_complement: cannot be set together with full_complement"
    for prefix, width, heads in (
        ("", model.embed_dim, model.num_heads),
        ("pred_", model.pred_embed_dim, model.pred_num_heads),
    ):
        if width is not None and heads is not None:
            text = not_multiple(width, heads, f"model.{prefix}embed_dim", f"model.{prefix}num_heads")
            if text is not None:
                yield text
    if target.stop_gradient is False and target.mode != "online":
        yield "target.stop_gradient: false needs target.mode: online; no gradient passes through another target"
    if target.mode == "frozen" and target.path is None:
        yield "target.path: target.mode: frozen needs it: a run folder or file whose encoder is the target"
    if target.mode != "frozen" and target.path is not None:
        yield f"target.path: has no effect under target.mode: {target.mode}; set target.mode: frozen or take it out"
    runtime, monitor = config.runtime, config.monitor
    if (monitor.train is None) != (monitor.val is None):
        there, missing = ("val", "train") if monitor.train is None else ("train", "val")
        yield f"monitor.{missing}: not given, and monitor.{there} is; name both manifests, or neither (rendered clips)"
    if runtime.pad_to_multiple and runtime.capacity_quantum not in ("auto", runtime.pad_to_multiple):
        yield (
            f"runtime.pad_to_multiple: {runtime.pad_to_multiple} is given, and so is runtime.capacity_quantum, its new "
            f"name: {runtime.capacity_quantum}; give the latter alone"
        )
    if runtime.dtype == "float16":
        other = "method: levjepa" if config.method == "levjepa" else "optimization.name: muon"
        if config.method == "levjepa" or config.optimization.name == "muon":
            yield f"runtime.dtype: float16 is not supported with {other}; use bfloat16 or float32"
    if config.method == "levjepa" and config.optimization.on_nonfinite == "skip":
        yield "optimization.on_nonfinite: skip is not supported under method: levjepa, whose projector keeps statistics"
    if config.method == "levjepa" and config.optimization.spike_std is not None:
        yield "optimization.spike_std: is not supported under method: levjepa, whose projector keeps statistics"
    untruncated = any(m is not None and m.truncate == "none" for m in (config.masks, config.img_masks))
    if config.runtime.compile is True and untruncated:
        yield (
            "runtime.compile: true makes a graph for every set of mask lengths under masks.truncate: none; "
            "use blocks, auto or false"
        )


def _method(config: Config) -> Iterator[str]:
    """Keys that do nothing under the method of the run, and what LeVJEPA needs."""
    for section, keys in _UNUSED[config.method].items():
        for key in _changed(config, section):
            if not keys or key.split(".")[-1] in keys:
                yield f"{key}: has no effect under method: {config.method}; take it out"
    if config.method != "levjepa":
        return
    levjepa, data = config.levjepa, config.data
    text = not_multiple(levjepa.local_crop, data.patch_size, "levjepa.local_crop", "data.patch_size")
    if text is not None:
        yield text
    if config.model.levels != 1:
        yield f"model.levels: must be 1 under method: levjepa, which trains the last alone, got {config.model.levels}"
    if len(set(data.dataset_fpcs)) > 1:
        yield f"data.dataset_fpcs: must be one number under method: levjepa, got {list(data.dataset_fpcs)}"
    if data.batch_size < 2:
        yield "data.batch_size: must be at least 2 under method: levjepa, whose loss spreads clips apart, got 1"
    steps = config.optimization.epochs * config.optimization.ipe
    if levjepa.average_every > steps > 0:
        yield f"levjepa.average_every: must be at most the steps of the run, {steps}, got {levjepa.average_every}"


def _changed(config: Config, section: str) -> Iterator[str]:
    """What is not at its default: the section, or where that has keys of its own and is always there, these."""
    values = getattr(config, section)
    default = next(default_of(f) for f in dataclasses.fields(config) if f.name == section)
    if not dataclasses.is_dataclass(default):
        yield from [section] * (values != default)
        return
    for key in dataclasses.fields(default):
        if getattr(values, key.name) != getattr(default, key.name):
            yield join(section, key.name)


def _stream(section: str, data: DataConfig, image_frames: int | None) -> Iterator[str]:
    """``image_frames``: clips of so many frames are images, of one time step per frame."""

    def key(name: str) -> str:
        return join(section, name)

    text = not_multiple(data.crop_size, data.patch_size, key("crop_size"), key("patch_size"))
    if text is not None:
        yield text
    for i, frames in enumerate(data.dataset_fpcs):
        text = not_tubelets(frames, data.tubelet_size, key(f"dataset_fpcs.{i}"), key("tubelet_size"))
        if text is not None and frames != image_frames:
            yield text
    given = [name for name in ("fps", "frame_sample_rate", "duration") if getattr(data, name) is not None]
    if len(given) > 1:
        yield (f"{key(given[-1])}: give at most one of fps, frame_sample_rate and duration; given: {', '.join(given)}")
    yield from _datasets(section, data)


def _datasets(section: str, data: DataConfig) -> Iterator[str]:
    n, fpcs, weights = len(data.datasets), len(data.dataset_fpcs), data.datasets_weights
    if n and fpcs not in (1, n):
        yield f"{join(section, 'dataset_fpcs')}: {fpcs} values for {n} datasets; give one for each, or one for all"
    if n and weights is not None and len(weights) != n:
        where = join(section, "datasets_weights")
        yield f"{where}: {len(weights)} weights for {n} datasets; give one for each, or null"


def _images(config: Config, images: DataConfig) -> Iterator[str]:
    if images.patch_size != config.data.patch_size:
        yield (
            f"img_data.patch_size: {images.patch_size} differs from data.patch_size {config.data.patch_size}; "
            "one encoder reads both"
        )
    frames = config.model.img_temporal_dim_size
    if frames is not None and set(images.dataset_fpcs) != {frames}:
        yield (
            f"img_data.dataset_fpcs: must be {frames} (model.img_temporal_dim_size), got {list(images.dataset_fpcs)}"
        )
