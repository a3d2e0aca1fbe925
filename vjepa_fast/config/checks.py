"""Checks of single values' ranges and of values that have to go together."""

from __future__ import annotations

import re

from vjepa_fast.config.schema import (
    AugmentConfig,
    Config,
    DataConfig,
    MaskConfig,
    MasksConfig,
    ModelConfig,
    OptimizationConfig,
)
from vjepa_fast.errors import ConfigError

CHOICES = {
    "masks.truncate": ("batch", "random", "none"),
    "masks.saliency": ("trilinear", "area"),
    "model.mask_token_index": ("mask", "zero"),
    "model.rope_variant": ("v2", "v2.1"),
    "target.mode": ("ema", "online"),
    "optimization.name": ("adamw", "muon"),
    "runtime.dtype": ("auto", "float32", "bfloat16"),
    "compat": ("intended", "published"),
}


class _Checker:
    def __init__(self, source: str) -> None:
        self.source = source

    def fail(self, path: str, message: str) -> None:
        raise ConfigError(f"{self.source}: {path}: {message}")

    def require(self, ok: bool, path: str, message: str) -> None:
        if not ok:
            self.fail(path, message)

    def at_least(self, low, section: str, values, *names: str) -> None:
        for name in names:
            value = getattr(values, name)
            if value is not None and value < low:
                self.fail(f"{section}.{name}", f"must be at least {low}, got {value}")

    def positive(self, section: str, values, *names: str) -> None:
        for name in names:
            value = getattr(values, name)
            if value is not None and not value > 0:
                self.fail(f"{section}.{name}", f"must be greater than 0, got {value}")

    def fraction(self, section: str, values, *names: str) -> None:
        for name in names:
            value = getattr(values, name)
            if not 0 <= value <= 1:
                self.fail(f"{section}.{name}", f"must lie in [0, 1], got {value}")

    def interval(self, path: str, bounds, top: float | None) -> None:
        low, high = bounds
        limit = f" <= {top:g}" if top is not None else ""
        if not (0 < low <= high and (top is None or high <= top)):
            self.fail(path, f"must be [low, high] with 0 < low <= high{limit}, got [{low:g}, {high:g}]")

    def choice(self, path: str, value: str, key: str | None = None) -> None:
        accepted = CHOICES[key or path]
        if value not in accepted:
            self.fail(path, f"unknown value {value!r}; accepted: {', '.join(accepted)}")


def check(config: Config, source: str = "config") -> None:
    """Raise a one-line `ConfigError` for the first value of ``config`` that cannot be used."""
    c = _Checker(source)
    c.choice("compat", config.compat)
    c.require(config.seed >= 0, "seed", f"must be at least 0, got {config.seed}")
    c.require(bool(config.folder.strip()), "folder", "must not be empty")
    _data(c, "data", config.data)
    _augment(c, config.data_aug)
    _masks(c, "masks", config.masks)
    _model(c, config.model)
    _target(c, config)
    _optimization(c, config.optimization)
    _runtime(c, config)
    c.require(bool(config.objectives), "objectives", "no term is named; 'pred: {}' is the prediction loss")
    if config.loss.context_warmup is not None:
        _warmup(c, "loss.context_warmup", config.loss.context_warmup)
    _images(c, config)


def _data(c: _Checker, section: str, data: DataConfig) -> None:
    c.at_least(1, section, data, "batch_size", "crop_size", "patch_size", "tubelet_size", "fps", "frame_sample_rate")
    c.at_least(0, section, data, "num_workers", "cache_mb")
    c.positive(section, data, "duration")
    c.fraction(section, data, "max_bad_fraction")
    if data.crop_size % data.patch_size:
        near = max(1, round(data.crop_size / data.patch_size)) * data.patch_size
        c.fail(
            f"{section}.crop_size",
            f"{data.crop_size} is not a multiple of {section}.patch_size {data.patch_size}; use {near}, for example",
        )
    c.require(bool(data.dataset_fpcs), f"{section}.dataset_fpcs", "must not be empty")
    for i, frames in enumerate(data.dataset_fpcs):
        path = f"{section}.dataset_fpcs.{i}"
        c.require(frames >= 1, path, f"must be at least 1, got {frames}")
        c.require(
            frames == 1 or frames % data.tubelet_size == 0,
            path,
            f"{frames} frames are not a multiple of {section}.tubelet_size {data.tubelet_size}",
        )
    given = [name for name in ("fps", "frame_sample_rate", "duration") if getattr(data, name) is not None]
    c.require(
        len(given) <= 1,
        f"{section}.{given[-1] if given else ''}",
        f"give at most one of fps, frame_sample_rate and duration; given: {', '.join(given)}",
    )
    n, fpcs = len(data.datasets), len(data.dataset_fpcs)
    c.require(
        fpcs == 1 or not n or fpcs == n,
        f"{section}.dataset_fpcs",
        f"{fpcs} values for {n} datasets; give one for each, or one for all",
    )
    weights = data.datasets_weights
    if weights is not None:
        c.require(
            not n or len(weights) == n,
            f"{section}.datasets_weights",
            f"{len(weights)} weights for {n} datasets; give one for each, or null",
        )
        c.require(
            all(w >= 0 for w in weights) and sum(weights) > 0,
            f"{section}.datasets_weights",
            f"must be at least 0 and not all 0, got {list(weights)}",
        )


def _augment(c: _Checker, aug: AugmentConfig) -> None:
    c.interval("data_aug.random_resize_aspect_ratio", aug.random_resize_aspect_ratio, None)
    c.interval("data_aug.random_resize_scale", aug.random_resize_scale, 1.0)
    c.fraction("data_aug", aug, "horizontal_flip")
    c.require(min(aug.std) > 0, "data_aug.std", f"must be greater than 0, got {list(aug.std)}")


