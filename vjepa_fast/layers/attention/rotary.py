"""A backend applied to packed queries, keys and values with their rotary positions.

Legend: B batch, K tokens, E embed_dim, H heads, d channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vjepa_fast import ops
from vjepa_fast.layers.attention.base import Backend, Segments


def applied(
    backend: Backend, qkv_BK3E: Tensor, rope: Tensor | None, num_heads: int, segments: Segments, keep: bool = False
) -> Tensor:
    """Attention [B,K,E] of ``qkv`` rotated by ``rope`` (of `attend`); by the backend itself where it can do so.

    Without autograd ``qkv`` is rotated where it lies, unless it is to ``keep`` its values.
    """
    if backend.takes_rope and (rope is None or not rope.is_complex()):
        return backend.packed(qkv_BK3E, rope, num_heads, segments)
    if rope is not None and not rope.is_complex():
        rotate = ops.rope3d if keep or torch.is_grad_enabled() else ops.rope3d_
        qkv_BK3E, rope = rotate(qkv_BK3E, rope, num_heads), None
    # Taken apart along their own axis: so the gradients of q, k and v come together packed, without another copy.
    qkv = qkv_BK3E.unflatten(-1, (3, num_heads, -1))
    if rope is None:
        q, k, v = qkv.unbind(2)
    else:
        qk, v = qkv.split((2, 1), 2)
        q, k = turned(qk, rope).unbind(2)
        v = v.squeeze(2)
    return backend(q, k, v, segments).flatten(2)


def turned(qk_BK2Hd: Tensor, rotor: Tensor) -> Tensor:
    """Rotate channel pairs as complex numbers: one pass, where the real form in PyTorch takes five."""
    dtype = qk_BK2Hd.dtype
    x = qk_BK2Hd if dtype in (torch.float32, torch.float64) else qk_BK2Hd.float()
    x = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotor[..., None, None, :]
    return torch.view_as_real(x).flatten(-2).to(dtype)
