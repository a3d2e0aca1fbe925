"""What ``vjepa-fast bench step`` can time: providers, recipes, and the configuration of a case. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from vjepa_fast import config
from vjepa_fast.config import Config
from vjepa_fast.errors import ConfigError

PROVIDERS = {
    "vjepa_fast": "ours as configured",
    "vjepa_fast_compiled": "ours with runtime.compile: blocks, which is what auto takes on CUDA",
    "reference": "the published algorithm without activation checkpointing",
    "reference_compiled": "its encoder, predictor and target under torch.compile",
    "reference_checkpointed": "with activation checkpointing, as published",
}
LIMITED = ("reference_compiled",)  # in a process of their own, for --limit-s seconds: nobody knows what they may take
SHAPES = {
    "new": "mask shapes that came at no step before, as training meets them",
    "repeated": "a few steps again and again, whose shapes the warm-up has seen",
}
RECIPE = "mixed_4gpu_fwm_hw_ld"  # the published headline
ONE_PER_KIND = ("baseline", "motion_guided", "ld", "fwm_hw_ld", "kinematic", "spectral", "hamiltonian")
SMALL = ("model.model_name=vit_tiny", "data.crop_size=112", "data.dataset_fpcs=[16]", "data.batch_size=4")
FIXED = (
    "data.datasets=[]",
    "data.datasets_weights=null",
    "loss.context_warmup=[0,0]",
    "runtime.device=cpu",
    "model.use_activation_checkpointing=false",
    "runtime.dtype=float32",
    "runtime.tensorboard=false",
)


class Figure(NamedTuple):
    """What others have reported: clips per second of one GPU."""

    device: str
    clips_per_s: float


@dataclass(frozen=True)
class Public:
    """A shape of which figures of others are known; a row each stands beside the measured ones.

    Encoder, predictor, clip and batch are as theirs; masks and objective those of ``recipe``, whose four levels and
    context loss are a little more work.
    """

    overrides: tuple[str, ...]
    figures: tuple[Figure, ...]
    source: str
    recipe: str = "mixed_4gpu_baseline"


_PUBLIC = (
    "model.pred_embed_dim=384",
    "model.pred_depth=12",
    "model.pred_num_heads=12",
    "data.dataset_fpcs=[16]",
    "data.batch_size=24",
)
PUBLIC = {
    "vit_g_256": Public(
        ("model.model_name=vit_giant_xformers", "data.crop_size=256", *_PUBLIC),
        (Figure("NVIDIA H200", 14.0),),
        "public V-JEPA 2 training run, ViT-g/16, 256 px, 16 frames, batch 24 per GPU; taken over as reported, not "
        "measured here",
    ),
    "vit_h_224": Public(
        ("model.model_name=vit_huge", "data.crop_size=224", *_PUBLIC),
        (Figure("NVIDIA H100", 46.8), Figure("NVIDIA H200", 52.0)),
        "public V-JEPA training runs, ViT-H/16, 224 px; taken over as reported, not measured here. Their batch is not "
        "known: 16 frames and 24 clips are those of the published ViT-H configuration",
    ),
}


class Case(NamedTuple):
    """One configuration to measure. ``public``: its name in `PUBLIC`, where it is one."""

    recipe: str
    cfg: Config
    public: str | None = None


def config_of(
    recipe: str = RECIPE,
    overrides: Iterable[str] = (),
    *,
    full_size: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
    threads: int = 0,
    batch: int | None = None,
) -> Config:
    """The configuration of a case: the recipe, made small unless ``full_size``, then ``overrides``.

    ``dtype``: float32 on a CPU and bfloat16 on CUDA where none is given. Raises ConfigError for another method than
    V-JEPA.
    """
    if (method := config.load(recipe).method) != "vjepa":
        raise ConfigError(
            f"--recipe {recipe}: method: {method} has no reference to be timed against; "
            "vjepa-fast train --profile N times it"
        )
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    runtime = [f"runtime.device={device}", f"runtime.dtype={dtype}", f"runtime.threads={threads}"]
    size = [] if batch is None else [f"data.batch_size={batch}"]
    return config.load(recipe, [*FIXED, *(() if full_size else SMALL), *runtime, *overrides, *size])


def full_name(name: str) -> str:
    """``ld`` is ``mixed_4gpu_ld``, ``kinematic``, which was published on UCF-101 alone, ``ucf101_4gpu_kinematic``."""
    known = config.list_recipes()
    return next((full for full in (name, f"mixed_4gpu_{name}", f"ucf101_4gpu_{name}") if full in known), name)


def public_case(name: str, overrides: Iterable[str] = (), **options) -> Case:
    """The case ``name`` of `PUBLIC`; ``options`` are those of `config_of`."""
    public = PUBLIC[name]
    return Case(
        public.recipe, config_of(public.recipe, [*public.overrides, *overrides], full_size=True, **options), name
    )