def _masks(c: _Checker, section: str, masks: MasksConfig) -> None:
    c.choice(f"{section}.truncate", masks.truncate, "masks.truncate")
    c.choice(f"{section}.saliency", masks.saliency, "masks.saliency")
    c.require(bool(masks.specs), f"{section}.specs", "must name at least one mask")
    for i, spec in enumerate(masks.specs):
        _mask(c, f"{section}.specs.{i}", spec)


def _mask(c: _Checker, path: str, spec: MaskConfig) -> None:
    c.at_least(1, path, spec, "num_blocks", "max_keep")
    c.at_least(0, path, spec, "motion_guided_strength")
    c.interval(f"{path}.spatial_scale", spec.spatial_scale, 1.0)
    c.interval(f"{path}.temporal_scale", spec.temporal_scale, 1.0)
    c.interval(f"{path}.aspect_ratio", spec.aspect_ratio, None)
    c.positive(path, spec, "max_temporal_keep")
    c.fraction(path, spec, "max_temporal_keep", "motion_guided_random_rate")
    c.require(
        not (spec.full_complement and spec.pred_full_complement),
        f"{path}.pred_full_complement",
        "cannot be set together with full_complement",
    )


def _model(c: _Checker, model: ModelConfig) -> None:
    c.choice("model.rope_variant", model.rope_variant)
    if model.mask_token_index is not None:
        c.choice("model.mask_token_index", model.mask_token_index)
    c.at_least(
        1,
        "model",
        model,
        "embed_dim",
        "depth",
        "num_heads",
        "levels",
        "pred_embed_dim",
        "pred_depth",
        "pred_num_heads",
        "num_mask_tokens",
        "img_temporal_dim_size",
    )
    for dim, heads in (("embed_dim", "num_heads"), ("pred_embed_dim", "pred_num_heads")):
        width, number = getattr(model, dim), getattr(model, heads)
        if width is not None and number is not None and width % number:
            c.fail(f"model.{dim}", f"{width} is not a multiple of model.{heads} {number}")


def _target(c: _Checker, config: Config) -> None:
    target = config.target
    c.choice("target.mode", target.mode)
    c.require(all(0 <= m <= 1 for m in target.ema), "target.ema", f"must lie in [0, 1], got {list(target.ema)}")
    c.require(
        target.stop_gradient is not False or target.mode == "online",
        "target.stop_gradient",
        "false needs target.mode: online; no gradient passes through an EMA target",
    )


def _optimization(c: _Checker, opt: OptimizationConfig) -> None:
    c.choice("optimization.name", opt.name)
    c.at_least(1, "optimization", opt, "epochs", "ipe", "accumulate")
    c.at_least(0, "optimization", opt, "lr", "start_lr", "final_lr", "warmup", "weight_decay", "final_weight_decay")
    c.positive("optimization", opt, "ipe_scale", "eps", "clip_grad")
    c.require(all(0 <= b < 1 for b in opt.betas), "optimization.betas", f"must lie in [0, 1), got {list(opt.betas)}")


def _runtime(c: _Checker, config: Config) -> None:
    runtime = config.runtime
    c.choice("runtime.dtype", runtime.dtype)
    c.require(
        re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", runtime.device) is not None,
        "runtime.device",
        f"unknown value {runtime.device!r}; accepted: auto, cpu, cuda, cuda:N, mps",
    )
    for name, accepted in (("compile", ("auto", "blocks", "target")), ("cuda_graphs", ("auto",))):
        value = getattr(runtime, name)
        c.require(
            isinstance(value, bool) or value in accepted,
            f"runtime.{name}",
            f"unknown value {value!r}; accepted: true, false, {', '.join(accepted)}",
        )
    untruncated = any(m is not None and m.truncate == "none" for m in (config.masks, config.img_masks))
    c.require(
        runtime.compile is not True or not untruncated,
        "runtime.compile",
        "true makes a graph for every set of mask lengths under masks.truncate: none; use blocks, auto or false",
    )
    c.at_least(0, "runtime", runtime, "threads", "pad_to_multiple")
    c.positive("runtime", runtime, "peak_tflops")
    c.at_least(1, "runtime", runtime, "log_every", "save_every", "keep_checkpoints", "monitor_every")


def _warmup(c: _Checker, path: str, warmup) -> None:
    start, end = warmup
    fractions = [isinstance(v, float) for v in warmup]
    c.require(
        all(fractions) or not any(fractions),
        path,
        f"both must be integers (steps) or both decimals (fractions of the run), got {list(warmup)}",
    )
    c.require(
        0 <= start <= end and (not all(fractions) or end <= 1),
        path,
        f"must be [start, end] with 0 <= start <= end (at most 1.0 as fractions), got {list(warmup)}",
    )


def _images(c: _Checker, config: Config) -> None:
    if config.img_data is None:
        c.require(config.img_masks is None, "img_masks", "needs img_data, which is not given")
        return
    _data(c, "img_data", config.img_data)
    if config.img_masks is not None:
        _masks(c, "img_masks", config.img_masks)
    c.require(
        config.img_data.patch_size == config.data.patch_size,
        "img_data.patch_size",
        f"{config.img_data.patch_size} differs from data.patch_size {config.data.patch_size}; one encoder serves both",
    )
    if config.model.img_temporal_dim_size is not None:
        c.require(
            set(config.img_data.dataset_fpcs) == {config.model.img_temporal_dim_size},
            "img_data.dataset_fpcs",
            f"must be {config.model.img_temporal_dim_size} (model.img_temporal_dim_size), "
            f"got {list(config.img_data.dataset_fpcs)}",
        )
