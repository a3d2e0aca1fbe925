"""Configuration: frozen dataclasses, YAML recipes, overrides, and the published (FAIR) YAML.

``load("mixed_4gpu_fwm_hw_ld", ["optimization.lr=3e-4"])`` gives a checked `Config`. Standard library only; PyYAML is
imported when a file is read.
"""

from vjepa_fast.config.convert import from_dict, to_dict
from vjepa_fast.config.given import Given
from vjepa_fast.config.load import dump_yaml, list_recipes, load, recipe_path
from vjepa_fast.config.schema import (
    AugmentConfig,
    Config,
    DataConfig,
    LevjepaConfig,
    LossConfig,
    MaskConfig,
    MasksConfig,
    ModelConfig,
    OptimizationConfig,
    RuntimeConfig,
    TargetConfig,
)

__all__ = [
    "AugmentConfig",
    "Config",
    "DataConfig",
    "Given",
    "LevjepaConfig",
    "LossConfig",
    "MaskConfig",
    "MasksConfig",
    "ModelConfig",
    "OptimizationConfig",
    "RuntimeConfig",
    "TargetConfig",
    "dump_yaml",
    "from_dict",
    "list_recipes",
    "load",
    "recipe_path",
    "to_dict",
]
