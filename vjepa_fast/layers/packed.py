"""Token ids of masks whose samples keep different numbers of tokens: one sample after another, nothing in between.

Legend: S masks, B samples, N = T*H*W tokens of a sample's grid, M kept tokens of all samples together, K the most of a
sample; of a ``Stream`` C >= M rows, and K = N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from vjepa_fast.errors import ConfigError
from vjepa_fast.layers.attention.base import DeviceSegments, Lengths, Segments
from vjepa_fast.ops import _check
from vjepa_fast.ops.block_masks import BlockMasks

FILLER = 256  # tokens of a segment of filler: short, as attention costs the square
SHARE = 16  # the capacity of a stream is by default a multiple of this part of all tokens


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
        _check_lists(idx_BK, sizes_B, lengths)
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

    @property
    def longest(self) -> int:
        """K."""
        return max(self.lengths)

    @cached_property
    def token(self) -> Tensor:
        """int64 [1,M], token n within its own sample."""
        return self.idx % self.tokens

    def to(self, device: torch.device, non_blocking: bool = False) -> Packed:
        """As ``Tensor.to``."""
        if self.idx.device == device:
            return self
        return replace(self, **{k: getattr(self, k).to(device, non_blocking=non_blocking) for k in ("idx", "sizes")})

    # -- to one row per sample and back, for what is taken per sample --------------------------------------------------
    @cached_property
    def starts(self) -> Tensor:
        """int64 [B], the row at which each sample begins."""
        return self.sizes.cumsum(0) - self.sizes

    @cached_property
    def valid(self) -> Tensor:
        """Bool [B,K], True in the first ``sizes[b]`` entries of row b."""
        return torch.arange(self.longest, device=self.idx.device) < self.sizes[:, None]

    def padded(self, x_1M: Tensor, fill: float | bool | None = None) -> Tensor:
        """[1,M] -> [B,K]; entries past a sample's tokens are ``fill``, or with None repeat the sample's last one."""
        place_K = torch.arange(self.longest, device=self.idx.device)
        slot_BK = self.starts[:, None] + torch.minimum(place_K, self.sizes[:, None] - 1)
        x_BK = x_1M[0, slot_BK]
        return x_BK if fill is None else x_BK.masked_fill(~self.valid, fill)

    def packed(self, x_BK: Tensor, fill: float = 0.0) -> Tensor:
        """[B,K] -> [1,M], the inverse of ``padded``. ``fill`` is for rows that belong to no sample."""
        sample_M = self.idx[0] // self.tokens
        place_M = torch.arange(self.idx.shape[1], device=self.idx.device) - self.starts[sample_M]
        return x_BK[sample_M, place_M][None]


@dataclass(frozen=True)
class Stream(Packed):
    """All masks of a batch, one after another, in C rows of which the last ones are filler.

    C, the capacity (``runtime.capacity_quantum``), is all that the host may know: what depends on lengths is computed
    on the device, in shapes that do not. A sample of a mask counts as a sample of its own, s = j*B + b: S*B of them are
    where ``Packed`` has B.

    Attributes:
        idx: int64 [1,C], b*N + n as ever; filler reads row 0.
        sizes: int64 [S*B].
        lengths: the same on the host, to count what was done; nothing is decided by them.
        masks: S.
        spare: the most rows that may be filler, at least 1.
    """

    masks: int = 1
    spare: int = 1

    @classmethod
    def cut(
        cls, idx_SBK: Tensor, sizes_SB: Tensor, lengths: Sequence[Sequence[int]], tokens: int, capacity: int, spare: int
    ) -> Stream:
        """From the lists of all masks, as ``Packed.of``.

        Raises:
            ValueError: as there; or the capacity is too small, or leaves more filler than ``spare``.
        """
        masks, batch, longest = idx_SBK.shape
        flat, idx, sizes = tuple(n for of_mask in lengths for n in of_mask), idx_SBK.flatten(0, 1), sizes_SB.flatten()
        _check_lists(idx, sizes, flat)
        total = sum(flat)
        _check.require(capacity >= total, "Stream", "capacity", f"at least the {total} tokens of the masks", capacity)
        least = max(1, capacity - total)
        _check.require(spare >= least, "Stream", "spare", f"at least {least}, the rows of filler", spare)
        blank = cls(idx.new_empty(1, capacity), sizes, flat, tokens, masks, spare)  # knows sample and place of its rows
        sample_C = blank.sample.clamp(max=len(flat) - 1)
        idx_C = idx[sample_C, blank.place.clamp(max=longest - 1)] + sample_C % batch * tokens
        return replace(blank, idx=torch.where(blank.real, idx_C[None], 0))

    @property
    def batch(self) -> int:
        """B, of one mask."""
        return len(self.sizes) // self.masks

    @property
    def longest(self) -> int:
        """N."""
        return self.tokens

    @cached_property
    def _row(self) -> Tensor:
        return torch.arange(self.shape[1], device=self.sizes.device)

    @cached_property
    def real(self) -> Tensor:
        """Bool [1,C], False for filler."""
        return (self._row < self.sizes.sum())[None]

    @cached_property
    def live(self) -> Tensor:
        """int64 [1,C], -1 for filler and else 0, as ``after`` of ``ops.latent_loss_token``."""
        return self.real.long() - 1

    @cached_property
    def sample(self) -> Tensor:
        """int64 [C], s of each row; S*B for filler."""
        return torch.searchsorted(self.sizes.cumsum(0), self._row, right=True)

    @cached_property
    def place(self) -> Tensor:
        """int64 [C], which of its sample's tokens each row is; filler counts on."""
        return self._row - torch.cat([self.starts, self.sizes.sum()[None]])[self.sample]

    @cached_property
    def cell(self) -> Tensor:
        """int64 [1,C], s*N + n: finds rows in the grids of all samples of all masks; S*B*N for filler."""
        return torch.where(self.real, self.sample * self.tokens + self.token, len(self.sizes) * self.tokens)

    @cached_property
    def own(self) -> Tensor:
        """Bool [S,C], the rows of each mask."""
        return self.sample // self.batch == torch.arange(self.masks, device=self.sizes.device)[:, None]

    @cached_property
    def counts(self) -> Tensor:
        """int64 [S], tokens of each mask."""
        return self.sizes.view(self.masks, -1).sum(1)

    def sums(self, x_1C: Tensor) -> Tensor:
        """[S], sum of ``x`` over the rows of each mask."""
        return torch.where(self.own, x_1C, 0).sum(1)

    def packed(self, x_BK: Tensor, fill: float = 0.0) -> Tensor:
        """[S*B,K] -> [1,C], the inverse of ``padded``; filler gets ``fill``."""
        rows, columns = self.sample.clamp(max=len(x_BK) - 1), self.place.clamp(max=x_BK.shape[1] - 1)
        return x_BK[rows, columns][None].masked_fill(~self.real, fill)


