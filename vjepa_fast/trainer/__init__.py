"""Pretraining: `train` a `Config`, `check` it without training; `TrainStep` is one step for other loops."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vjepa_fast.trainer.preflight import check, check_data
    from vjepa_fast.trainer.step import TrainStep
    from vjepa_fast.trainer.trainer import Trainer, TrainResult, train

__all__ = ["TrainResult", "TrainStep", "Trainer", "check", "check_data", "train"]
# the others are in trainer.py; all are imported on first use
_HOME = {"TrainStep": "step", "check": "preflight", "check_data": "preflight"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f".{_HOME.get(name, 'trainer')}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
