"""Token ids of a mask whose samples keep different numbers of tokens: one sample after another, nothing in between.

Legend: B samples, N = T*H*W tokens of a sample's grid, M kept tokens of all samples together, K the most of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vjepa_fast.ops import _check
from vjepa_fast.ops.block_masks import BlockMasks


@dataclass(frozen=True)
class Packed:
    """One mask of a batch, for ``masks.truncate: none``. Features of its tokens are [1,M,...], in the same order.

    Attributes:
        idx: int64 [1,M], b*N + n for token n of sample b, ascending: finds rows in [B,N,...] viewed as [1,B*N,...].
        sizes: int64 [B], tokens of each sample, where ``idx`` is.
        lengths: the same numbers, on the host. At least 1 each.
        tokens: N.
    """

    idx: Tensor
    sizes: Tensor
    lengths: tuple[int, ...]
    tokens: int

    @classmethod
    def of(cls, idx_BK: Tensor, sizes_B: Tensor, lengths: Sequence[int], tokens: int) -> Packed:
        """From lists that are padded to one length: the first ``lengths[b]`` entries of row b count.

        Raises:
            ValueError: a shape or dtype does not fit, or a sample has no token.
        """
        _check.indices("Packed", "idx", idx_BK, batch=len(lengths))
        _check.require(sizes_B.shape == idx_BK.shape[:1], "Packed", "sizes", f"int64 [{len(lengths)}]", sizes_B)
        ok = len(lengths) > 0 and min(lengths) > 0 and max(lengths) <= idx_BK.shape[1]
        _check.require(ok, "Packed", "lengths", f"numbers from 1 to {idx_BK.shape[1]}", tuple(lengths))
        total = sum(lengths)
        sample_M = torch.arange(len(lengths), device=idx_BK.device)
        sample_M = sample_M.repeat_interleave(sizes_B, output_size=total)  # with the size given, it need not wait
        place_M = torch.arange(total, device=idx_BK.device) - (sizes_B.cumsum(0) - sizes_B)[sample_M]
        idx_M = idx_BK[sample_M, place_M] + sample_M * tokens
        return cls(idx_M[None], sizes_B, tuple(lengths), tokens)

    @property
    def shape(self) -> torch.Size:
        """(1, M)."""
        return self.idx.shape

    @cached_property
    def token(self) -> Tensor:
        """int64 [1,M], token n within its own sample."""
        return self.idx % self.tokens

    def to(self, device: torch.device, non_blocking: bool = False) -> Packed:
        """As ``Tensor.to``."""
        idx, sizes = (x.to(device, non_blocking=non_blocking) for x in (self.idx, self.sizes))
        return Packed(idx, sizes, self.lengths, self.tokens)

    # -- to one row per sample and back, for what is taken per sample --------------------------------------------------
    @cached_property
    def _starts(self) -> Tensor:
        return self.sizes.cumsum(0) - self.sizes

    @cached_property
    def valid(self) -> Tensor:
        """Bool [B,K], True in the first ``lengths[b]`` entries of row b."""
        return torch.arange(max(self.lengths), device=self.idx.device) < self.sizes[:, None]

    def padded(self, x_1M: Tensor, fill: float | bool | None = None) -> Tensor:
        """[1,M] -> [B,K]; entries past a sample's tokens are ``fill``, or with None repeat the sample's last one."""
        place_K = torch.arange(max(self.lengths), device=self.idx.device)
        slot_BK = self._starts[:, None] + torch.minimum(place_K, self.sizes[:, None] - 1)
        x_BK = x_1M[0, slot_BK]
        return x_BK if fill is None else x_BK.masked_fill(~self.valid, fill)

    def packed(self, x_BK: Tensor) -> Tensor:
        """[B,K] -> [1,M], the inverse of ``padded``."""
        sample_M = self.idx[0] // self.tokens
        place_M = torch.arange(self.idx.shape[1], device=self.idx.device) - self._starts[sample_M]
        return x_BK[sample_M, place_M][None]


def ids(mask: Tensor | Packed) -> Tensor:
    """int64 [B,K] as it is, or [1,M] of a packed mask: rows of [B,N,...], viewed as ``[len(ids), -1, ...]``."""
    return mask.idx if isinstance(mask, Packed) else mask.long()


def places(mask: Tensor | Packed) -> Tensor:
    """int64 [B,K] or [1,M], the place of each token in its own sample's grid."""
    return mask.token if isinstance(mask, Packed) else mask.long()


def lengths(mask: Tensor | Packed) -> Sequence[int]:
    """Lengths of the segments of one mask: all its tokens, or where it is packed those of each sample."""
    return mask.lengths if isinstance(mask, Packed) else (mask.shape[1],)


def pieces(x: Tensor, mask: Tensor | Packed) -> Sequence[Tensor]:
    """The segments of ``x`` [B,K,...], the tokens of one mask."""
    return x.split(list(mask.lengths), 1) if isinstance(mask, Packed) else (x,)


def filler(length: int, multiple: int) -> int:
    """Tokens to add to a stream so that its length is a multiple; 0 if ``multiple`` is, else at least one.

    One at least, so that there is always a segment of them and the number of segments stays the same from step to step.
    """
    return multiple - length % multiple if multiple else 0


def pack(masks: BlockMasks, lengths: Tensor | None = None) -> tuple[list[Packed], list[Packed]]:
    """All tokens of all samples, context and prediction, one ``Packed`` per spec.

    Args:
        masks: as drawn, lists padded to the grid's tokens.
        lengths: as for ``BlockMasks.trim``.

    Raises:
        ConfigError: no context is left after 32 redraws.
    """
    sides = zip((masks.enc, masks.pred), (masks.enc_len, masks.pred_len), masks.host_lengths(lengths))
    enc, pred = ([Packed.of(*mask, masks.enc.shape[2]) for mask in zip(*side)] for side in sides)
    return enc, pred
