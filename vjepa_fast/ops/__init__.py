"""Public operators; each picks a backend (eager, cpp, triton) and can say why."""
_NAMES = {
    "BlockMasks": "block_masks", "BlockSpec": "block_masks", "sample_block_masks": "block_masks",
    "motion_saliency": "saliency",
    "mask_distance": "distance", "tubelet_patchify": "patchify", "patch_mean": "patchify",
    "normalize_clip": "patchify", "rope3d": "rope", "target_norm": "norm",
    "use_backend": "_backend", "backend_report": "_backend",
}
__all__ = sorted(_NAMES)


def __getattr__(name):
    import importlib

    if name in _NAMES:
        value = getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
