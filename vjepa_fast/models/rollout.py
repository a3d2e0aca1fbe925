"""Attention rollout: which tokens of a clip an encoder's output is made of, by its attention weights alone.

Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (arXiv:2005.00928), section 3. The weights are computed
here from q and k of every block, as plain matrix products; the encoder itself runs as ever.

Legend: B clips, K tokens (N of the grid (T,H,W), and a class token where there is one), C channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vjepa_fast import ops
from vjepa_fast.layers.attention import FrameCausal
from vjepa_fast.models.vit import VisionTransformer

_ROWS = 1024  # queries whose weights are in memory at once


@torch.no_grad()
def attention_rollout(encoder: VisionTransformer, clip: Tensor) -> Tensor:
    """How much of the output comes from each token, by rollout: the share of each in the mean of all output tokens, or
    in the class token where the encoder has one.

    A block mixes tokens by (A + I) / 2, A being its weights, mean over heads; I is the residual connection. The product
    of all blocks is applied to the row of the output that is asked for, from the last block to the first, so no matrix
    of all tokens by all tokens is kept.

    Args:
        encoder: as it is; blocks must have been called one by one (no 16-bit autocast on CUDA).
        clip: [B,3,F,height,width], uint8, or normalised float.

    Returns:
        float32 [B,T,H,W]; the numbers of a clip add up to 1.

    Raises:
        RuntimeError: the blocks were not called one by one.
    """
    seen: list[tuple[nn.Module, Tensor, Any]] = []

    def keep(block: nn.Module, args: tuple[Any, ...]) -> None:
        x, rope, lengths = args
        seen.append((block, rotated(block, x, rope), lengths))

    hooks = [block.register_forward_pre_hook(keep) for block in encoder.blocks]
    try:
        encoder(clip, hierarchical=False)
    finally:
        for hook in hooks:
            hook.remove()
    if [block for block, _, _ in seen] != list(encoder.blocks):
        raise RuntimeError("attention_rollout: the encoder's blocks were fused; call it in float32")
    qk = seen[-1][1]
    row = torch.zeros(qk.shape[0], 1, qk.shape[3], device=qk.device)
    if encoder.cls_token is None:
        row += 1.0 / row.shape[2]
    else:
        row[..., 0] = 1.0
    for _, qk, lengths in reversed(seen):
        row = (row + _mixed(row, qk, lengths)) / 2
    row = row[:, 0] if encoder.cls_token is None else row[:, 0, 1:] / row[:, 0, 1:].sum(1, keepdim=True)
    return row.unflatten(1, encoder.grid(clip.shape))


def rotated(block: Any, x: Tensor, rope: Tensor | None) -> Tensor:
    """Queries and keys of a block's input [B,K,E], rotated by their positions: float32 [2,B,heads,K,C]."""
    heads = block.attn.num_heads
    qkv = block.attn.qkv(block.norm1(x)).float()
    if rope is not None:
        qkv = ops.rope3d(qkv, rope, heads)
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)[:2]


def attention_weights(qk: Tensor, lengths: Any, rows: slice = slice(None)) -> Tensor:
    """Softmax of q k' / sqrt(C) for the queries ``rows`` of `rotated`: [B,heads,rows,K]."""
    q, k = qk.unbind(0)
    scores = q[:, :, rows] @ k.mT / k.shape[-1] ** 0.5
    if isinstance(lengths, FrameCausal):
        scores = scores.masked_fill(~lengths.seen[:, :, rows], -torch.inf)
    return scores.softmax(-1)


def _mixed(row: Tensor, qk: Tensor, lengths: Any) -> Tensor:
    """``row`` [B,1,K] times the weights of a block, mean over heads."""
    out = torch.zeros_like(row)
    for first in range(0, row.shape[2], _ROWS):
        rows = slice(first, first + _ROWS)
        out += row[:, :, rows] @ attention_weights(qk, lengths, rows).mean(1)
    return out
