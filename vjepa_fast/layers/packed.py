"""Token ids of a mask whose samples keep different numbers of tokens: one sample after another, nothing in between.

With a *capacity* the row of tokens is longer than they are and ends in filler. Its length is then all that the host
knows: what depends on the lengths is computed on the device, in shapes that the capacity fixes.

Legend: B samples, N = T*H*W tokens of a sample's grid, M kept tokens of all samples together, C >= M the capacity (M
without one), K the most tokens of a sample (N with a capacity).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vjepa_fast.errors import ConfigError
from vjepa_fast.layers.attention.base import DeviceSegments, Lengths, Segments
from vjepa_fast.ops import _check
from vjepa_fast.ops.block_masks import BlockMasks

FILLER = 256  # tokens of a segment of filler: short, as attention costs the square
SHARE = 16  # a capacity is by default a multiple of this part of a batch's tokens


@dataclass(frozen=True)
class Packed:
    """One mask of a batch as a row of tokens. Features of its tokens are [1,C,...], in the same order.

    Attributes:
        idx: int64 [1,C], b*N + n for token n of sample b, ascending: finds rows in [B,N,...] viewed as [1,B*N,...].
            Filler, from M on, reads row 0.
        sizes: int64 [B], tokens of each sample, where ``idx`` is.
        lengths: the same numbers, on the host. At least 1 each. With a capacity they count the work that was done and
            decide nothing.
        tokens: N.
        spare: with a capacity the most rows that may be filler, at least 1; 0 without.
    """

    idx: Tensor
    sizes: Tensor
    lengths: tuple[int, ...]
    tokens: int
    spare: int = 0

    @classmethod
    def of(
        cls,
        idx_BK: Tensor,
        sizes_B: Tensor,
        lengths: Sequence[int],
        tokens: int,
        *,
        capacity: int = 0,
        spare: int | None = None,
    ) -> Packed:
        """From lists that are padded to one length: the first ``lengths[b]`` entries of row b count.

        Args:
            idx_BK: int64, token ids of each sample.
            sizes_B: int64, how many of them count.
            lengths: the same on the host.
            tokens: N.
            capacity: C; 0: as many as there are tokens.
            spare: the most rows that may be filler at this capacity; None: all of them.

        Raises:
            ValueError: a shape or dtype does not fit, a sample has no token, or the capacity is too small.
        """
        _check.indices("Packed", "idx", idx_BK, batch=len(lengths))
        _check.require(sizes_B.shape == idx_BK.shape[:1], "Packed", "sizes", f"int64 [{len(lengths)}]", sizes_B)
        ok = len(lengths) > 0 and min(lengths) > 0 and max(lengths) <= idx_BK.shape[1]
        _check.require(ok, "Packed", "lengths", f"numbers from 1 to {idx_BK.shape[1]}", tuple(lengths))
        total = sum(lengths)
        if not capacity:
            sample_M = torch.arange(len(lengths), device=idx_BK.device)
            sample_M = sample_M.repeat_interleave(sizes_B, output_size=total)  # with the size given, it need not wait
            place_M = torch.arange(total, device=idx_BK.device) - (sizes_B.cumsum(0) - sizes_B)[sample_M]
            idx_M = idx_BK[sample_M, place_M] + sample_M * tokens
            return cls(idx_M[None], sizes_B, tuple(lengths), tokens)
        _check.require(capacity >= total, "Packed", "capacity", f"room for all {total} tokens of the mask", capacity)
        spare = capacity if spare is None else spare
        ok = max(1, capacity - total) <= spare
        _check.require(ok, "Packed", "spare", f"at least {max(1, capacity - total)} rows of filler", spare)
        blank = cls(idx_BK.new_empty(1, capacity), sizes_B, tuple(lengths), tokens, spare)  # for its sample and place
        sample_C = blank.sample.clamp(max=len(lengths) - 1)
        idx_C = idx_BK[sample_C, blank.place.clamp(max=idx_BK.shape[1] - 1)] + sample_C * tokens
        return cls(torch.where(blank.real, idx_C[None], 0), sizes_B, tuple(lengths), tokens, spare)

    @property
    def shape(self) -> torch.Size:
        """(1, C)."""
        return self.idx.shape

    @property
    def fixed(self) -> bool:
        """Whether there is a capacity."""
        return self.spare > 0

    @property
    def longest(self) -> int:
        """K, as far as the host may know it."""
        return self.tokens if self.fixed else max(self.lengths)

    @property
    def count(self) -> Tensor | int:
        """M; with a capacity int64 [] on the device."""
        return self.sizes.sum() if self.fixed else self.shape[1]

    @cached_property
    def token(self) -> Tensor:
        """int64 [1,C], token n within its own sample."""
        return self.idx % self.tokens

    @cached_property
    def real(self) -> Tensor:
        """Bool [1,C], False for filler."""
        return (torch.arange(self.shape[1], device=self.sizes.device) < self.sizes.sum())[None]

    @cached_property
    def live(self) -> Tensor:
        """int64 [1,C], -1 for filler and else 0, as ``after`` of ``ops.latent_loss_token``."""
        return self.real.long() - 1

    @cached_property
    def sample(self) -> Tensor:
        """int64 [C], sample b of each row; B for filler."""
        if not self.fixed:
            return self.idx[0] // self.tokens
        rows_C = torch.arange(self.shape[1], device=self.sizes.device)
        return torch.searchsorted(self.sizes.cumsum(0), rows_C, right=True)

    @cached_property
    def place(self) -> Tensor:
        """int64 [C], which of its sample's tokens each row is; filler counts on."""
        starts = torch.cat([self.starts, self.sizes.sum()[None]]) if self.fixed else self.starts
        return torch.arange(self.shape[1], device=self.sizes.device) - starts[self.sample]

    @cached_property
    def starts(self) -> Tensor:
        """int64 [B], the row at which each sample begins."""
        return self.sizes.cumsum(0) - self.sizes

    def to(self, device: torch.device, non_blocking: bool = False) -> Packed:
        """As ``Tensor.to``."""
        if self.idx.device == device:
            return self
        idx, sizes = (x.to(device, non_blocking=non_blocking) for x in (self.idx, self.sizes))
        return Packed(idx, sizes, self.lengths, self.tokens, self.spare)

    # -- to one row per sample and back, for what is taken per sample --------------------------------------------------
    @cached_property
    def valid(self) -> Tensor:
        """Bool [B,K], True in the first ``sizes[b]`` entries of row b."""
        return torch.arange(self.longest, device=self.idx.device) < self.sizes[:, None]

    def padded(self, x_1C: Tensor, fill: float | bool | None = None) -> Tensor:
        """[1,C] -> [B,K]; entries past a sample's tokens are ``fill``, or with None repeat the sample's last one."""
        place_K = torch.arange(self.longest, device=self.idx.device)
        slot_BK = self.starts[:, None] + torch.minimum(place_K, self.sizes[:, None] - 1)
        x_BK = x_1C[0, slot_BK]
        return x_BK if fill is None else x_BK.masked_fill(~self.valid, fill)

    def packed(self, x_BK: Tensor, fill: float = 0.0) -> Tensor:
        """[B,K] -> [1,C], the inverse of ``padded``; filler gets ``fill``."""
        if not self.fixed:
            return x_BK[self.sample, self.place][None]
        rows, columns = self.sample.clamp(max=len(x_BK) - 1), self.place.clamp(max=x_BK.shape[1] - 1)
        return x_BK[rows, columns][None].masked_fill(~self.real, fill)


