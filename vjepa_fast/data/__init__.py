"""Data: manifests, decoding, augmentation, weighted mixing, batches, and synthetic suites.

Names are imported on first use, so that rendering and manifests do not pay for torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Manifest": "manifests.manifest",
    "load_manifest": "manifests.manifest",
    "read_clip": "decoders",
    "read_image": "decoders",
    "probe_video": "decoders",
    "index_of": "decoders",
    "Batch": "loader",
    "BadSamples": "bad_samples",
    "ClipGroup": "loader",
    "ClipLoader": "loader",
    "eval_clip": "views.evaluation",
    "eval_batches": "views.evaluation",
    "eval_views": "views.evaluation",
    "MixedSampler": "mixing",
    "Sampling": "sampling",
    "synthetic": "synthetic",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_HOME[name]}", __name__)
    return module if name == "synthetic" else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
