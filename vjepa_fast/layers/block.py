"""Transformer block, with attention through one seam (``attend``).

Legend: B batch, K tokens, E embed_dim, H heads, d = E/H channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vjepa_fast import ops
from vjepa_fast.layers import fused_block, segments
from vjepa_fast.layers.linear import Linear


def attend(
    qkv_BK3E: torch.Tensor, rope: torch.Tensor | None, num_heads: int, lengths: Sequence[int] | None = None
) -> torch.Tensor:
    """Softmax attention over the K tokens of each sample, q and k rotated by ``rope`` -> [B,K,E] of qkv's dtype.

    ``rope``: None, or the rows of ``rope.rope_table`` of these tokens, with or without a leading B. ``lengths``: of
    segments along K that attend within themselves; None: all tokens attend to all.
    """
    if rope is not None and not rope.is_complex():
        # Nothing else holds qkv, so without autograd it can be turned where it lies.
        rotate = ops.rope3d if torch.is_grad_enabled() else ops.rope3d_
        qkv_BK3E, rope = rotate(qkv_BK3E, rope, num_heads), None
    # Taken apart along their own axis: so the gradients of q, k and v come together packed, without another copy.
    qkv = qkv_BK3E.unflatten(-1, (3, num_heads, -1))
    if rope is None:
        parts = qkv.unbind(2)
    else:
        qk, v = qkv.split((2, 1), 2)
        parts = (*_turn(qk, rope).unbind(2), v.squeeze(2))
    return segments.attention(*parts, lengths).flatten(2)


def _turn(qk_BK2Hd: torch.Tensor, rotor: torch.Tensor) -> torch.Tensor:
    """Rotate channel pairs as complex numbers: one pass, where the real form in PyTorch takes five."""
    dtype = qk_BK2Hd.dtype
    x = qk_BK2Hd if dtype in (torch.float32, torch.float64) else qk_BK2Hd.float()
    x = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotor[..., None, None, :]
    return torch.view_as_real(x).flatten(-2).to(dtype)


class Attention(nn.Module):
    """Multi-head self-attention with packed ``qkv``; parameter names are FAIR's."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(
        self, x_BKE: torch.Tensor, rope: torch.Tensor | None, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        return self.proj(attend(self.qkv(x_BKE), rope, self.num_heads, lengths))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    @property
    def last(self) -> nn.Linear:
        return self.fc2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1.gelu(x))


class SwiGLU(nn.Module):
    """Gated feed-forward; ``wide`` shrinks the hidden width to 2/3, rounded up to a multiple of 8, as FAIR does."""

    def __init__(self, dim: int, hidden: int, wide: bool):
        super().__init__()
        if wide:
            hidden = -(-int(2 * hidden / 3) // 8) * 8
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(dim, hidden)
        self.fc3 = Linear(hidden, dim)

    @property
    def last(self) -> nn.Linear:
        return self.fc3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc3(F.silu(self.fc1(x)) * self.fc2(x))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, use_silu: bool, wide_silu: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = int(dim * mlp_ratio)
        self.mlp = SwiGLU(dim, hidden, wide_silu) if use_silu else MLP(dim, hidden)

    def forward(
        self, x_BKE: torch.Tensor, rope: torch.Tensor | None, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        plain = type(self.mlp) is MLP and type(self.attn) is Attention
        if plain and fused_block.serves(x_BKE, rope) and fused_block.fits(self):
            return fused_block.apply(self, x_BKE, rope, lengths)
        x_BKE = x_BKE + self.attn(self.norm1(x_BKE), rope, lengths)
        return x_BKE + self.mlp(self.norm2(x_BKE))


def run_block(
    block: Block,
    x_BKE: torch.Tensor,
    rope: torch.Tensor | None,
    recompute: bool,
    lengths: Sequence[int] | None = None,
) -> torch.Tensor:
    """One block; with ``recompute`` its activations are recomputed in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x_BKE, rope, lengths, use_reentrant=False)
    return block(x_BKE, rope, lengths)


@torch.no_grad()
def init_weights(module: nn.Module, blocks: nn.ModuleList, std: float = 0.02) -> None:
    """Truncated normal weights, zero biases; block i (from 1) divides attn.proj and its last MLP weight by sqrt(2i)."""
    for m in module.modules():
        if isinstance(m, nn.Linear | nn.Conv3d):
            nn.init.trunc_normal_(m.weight, std=std)
            nn.init.zeros_(m.bias)
    for i, block in enumerate(blocks, start=1):
        block.attn.proj.weight.div_((2.0 * i) ** 0.5)
        block.mlp.last.weight.div_((2.0 * i) ** 0.5)
