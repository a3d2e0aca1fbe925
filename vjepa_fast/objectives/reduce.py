"""Means and weights that the terms share. All of them are free of host syncs: counts stay on the device.

B batch, K tokens of one mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from vjepa_fast.layers.packed import Packed, Stream

Entry = tuple[Tensor, Tensor | None]  # value, present: scalars, or [S] of the masks of a stream


def mean_of_entries(entries: Sequence[Entry], otherwise: Iterable[Tensor]) -> Tensor:
    """Mean over the (fpc group, mask) entries that have the term.

    An entry is ``(value, present)``: two scalars, ``present`` being 1 or 0, or None for always; or [S] each, where all
    masks of a group are in one stream. The value of an absent entry must be 0. With no entry at all the result is a
    zero that still hangs on the tensors of ``otherwise``, so that a backward pass gives them zero gradients instead of
    failing.
    """
    if not entries:
        return connected_zero(otherwise)
    values = torch.cat([value.reshape(-1) for value, _ in entries])
    if all(present is None for _, present in entries):
        return values.sum() / len(values)
    counts = [torch.ones_like(value) if present is None else present for value, present in entries]
    return values.sum() / torch.cat([c.detach().reshape(-1).to(values.dtype) for c in counts]).sum().clamp(min=1)


def connected_zero(tensors: Iterable[Tensor]) -> Tensor:
    """0, in promote_types(input, float32), with an (empty) path to every one of ``tensors``."""
    parts = [t.reshape(-1)[:0].sum() for t in tensors]
    return torch.stack([p.to(torch.promote_types(p.dtype, torch.float32)) for p in parts]).sum()


def hard_softmax(error: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """softmax(error / temperature) over the last dimension, detached; invalid entries get 0.

    ``error [..., K]``; ``valid [..., K]`` bool. Temperatures under 1e-6 count as 1e-6. Rows without a valid entry are
    all 0. Multiplied by the number of valid entries these are weights of mean 1.
    """
    logits = error.detach() / max(temperature, 1e-6)
    if valid is None:
        return logits.softmax(-1)
    logits = logits.masked_fill(~valid, torch.finfo(logits.dtype).min)
    return logits.softmax(-1).masked_fill(~valid, 0.0)


def mean_of_tokens(error_BK: Tensor, mask: Tensor | Packed) -> Tensor:
    """Mean over all tokens of a mask, whose ids ``mask`` are; or over those of each mask of a stream, [S].

    In a stream the rows of filler may hold anything.
    """
    return mask.sums(error_BK) / mask.counts if isinstance(mask, Stream) else error_BK.mean()


def hard_mean(error_BK: Tensor, temperature: float, mask: Tensor | Packed) -> Tensor:
    """Mean over all tokens of K x softmax(error / temperature) x error, softmax over the K tokens of each sample.

    The softmax is a constant. ``mask``: the tokens' ids; in a stream the mean is one over the tokens of each mask, [S].
    """
    if not isinstance(mask, Packed):  # averaged over K tokens: the K cancels
        return (hard_softmax(error_BK, temperature) * error_BK).sum(-1).mean()
    tokens, error_BK = mask.shape[1], mask.padded(error_BK, 0.0)
    value_B = (hard_softmax(error_BK, temperature, mask.valid) * error_BK).sum(-1)
    if isinstance(mask, Stream):
        return (value_B * mask.sizes).view(mask.masks, -1).sum(1) / mask.counts
    return (value_B * (mask.sizes.to(value_B.dtype) * len(value_B) / tokens)).mean()
