"""What ``vjepa-fast bench step`` can time: providers, recipes, and the configuration of a case. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from vjepa_fast import config
from vjepa_fast.config import Config

PROVIDERS = {
    "vjepa_fast": "ours as configured",
    "vjepa_fast_compiled": "ours with runtime.compile: blocks, which is what auto takes on CUDA",
    "reference": "the published algorithm without activation checkpointing",
    "reference_compiled": "its encoder, predictor and target under torch.compile",
    "reference_checkpointed": "with activation checkpointing, as published",
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

    ``dtype``: float32 on a CPU and bfloat16 on CUDA where none is given.
    """
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    runtime = [f"runtime.device={device}", f"runtime.dtype={dtype}", f"runtime.threads={threads}"]
    size = [] if batch is None else [f"data.batch_size={batch}"]
    return config.load(recipe, [*FIXED, *(() if full_size else SMALL), *runtime, *overrides, *size])


def full_name(name: str) -> str:
    """``ld`` is ``mixed_4gpu_ld``, ``kinematic``, which was published on UCF-101 alone, ``ucf101_4gpu_kinematic``."""
    known = config.list_recipes()
    return next((full for full in (name, f"mixed_4gpu_{name}", f"ucf101_4gpu_{name}") if full in known), name)
