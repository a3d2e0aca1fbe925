"""Pretraining: `train` a `Config`, `check` it without training; `TrainStep` is one step for other loops."""

from importlib import import_module

_HOME = {
    "TrainResult": "trainer",
    "TrainStep": "step",
    "Trainer": "trainer",
    "check": "preflight",
    "check_data": "preflight",
    "train": "trainer",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
