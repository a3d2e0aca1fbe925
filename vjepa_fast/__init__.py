"""Video-JEPA pretraining, frozen evaluation and few-shot recognition.

Importing the package costs milliseconds: torch comes with the first use of a submodule or of a name below.
"""

from typing import Any

__version__ = "0.1.0"

_SUBMODULES = (
    "bench",
    "config",
    "data",
    "errors",
    "evaluation",
    "export",
    "kernels",
    "layers",
    "masks",
    "metrics",
    "models",
    "objectives",
    "ops",
    "reference",
    "study",
    "trainer",
)
_NAMES = {
    "load_encoder": ("models", "load_encoder"),
    "build_encoder": ("models", "build_encoder"),
    "build_predictor": ("models", "build_predictor"),
    "features": ("evaluation", "video_features"),
}


def _source_tree():
    # In a checkout vjepa_fast.kernels lies beside this package, in ../kernels (a wheel puts it in place). This lets
    # PYTHONPATH=., `python -m pytest` and every kind of editable install find it.
    import os

    here = os.path.dirname(os.path.abspath(__file__))
    root = os.path.dirname(here)
    beside = os.path.isfile(os.path.join(root, "kernels", "__init__.py"))
    if beside and not os.path.isdir(os.path.join(here, "kernels")):
        __path__.append(root)


_source_tree()
del _source_tree

from vjepa_fast import _moved  # noqa: E402, F401 (names of 0.1.0)


def __getattr__(name: str) -> Any:
    import importlib

    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _NAMES:
        room, its_name = _NAMES[name]
        value = getattr(importlib.import_module(f"{__name__}.{room}"), its_name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_SUBMODULES, *_NAMES})
