"""Features at more places than a clip has tokens, for pictures of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from vjepa_fast.models.vit import VisionTransformer

FINEST = 14  # features per side that a picture needs at least


def dense_tokens(encoder: VisionTransformer, clip: Tensor, patch: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Features ``[T*h*w, D]`` of a uint8 clip ``[1, 3, F, H, W]`` and their grid (T, h, w), h, w at least FINEST.

    The clip, its border repeated, is encoded at every shift by a fraction of a patch, and the grids are interleaved, so
    each feature is one that the encoder gives at the size it was trained at: a 4 x 4 grid becomes 16 x 16. Encoding an
    enlarged clip instead would show patches a third as large as any that it has seen.
    """
    import torch
    from torch.nn import functional

    from vjepa_fast.evaluation import encode

    height, width = clip.shape[-2:]
    steps = -(-FINEST // (min(height, width) // patch))
    shifts = [patch * i // steps for i in range(steps)]
    before = (patch - patch // steps) // 2  # so that the middle of a patch is the middle of its cell
    after = shifts[-1] - before
    frames = clip[0].permute(1, 0, 2, 3).float()
    padded = functional.pad(frames, (before, after, before, after), mode="replicate").permute(1, 0, 2, 3)[None]
    padded = padded.to(clip.dtype)
    out = None
    for i, y in enumerate(shifts):
        for j, x in enumerate(shifts):
            with torch.no_grad():
                z, (t, h, w) = encode(encoder, padded[..., y : y + height, x : x + width])
            if out is None:
                out = z.new_zeros(t, h * steps, w * steps, z.shape[-1])
            out[:, i::steps, j::steps] = z[0].reshape(t, h, w, -1)
    assert out is not None
    t, h, w, d = out.shape
    return out.reshape(-1, d), (t, h, w)
