"""The motion map that guides the origins of a clip's blocks."""

from __future__ import annotations

from vjepa_fast.ops.saliency import motion_saliency


def guide(specs, clip, grid, mean, std, mode: str, compat: str):
    """``[B,T,H,W]`` map of ``clip``, or None where no spec is guided or a single frame shows no motion.

    ``compat: published`` uses the released code's normalisation, which raises ConfigError unless B is 1 or T.
    """
    if clip.shape[2] == 1 or not any(spec.motion_guided for spec in specs):
        return None
    normalize = "published" if compat == "published" else "sample"
    return motion_saliency(clip, grid, mean, std, mode=mode, normalize=normalize)
