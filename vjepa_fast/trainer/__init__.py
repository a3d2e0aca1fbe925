"""Pretraining: `train` runs it from a `Config`; `TrainStep` is one step for other loops."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vjepa_fast.trainer.step import TrainStep
    from vjepa_fast.trainer.trainer import Trainer, TrainResult, train

__all__ = ["TrainResult", "TrainStep", "Trainer", "train"]
_HOME = {"TrainStep": "step"}  # the others are in trainer.py; all are imported on first use


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f".{_HOME.get(name, 'trainer')}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
