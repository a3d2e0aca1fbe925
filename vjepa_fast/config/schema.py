"""What can be configured: one frozen dataclass per section of a recipe, each value with the constraint that it has.

Section and key names are those of the FAIR V-JEPA 2.1 YAML wherever it has them. Constraints of single values are
declared here (``fields.py``), those between values in ``checks.py``; ``load.py`` and ``convert.py`` read files and
overrides, ``fair.py`` translates published YAML.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from vjepa_fast.config.fields import (
    checked,
    choice,
    constrained,
    filled,
    flag,
    interval,
    later,
    number,
    quoted,
    ramp,
    registered,
)
from vjepa_fast.imagenet import IMAGENET_MEAN, IMAGENET_STD

TRUNCATE = ("batch", "random", "none")  # the C++ kernel numbers them in this order


@dataclass(frozen=True)
class DataConfig:
    """What is read. An entry of ``datasets`` is a manifest, a CSV of ``<path> <label>`` lines, or .tar shards."""

    datasets: tuple[str, ...] = ()
    datasets_weights: tuple[float, ...] | None = checked(  # sampling weights; None: by number of samples
        None, "at least 0 and not all 0", lambda x: all(w >= 0 for w in x) and sum(x) > 0
    )
    dataset_fpcs: tuple[int, ...] = number((16,), low=1, most=100_000)  # frames of a clip: of each dataset, or of all
    batch_size: int = number(8, low=1, most=1_000_000)  # clips per process and step
    crop_size: int = number(224, low=1, most=10_000)
    patch_size: int = number(16, low=1, most=10_000)
    tubelet_size: int = number(2, low=1, most=10_000)
    fps: int | None = number(None, low=1, most=1_000_000)  # at most one of fps, frame_sample_rate, duration
    frame_sample_rate: int | None = number(None, low=1, most=1_000_000)  # step of frames; 1 if none of the 3 is given
    duration: float | None = number(None, above=0, most=1e9)  # seconds that a clip spans
    num_workers: int = number(0, low=0, most=1000)
    pin_mem: bool = True
    max_bad_fraction: float = number(0.05, low=0, high=1)  # unreadable share of the samples above which a run stops
    cache_mb: int = number(0, low=0, most=1_000_000_000)  # memory for decoded videos, kept between epochs
    decoder: str = later(registered("decoder", "auto", "pyav"))
    corrupt: str = later(choice("refuse", "refuse", "keep"))  # frames that are damaged or painted over by the decoder
    deinterlace: bool = later(flag(False))  # of interlaced frames, fill the second field from the first
    root: str | None = later(filled(None))  # folder that relative paths of manifests start from; null: the manifest's
    root_confine: bool = later(flag(True))  # with root: refuse manifests that name a file outside of it
    max_pixels: int = later(number(64_000_000, low=1, most=10**12))  # of a picture; a larger one is a bad sample
    max_seconds: float = later(number(120.0, above=0, most=1e9))  # for reading one sample; a slower one is a bad sample
    max_clip_mb: int = later(number(2000, low=1, most=1_000_000_000))  # of a decoded clip; likewise
    # of img_data: the share of a step's batches that are images, as published; None: each batch is of both
    rank_ratio: float | None = later(number(None, above=0, below=1))


@dataclass(frozen=True)
class AugmentConfig:
    """Random resized crop and flip, one draw per clip."""

    random_resize_aspect_ratio: tuple[float, float] = interval((0.75, 1.35))
    random_resize_scale: tuple[float, float] = interval((0.3, 1.0), high=1)
    horizontal_flip: float = number(0.5, low=0, high=1)  # probability
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = number(IMAGENET_STD, above=0)


@dataclass(frozen=True)
class MaskConfig:
    """One mask: the union of ``num_blocks`` blocks is predicted, the rest is context."""

    num_blocks: int = number(8, low=1, high=(1 << 14) - 1)  # numbered by 14 bits of the random generator's counter
    spatial_scale: tuple[float, float] = interval((0.15, 0.15), high=1)  # share of the H x W tokens of a block
    temporal_scale: tuple[float, float] = interval((1.0, 1.0), high=1)  # share of the T time steps of a block
    aspect_ratio: tuple[float, float] = interval((0.75, 1.5))  # height / width
    max_temporal_keep: float = number(1.0, above=0, high=1)  # share of the time steps, from the first, with context
    max_keep: int | None = number(None, low=1, most=10**9)  # context tokens at most
    full_complement: bool = False  # predict everything that is not context after truncation
    pred_full_complement: bool = False  # context is everything that is not predicted after truncation
    inv_block: bool = False  # swap context and prediction
    motion_guided: bool = False  # origins follow the saliency
    motion_guided_strength: float = number(2.0, low=0, most=1e6)  # exponent of a block's mean saliency
    motion_guided_random_rate: float = number(0.1, low=0, high=1)  # share of uniform origins


@dataclass(frozen=True)
class MasksConfig:
    """The masks drawn of each clip, and how those of a batch get one length."""

    specs: tuple[MaskConfig, ...] = constrained(
        (MaskConfig(), MaskConfig(num_blocks=2, spatial_scale=(0.7, 0.7))),
        lambda x: None if 0 < len(x) <= 256 else f"must name at least one mask and at most 256, got {len(x)}",
    )
    truncate: str = choice("batch", *TRUNCATE)
    saliency: str = choice("trilinear", "trilinear", "area")
    strategy: str = later(registered("mask strategy", "blocks", "motion"))  # motion: guided by it in every spec
    options: dict[str, Any] = later(field(default_factory=dict))  # of strategies that take more; checked by them


@dataclass(frozen=True)
class ModelConfig:
    """Encoder and predictor."""

    model_name: str = "vit_base"
    embed_dim: int | None = number(None, low=1, most=100_000)  # these three replace the named size
    depth: int | None = number(None, low=1, most=1000)
    num_heads: int | None = number(None, low=1, most=10_000)
    levels: int = number(4, low=1, most=1000)  # encoder depths whose outputs are concatenated
    pred_embed_dim: int = number(256, low=1, most=100_000)
    pred_depth: int = number(8, low=1, most=1000)
    pred_num_heads: int = number(8, low=1, most=10_000)
    num_mask_tokens: int | None = number(None, low=1, most=100_000)  # None: one per mask (published: and dataset)
    mask_token_index: str | None = choice(None, "mask", "zero")  # one per mask, or token 0 for all (None: published)
    use_rope: bool = True
    interpolate_rope: bool = True
    rope_variant: str = choice("v2.1", "v2", "v2.1")
    use_silu: bool = False  # SwiGLU feed-forward in the encoder
    wide_silu: bool = True
    pred_use_silu: bool = False
    uniform_power: bool = True
    modality_embedding: bool = True
    img_temporal_dim_size: int | None = number(1, low=1)  # frames of the image patch embedding; None: images as video
    zero_init_mask_tokens: bool = True
    # scale of the initial weights of encoder and predictor: 0.02, or 1/sqrt(3 inputs), more where they are narrow
    init: str = later(choice("fixed", "fixed", "fan_in"))
    pred_init: str = later(choice("fixed", "fixed", "fan_in"))
    normalize_predictor: bool = False
    predict_all: bool = True  # the predictor also returns the context tokens
    use_activation_checkpointing: bool = False


@dataclass(frozen=True)
class LossConfig:
    """``context_warmup`` replaces ``objectives.context.warmup``."""

    context_warmup: tuple[int | float, int | float] | None = ramp(None)


@dataclass(frozen=True)
class TargetConfig:
    """The target encoder: an average of the online one, that itself (``online``), or another that stays as it is
    (``frozen``, as in SALT, arXiv:2509.24317).
    """

    mode: str = choice("ema", "ema", "online", "frozen")
    # of mode frozen: its weights, of a run, checkpoint, FAIR or Hugging Face file with an encoder like the run's
    path: str | None = later(filled(None))
    ema: tuple[float, float] = number((0.99925, 0.99925), low=0, high=1)  # momentum at the start and at the end
    stop_gradient: bool | None = None  # of the target; None: true under compat intended, false under published


@dataclass(frozen=True)
class LevjepaConfig:
    """``method: levjepa`` (arXiv:2608.27395).

    The global view is a crop of ``data.crop_size`` at ``data_aug.random_resize_scale``; ``data_aug.horizontal_flip`` is
    that of the local views, the aspect ratio that of all.
    """

    local_views: int = number(10, low=1, most=1000)  # of each clip
    local_crop: int = number(96, low=1, most=10_000)  # pixels of their side
    local_scale: tuple[float, float] = interval((0.02, 0.4), high=1)  # their share of the frame's area
    jitter: float = number(0.8, low=0, high=1)  # probability that a local view's colours change by the next four
    brightness: float = number(0.4, low=0, high=1)  # factors from 1 - x to 1 + x
    contrast: float = number(0.4, low=0, high=1)  # likewise, about the view's mean luma
    saturation: float = number(0.2, low=0, high=1)  # likewise
    hue: float = number(0.1, low=0, high=0.5)  # turns of the colour circle, either way
    grey: float = number(0.2, low=0, high=1)  # probability that a local view loses its colours
    attention: str = choice("block_causal", "full", "block_causal")  # block_causal: no time step sees a later one
    drop: float = number(0.95, low=0, below=1)  # share of the patch tokens that is left out in training
    proj_hidden: int = number(2048, low=1, most=1_000_000)  # width of the projector's hidden layer
    proj_dim: int = number(256, low=2, most=1_000_000)  # channels of an embedding
    sigreg: float = number(0.02, low=0)  # weight of SIGReg
    num_slices: int = number(1024, low=1, most=1_000_000)  # directions of SIGReg
    knots: int = number(17, low=2, most=100_000)  # points of its integral
    average: float = number(0.9999, low=0, below=1)  # momentum of the average of the weights, for evaluation only
    average_every: int = number(32, low=1)  # optimiser steps between its updates


@dataclass(frozen=True)
class InitConfig:
    """What a new run starts from. A run that goes on from a checkpoint of its own does not read it."""

    path: str | None = filled(None)  # weights: a run folder, checkpoint, FAIR or Hugging Face file; null: fresh ones
    predictor: str = choice("auto", "auto", "new", "required")  # auto: that of the file where it fits, else a new one
    optimizer: bool = False  # the moments of AdamW too, which makes the predictor required


@dataclass(frozen=True)
class OptimizationConfig:
    """Length of the run, schedules and optimiser."""

    epochs: int = number(100, low=1, most=10**9)
    ipe: int = number(300, low=0, most=10**9)  # iterations per epoch; 0: one pass over data.datasets
    ipe_scale: float = number(1.0, above=0, most=1e9)
    lr: float = number(6e-4, low=0)
    start_lr: float = number(1e-4, low=0)
    final_lr: float = number(6e-4, low=0)
    warmup: float = number(1.0, low=0)  # epochs
    weight_decay: float = number(0.04, low=0)
    final_weight_decay: float = number(0.04, low=0)
    betas: tuple[float, float] = number((0.9, 0.999), low=0, below=1)
    eps: float = number(1e-8, above=0)
    accumulate: int = number(1, low=1, most=1_000_000)  # micro-batches per optimiser step
    # clips of data per optimiser step of all processes: accumulate follows from it and their number; 0: not given
    global_batch: int = later(number(0, low=0, most=1_000_000_000))
    clip_grad: float | None = number(None, above=0)  # maximum gradient norm
    on_nonfinite: str = later(choice("stop", "stop", "skip"))  # steps whose loss or gradients are not finite
    max_skips: int = later(number(10, low=1))  # under skip, steps in a row after which the run stops all the same
    # skip a step whose loss is more than so many standard deviations above the mean of those before; None: off
    spike_std: float | None = later(number(None, low=0))
    spike_window: int = later(number(300, low=1, most=1_000_000))  # losses that count for it, of the last steps
    spike_after_epoch: int = later(number(50, low=-1, most=10**9))  # from 0; only later epochs have such steps
    max_spikes: int = later(number(10, low=0))  # such steps in all after which the run stops
    # of the learning rate after warmup; linear: from lr at step 0 to final_lr, no warmup (the published cooldown)
    schedule: str = later(choice("cosine", "cosine", "linear"))
    name: str = choice("adamw", "adamw", "muon")  # muon: for the matrices of the blocks; changes the maths


def _device(default: str) -> Any:
    def refusal(x: str) -> str | None:
        if re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", x):
            return None
        return f"unknown value {quoted(x)}; accepted: auto, cpu, cuda, cuda:N, mps"

    return constrained(default, refusal)


@dataclass(frozen=True)
class MonitorConfig:
    """A quick probe of the frozen target encoder while training, into the rows of metrics; it changes nothing else.

    The data are those of ``train`` and ``val``, or without them clips of ``suite`` rendered in memory.
    """

    probe: str | None = choice(None, None, "knn", "linear")  # None: off
    every: int = number(500, low=1)  # steps
    train: str | None = None  # manifest that the probe is fitted on
    val: str | None = None  # manifest that its accuracy is measured on
    suite: str = registered("synthetic suite", "motion8", "objects")
    clips: int = number(256, low=4)  # of each part at most, as many of every class


@dataclass(frozen=True)
class RuntimeConfig:
    """Device, precision, logging and checkpoints."""

    device: str = _device("auto")
    dtype: str = choice(
        "auto", "auto", "float32", "bfloat16", "float16"
    )  # auto on a CPU: the faster one, by a measurement
    fp8: bool = False  # forward products of the blocks' linear layers in e4m3 (changes the maths)
    threads: int = number(0, low=0, most=1000)  # CPU threads; 0: torch's choice
    log_every: int = number(10, low=1)  # steps
    save_every: int = number(500, low=1)  # steps
    keep_checkpoints: int = number(2, low=1, most=1_000_000)
    # checkpoints are written while training goes on, from a copy in memory; auto: where half the free memory holds it
    async_save: bool | str = later(choice("auto", True, False, "auto"))
    monitor_every: int = number(100, low=1)  # steps between collapse monitors
    # of several processes: each has all weights, or they are cut over them (FSDP2), for what one cannot hold
    parallel: str = later(choice("ddp", "ddp", "fsdp"))
    # of several processes: seconds of silence, or without a step while others wait, after which one counts as gone
    timeout: float = later(number(600.0, above=0))
    attention: str = registered("attention backend", "auto", "sdpa", "varlen", "xformers")
    pad_to_multiple: int = number(0, low=0, most=1_000_000)  # the former name of capacity_quantum; 0: not given
    # tokens; masks get room for a multiple of so many, so that shapes repeat. 0: room for their tokens, no more
    capacity_quantum: int | str = later(
        checked("auto", "auto or a number of tokens, at least 0", lambda x: x == "auto" or (x != str(x) and x >= 0))
    )
    compile: bool | str = choice("auto", True, False, "auto", "blocks", "target")
    cuda_graphs: bool | str = choice("auto", True, False, "auto", "target")  # of the whole step; or of the target
    # blocks whose passes over memory are merged (CUDA, 16 bits), and who makes their products; auto: the fastest
    epilogues: bool | str = later(choice("auto", False, "auto", "triton", "quack", "torch"))
    tensorboard: bool = True
    logger: str | None = later(choice(None, None, "tensorboard", "wandb", "mlflow"))  # gets the rows of metrics too
    peak_tflops: float | None = number(None, above=0)  # of the device, for MFU; None: by name, a CPU is measured


@dataclass(frozen=True)
class Config:
    """Everything that one run depends on."""

    data: DataConfig = field(default_factory=DataConfig)
    data_aug: AugmentConfig = field(default_factory=AugmentConfig)
    masks: MasksConfig = field(default_factory=MasksConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: str = later(choice("vjepa", "vjepa", "levjepa"))
    levjepa: LevjepaConfig = later(field(default_factory=LevjepaConfig))
    objectives: dict[str, dict[str, Any]] = filled(
        {"pred": {}, "context": {"coeff": 0.5}}, "no term is named; 'pred: {}' is the prediction loss"
    )
    loss: LossConfig = field(default_factory=LossConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    init: InitConfig = later(field(default_factory=InitConfig))
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    monitor: MonitorConfig = later(field(default_factory=MonitorConfig))
    img_data: DataConfig | None = None  # a second stream of still images
    img_masks: MasksConfig | None = None
    compat: str = choice("intended", "intended", "published")
    seed: int = number(239, low=0, high=(1 << 64) - 1)
    folder: str = filled("runs/train")