def ids(mask: Tensor | Packed) -> Tensor:
    """int64 [B,K] as it is, or [1,C] of a packed mask: rows of [B,N,...], viewed as ``[len(ids), -1, ...]``."""
    return mask.idx if isinstance(mask, Packed) else mask.long()


def places(mask: Tensor | Packed) -> Tensor:
    """int64 [B,K] or [1,C], the place of each token in its own sample's grid."""
    return mask.token if isinstance(mask, Packed) else mask.long()


def real(mask: Tensor | Packed) -> Tensor | None:
    """Bool [1,C], False for filler; None where a mask has no capacity, and so no filler."""
    return mask.real if isinstance(mask, Packed) and mask.fixed else None


def lengths(mask: Tensor | Packed) -> Sequence[int]:
    """Lengths of the segments of one mask without a capacity: all its tokens, or those of each sample."""
    return mask.lengths if isinstance(mask, Packed) else (mask.shape[1],)


def pieces(x: Tensor, mask: Tensor | Packed) -> Sequence[Tensor]:
    """The segments of ``x`` [B,K,...], the tokens of one mask without a capacity."""
    return x.split(list(mask.lengths), 1) if isinstance(mask, Packed) else (x,)


def segments(*sides: Sequence[Tensor] | Sequence[Packed]) -> Lengths:
    """What attends to itself in a stream of masks side by side: a mask, or one sample of it where masks are packed.

    With two ``sides`` (context and predicted tokens) a segment holds the tokens of both. Filler, at the end of each
    mask, has short segments of its own.
    """
    first = sides[0][0]
    if not isinstance(first, Packed) or not first.fixed:
        found = [sum(parts) for masks in zip(*sides) for parts in zip(*(lengths(m) for m in masks))]
        return Segments(found) if isinstance(first, Packed) else found
    parts: list[Tensor] = []
    for masks in zip(*sides):
        own = [m for m in masks if isinstance(m, Packed)]
        sizes_B, length = torch.stack([m.sizes for m in own]).sum(0), min(FILLER, first.tokens)
        before = torch.arange(0, sum(m.spare for m in own), length, device=sizes_B.device)
        rest = sum(m.shape[1] for m in own) - sizes_B.sum()
        parts += [sizes_B, (rest - before).clamp(0, length)]
    return DeviceSegments(torch.cat(parts), first.tokens)


