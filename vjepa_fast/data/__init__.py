"""Data: manifests, decoding, augmentation, weighted mixing, batches, and synthetic suites.

Names are imported on first use, so that rendering and manifests do not pay for torch.
"""
from importlib import import_module

_HOME = {
    "Manifest": "manifest", "load_manifest": "manifest",
    "read_clip": "decode_pyav", "read_image": "decode_pyav", "probe_video": "decode_pyav",
    "Batch": "loader", "BadSamples": "bad", "ClipGroup": "loader", "ClipLoader": "loader",
    "eval_clip": "evalview", "eval_batches": "evalview", "eval_views": "evalview",
    "MixedSampler": "mixing", "Sampling": "decode_pyav", "synthetic": "synthetic",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_HOME[name]}", __name__)
    return module if name == "synthetic" else getattr(module, name)


def __dir__():
    return __all__
