"""What can be configured: one frozen dataclass per section of a recipe.

Section and key names are those of the FAIR V-JEPA 2.1 YAML wherever it has them. Loading, overrides and checks live in
``load.py``, ``convert.py`` and ``checks.py``; the translation of published YAML in ``fair.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vjepa_fast.imagenet import IMAGENET_MEAN, IMAGENET_STD

# A key that came after configurations were saved and hashed: `to_dict` leaves it out at its default, so that run
# folders, checkpoints and study cells written before it still match.
LATER = {"later": True}


@dataclass(frozen=True)
class DataConfig:
    """What is read. One entry of ``datasets`` is a manifest: a CSV of ``<path> <label>`` lines."""

    datasets: tuple[str, ...] = ()
    datasets_weights: tuple[float, ...] | None = None  # sampling weights; None: by number of samples
    dataset_fpcs: tuple[int, ...] = (16,)  # frames per clip of each dataset; one value serves all
    batch_size: int = 8  # clips per process and step
    crop_size: int = 224
    patch_size: int = 16
    tubelet_size: int = 2
    fps: int | None = None  # at most one of fps, frame_sample_rate, duration
    frame_sample_rate: int | None = None  # step between frames; 1 if none of the three is given
    duration: float | None = None  # seconds that a clip spans
    num_workers: int = 0
    pin_mem: bool = True
    max_bad_fraction: float = 0.05  # unreadable share of the samples tried above which a run stops
    cache_mb: int = 0  # memory for decoded source clips kept between epochs (small videos); 0: none
    # auto | pyav | the name of another registered decoder
    decoder: str = field(default="auto", metadata=LATER)


@dataclass(frozen=True)
class AugmentConfig:
    """Random resized crop and flip, one draw per clip."""

    random_resize_aspect_ratio: tuple[float, float] = (0.75, 1.35)
    random_resize_scale: tuple[float, float] = (0.3, 1.0)
    horizontal_flip: float = 0.5  # probability
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


@dataclass(frozen=True)
class MaskConfig:
    """One mask: the union of ``num_blocks`` blocks is predicted, the rest is context."""

    num_blocks: int = 8
    spatial_scale: tuple[float, float] = (0.15, 0.15)
    temporal_scale: tuple[float, float] = (1.0, 1.0)
    aspect_ratio: tuple[float, float] = (0.75, 1.5)
    max_temporal_keep: float = 1.0
    max_keep: int | None = None
    full_complement: bool = False
    pred_full_complement: bool = False
    inv_block: bool = False
    motion_guided: bool = False
    motion_guided_strength: float = 2.0
    motion_guided_random_rate: float = 0.1


@dataclass(frozen=True)
class MasksConfig:
    specs: tuple[MaskConfig, ...] = (MaskConfig(), MaskConfig(num_blocks=2, spatial_scale=(0.7, 0.7)))
    truncate: str = "batch"  # batch | random | none
    saliency: str = "trilinear"  # trilinear | area
    # blocks (guided by motion where a spec says so) | motion (all specs are guided) | another registered strategy
    strategy: str = field(default="blocks", metadata=LATER)
    # what another strategy takes; it checks them itself
    options: dict[str, Any] = field(default_factory=dict, metadata=LATER)


@dataclass(frozen=True)
class ModelConfig:
    model_name: str = "vit_base"
    embed_dim: int | None = None  # these three replace the named size
    depth: int | None = None
    num_heads: int | None = None
    levels: int = 4  # encoder depths whose outputs are concatenated
    pred_embed_dim: int = 256
    pred_depth: int = 8
    pred_num_heads: int = 8
    num_mask_tokens: int | None = None  # None: one per mask; under compat published, masks x datasets
    mask_token_index: str | None = None  # mask: one token per mask; zero: token 0 for all; None: zero under published
    use_rope: bool = True
    interpolate_rope: bool = True
    rope_variant: str = "v2.1"  # v2 | v2.1
    use_silu: bool = False  # SwiGLU feed-forward in the encoder
    wide_silu: bool = True
    pred_use_silu: bool = False
    uniform_power: bool = True
    modality_embedding: bool = True
    img_temporal_dim_size: int | None = 1  # temporal size of the image patch embedding; None: images pass as video
    zero_init_mask_tokens: bool = True
    normalize_predictor: bool = False
    predict_all: bool = True  # the predictor also returns the context tokens
    use_activation_checkpointing: bool = False


@dataclass(frozen=True)
class LossConfig:
    """``context_warmup`` replaces ``objectives.context.warmup``: ints are steps, floats fractions of the run."""

    context_warmup: tuple[int | float, int | float] | None = None


@dataclass(frozen=True)
class TargetConfig:
    mode: str = "ema"  # ema | online (the online encoder is the target)
    ema: tuple[float, float] = (0.99925, 0.99925)  # momentum at the start and at the end
    stop_gradient: bool | None = None  # online only; None: as DESIGN 4.2 has it for each compat mode


@dataclass(frozen=True)
class OptimizationConfig:
    epochs: int = 100
    ipe: int = 300  # iterations per epoch
    ipe_scale: float = 1.0
    lr: float = 6e-4
    start_lr: float = 1e-4
    final_lr: float = 6e-4
    warmup: float = 1.0  # epochs
    weight_decay: float = 0.04
    final_weight_decay: float = 0.04
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    accumulate: int = 1  # micro-batches per optimiser step
    clip_grad: float | None = None  # maximum gradient norm
    name: str = "adamw"  # adamw | muon (for the matrices of the blocks; changes the maths)


@dataclass(frozen=True)
class RuntimeConfig:
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    dtype: str = "auto"  # auto | float32 | bfloat16; auto on a CPU: the faster one, by a short measurement
    fp8: bool = False  # forward products of the blocks' linear layers in e4m3 (changes the maths)
    threads: int = 0  # CPU threads; 0: torch's choice
    log_every: int = 10  # steps
    save_every: int = 500  # steps
    keep_checkpoints: int = 2
    monitor_every: int = 100  # steps between collapse monitors
    attention: str = "auto"  # auto | sdpa | varlen | xformers
    pad_to_multiple: int = 0  # pad the streams of context encoder and predictor to a multiple of so many tokens; 0: no
    compile: bool | str = "auto"  # auto | true | false | blocks | target
    cuda_graphs: bool | str = "auto"  # of the target encoder: auto | true | false
    tensorboard: bool = True
    peak_tflops: float | None = None  # of the device, for MFU; None: known GPUs by name, a CPU is measured


@dataclass(frozen=True)
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    data_aug: AugmentConfig = field(default_factory=AugmentConfig)
    masks: MasksConfig = field(default_factory=MasksConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objectives: dict[str, dict] = field(default_factory=lambda: {"pred": {}, "context": {"coeff": 0.5}})
    loss: LossConfig = field(default_factory=LossConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    img_data: DataConfig | None = None  # a second stream of still images
    img_masks: MasksConfig | None = None
    compat: str = "intended"  # intended | published
    seed: int = 239
    folder: str = "runs/train"