def weave(enc: Packed, pred: Packed) -> tuple[Tensor, Tensor]:
    """Where the rows of both, with a capacity, lie in a stream in which a sample's predicted tokens follow its context.

    Returns:
        int64 [C] of each: together all places of the stream; the filler of both is at its end.
    """
    row_enc, row_pred = (torch.arange(m.shape[1], device=m.sizes.device) for m in (enc, pred))
    ends_enc, ends_pred = enc.sizes.cumsum(0), pred.sizes.cumsum(0)
    predicted = torch.cat([pred.starts, ends_pred[-1:]])  # before each sample's context; last: before its filler
    context = torch.cat([ends_enc, torch.full_like(ends_enc[:1], enc.shape[1])])  # before each sample's predicted ones
    return row_enc + predicted[enc.sample], row_pred + context[pred.sample]


def pack(masks: BlockMasks, lengths: Tensor | None = None, quantum: int | None = 0) -> tuple[list[Packed], list[Packed]]:
    """All tokens of all samples, context and prediction, one ``Packed`` per spec.

    Args:
        masks: as drawn, lists padded to the grid's tokens.
        lengths: as for ``BlockMasks.trim``.
        quantum: give each mask as its capacity the next multiple of so many tokens; None: of a 16th of the tokens of
            the batch; 0: no capacity.

    Raises:
        ConfigError: no context is left after 32 redraws; a sample has more tokens than a capacity provides for.
    """
    _, batch, tokens = masks.enc.shape
    host = masks.host_lengths(lengths)
    if quantum is None:
        quantum = -(-batch * tokens // SHARE)
    for s, counts in enumerate(zip(*host) if quantum else ()):
        if (most := max(e + p for e, p in zip(*counts))) > tokens:
            raise ConfigError(
                f"masks.specs[{s}]: context and predicted tokens of a sample overlap ({most} of a grid of {tokens}); "
                "a stream of fixed capacity has no room for that: set runtime.capacity_quantum=0"
            )

    def side(idx: Tensor, sizes: Tensor, lengths: list[list[int]]) -> list[Packed]:
        found: list[Packed] = []
        for of_mask, sizes_B, length_B in zip(idx, sizes, lengths):
            capacity = -(-sum(length_B) // quantum) * quantum if quantum else 0
            found.append(Packed.of(of_mask, sizes_B, length_B, tokens, capacity=capacity, spare=quantum))
        return found

    return side(masks.enc, masks.enc_len, host[0]), side(masks.pred, masks.pred_len, host[1])
