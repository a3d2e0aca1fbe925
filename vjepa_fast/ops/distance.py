"""Distance from each context token to the nearest predicted one.

Legend: B batch, Ke context tokens, Kp predicted tokens, grid (T,H,W), N = T*H*W, token index n = (t*H+h)*W+w.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.ops import _backend, _check, _cpp, _triton

_FAR = 1e12  # squared distance of "no predicted token seen yet"; squares of real ones are exact in float32


def mask_distance(masks_enc: Tensor, masks_pred: Tensor, grid: Sequence[int], offset: bool = False) -> Tensor:
    """Square root of the Euclidean distance from each context token to the nearest predicted token of its sample.

    The weight of the context loss is the reciprocal of this (V-JEPA 2.1 as used by arXiv:2605.17165). Positions are the
    integer (t, h, w) of the token grid; a context token that is itself predicted has distance 0.

    Args:
        masks_enc: int64 [B,Ke], token indices of the context; Ke may be 0.
        masks_pred: int64 [B,Kp], token indices predicted, Kp >= 1.
        grid: (T, H, W) of the tokens.
        offset: divide the distance by max(1, side // 16), side = max(H, W), before the root, so that large pictures
            weigh as small ones.

    Returns:
        float32 [B,Ke]. No gradient. Backends agree to the rounding of the roots.

    Raises:
        ValueError: wrong dtype or shape, an empty ``masks_pred``, or an index outside the grid (looked for on the CPU,
            elsewhere under VJEPA_FAST_DEBUG=1).

    Floor: both masks read once, the result written once.
    """
    op = "mask_distance"
    t, h, w = _check.grid(op, grid)
    _check.indices(op, "masks_enc", masks_enc)
    _check.indices(op, "masks_pred", masks_pred, batch=masks_enc.shape[0])
    _check.require(masks_pred.shape[1] > 0, op, "masks_pred", "at least one predicted token", masks_pred)
    same = masks_pred.device == masks_enc.device
    _check.require(same, op, "masks_pred", f"device {masks_enc.device}", masks_pred.device)
    return _mask_distance(masks_enc, masks_pred, t, h, w, max(1, max(h, w) // 16) if offset else 1)


@torch.library.custom_op("vjepa_fast::mask_distance", mutates_args=())
def _mask_distance(masks_enc: Tensor, masks_pred: Tensor, t: int, h: int, w: int, divisor: int) -> Tensor:
    for name, idx in (("masks_enc", masks_enc), ("masks_pred", masks_pred)):
        _check.in_range("mask_distance", name, idx, t * h * w)
    return _backend.call("mask_distance", masks_enc, masks_pred, t, h, w, divisor)


@_mask_distance.register_fake
def _(masks_enc: Tensor, *_: Any) -> Tensor:
    return masks_enc.new_empty(masks_enc.shape, dtype=torch.float32)


@_backend.register("mask_distance", "eager")
def _eager(masks_enc: Tensor, masks_pred: Tensor, t: int, h: int, w: int, divisor: int) -> Tensor:
    """Exact distance transform: squared distances separate over the axes, so take the minimum along one at a time."""
    d_BN = torch.full((masks_enc.shape[0], t * h * w), _FAR, dtype=torch.float32, device=masks_enc.device)
    d = d_BN.scatter_(1, masks_pred, 0.0).view(-1, t, h, w)
    for axis, size in ((1, t), (2, h), (3, w)):
        i = torch.arange(size, device=d.device, dtype=torch.float32)
        step = (i[:, None] - i).square()  # [to, from]
        d = (d.movedim(axis, -1)[..., None, :] + step).amin(-1).movedim(-1, axis)
    return d.reshape(-1, t * h * w).gather(1, masks_enc).sqrt().div(divisor).sqrt()


@_backend.register("mask_distance", "cpp", lambda *args: _cpp.objections(*args[:2]))
def _cpp_kernel(masks_enc: Tensor, masks_pred: Tensor, *args: int) -> Tensor:
    return torch.ops.vjepa_fast_cpp.mask_distance(masks_enc, masks_pred, *args)


@_backend.register("mask_distance", "triton", lambda *args: _triton.objections(*args[:2]))
def _triton_kernel(masks_enc: Tensor, masks_pred: Tensor, t: int, h: int, w: int, divisor: int) -> Tensor:
    return _triton.launch("distance", "mask_distance", masks_enc, masks_enc, masks_pred, (t, h, w), divisor)