def _check_lists(idx: Tensor, sizes: Tensor, lengths: Sequence[int]) -> None:
    _check.indices("Packed", "idx", idx, batch=len(lengths))
    _check.require(sizes.shape == idx.shape[:1], "Packed", "sizes", f"int64 [{len(lengths)}]", sizes)
    ok = len(lengths) > 0 and min(lengths) > 0 and max(lengths) <= idx.shape[1]
    _check.require(ok, "Packed", "lengths", f"numbers from 1 to {idx.shape[1]}", tuple(lengths))


Masks = Sequence[Tensor] | Sequence[Packed]  # one entry per mask; or a single Stream


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


def segments(*sides: Masks) -> Lengths:
    """What attends to itself in a row of masks side by side: a mask, or one sample of it where masks are packed.

    With two ``sides`` (context and predicted tokens) a segment holds the tokens of both. Filler has short segments of
    its own at the end.
    """
    first = sides[0][0]
    if not isinstance(first, Stream):
        found = [sum(parts) for masks in zip(*sides) for parts in zip(*(lengths(m) for m in masks))]
        return Segments(found) if isinstance(first, Packed) else found
    streams = [m for (m,) in sides if isinstance(m, Stream)]
    sizes, length = torch.stack([m.sizes for m in streams]).sum(0), min(FILLER, first.tokens)
    before = torch.arange(0, sum(m.spare for m in streams), length, device=sizes.device)
    rest = sum(m.shape[1] for m in streams) - sizes.sum()
    return DeviceSegments(torch.cat([sizes, (rest - before).clamp(0, length)]), first.tokens)


def weave(enc: Stream, pred: Stream) -> tuple[Tensor, Tensor]:
    """Where the rows of both lie in one stream in which each sample's predicted tokens follow its context.

    Returns:
        int64 [C] of each: together all places of the stream; the filler of both is at its end.
    """
    row_enc, row_pred = (torch.arange(m.shape[1], device=m.sizes.device) for m in (enc, pred))
    ends_enc, ends_pred = enc.sizes.cumsum(0), pred.sizes.cumsum(0)
    predicted = torch.cat([pred.starts, ends_pred[-1:]])  # before each sample's context; last: before its filler
    context = torch.cat([ends_enc, torch.full_like(ends_enc[:1], enc.shape[1])])  # before each sample's predicted ones
    return row_enc + predicted[enc.sample], row_pred + context[pred.sample]


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


def capacities(masks: BlockMasks, lengths: Tensor | None = None, quantum: int | None = None) -> tuple[int, int]:
    """Rows of context and prediction in what ``stream`` makes of these arguments: all that its shapes depend on.

    Raises:
        ConfigError: as ``stream``.
    """
    tokens, host = masks.enc.shape[2], masks.host_lengths(lengths)
    for s, counts in enumerate(zip(*host)):
        if (most := max(e + p for e, p in zip(*counts))) > tokens:
            raise ConfigError(
                f"masks.specs[{s}]: context and predicted tokens of a sample overlap, {most} of a grid of {tokens}; "
                "streams of fixed capacity have no room for that: set runtime.capacity_quantum=0"
            )
    quantum = _quantum(masks, quantum)
    context, predicted = (-(-sum(map(sum, counts)) // quantum) * quantum for counts in host)
    return context, predicted


def _quantum(masks: BlockMasks, quantum: int | None) -> int:
    return -(-masks.enc.numel() // SHARE) if quantum is None else quantum


def stream(masks: BlockMasks, lengths: Tensor | None = None, quantum: int | None = None) -> tuple[Stream, Stream]:
    """All tokens of all samples of all masks, context and prediction, with capacities that are multiples of a quantum.

    Args:
        masks: as drawn, lists padded to the grid's tokens.
        lengths: as for ``BlockMasks.trim``.
        quantum: tokens; None: a 16th of S*B*N.

    Raises:
        ConfigError: no context is left after 32 redraws, or a sample has more tokens than its grid.
    """
    rows, spare, host = capacities(masks, lengths, quantum), _quantum(masks, quantum), masks.host_lengths(lengths)
    sides = zip((masks.enc, masks.pred), (masks.enc_len, masks.pred_len), host, rows)
    enc, pred = (Stream.cut(*side[:3], masks.enc.shape[2], side[3], spare) for side in sides)
    return enc, pred
