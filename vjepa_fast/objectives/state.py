"""``LatentState``: the features of one step, and the views of them that the terms share.

Every view is built once per step and kept, so two terms never repeat a look-up or an error. Nothing here waits for the
device: pairs are found by table look-up with fixed shapes, empty ones have a count of 0. The features themselves go
through ``ops.latent_loss_*``, which reduce them to one number per token.

B batch, N = T*H*W grid tokens, K kept tokens of a mask, D = levels * embed_dim channels, S = H*W places.
Group i is an entry of the outer lists (one per frames-per-clip value), j a mask.

Where samples keep different numbers of tokens (``layers.Packed``), a mask's tokens are one row [1, M] not [B, K],
and grids [B, N] are seen as [1, B*N]: there is no padding, and a mean over tokens is one over those of all samples.
Where all masks of a group are one ``layers.packed.Stream`` [1, C], j is 0 alone, and means are [S], one for each mask.
Its filler has weight 0, gets no gradient, and may hold anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from vjepa_fast import ops
from vjepa_fast.imagenet import IMAGENET_MEAN, IMAGENET_STD
from vjepa_fast.layers.packed import Packed, Stream, ids
from vjepa_fast.objectives.reduce import hard_softmax
from vjepa_fast.ops import _check
from vjepa_fast.ops.latent import RowCall, function

T = TypeVar("T")


def _absent() -> Any:
    """A field that is None until given, and typed as given: the plan refuses a state that lacks what a term needs."""
    return field(default=None)


@dataclass
class LatentState:
    """What the objectives read at one step.

    Fields (those that no term of the plan needs may stay None, see ``plan.needs`` and ``has``):
        grids: token grid (T, H, W) of each group.
        clips: per group ``[B, C, F, height, width]``, uint8 or normalised float.
        h: per group ``[B, N, D]``, the target: normalised per level, or with ``h_normalized=False`` to be normalised
            where it is read (only for targets without gradient).
        z: per group and mask ``[B, K_enc, D]``, the context encoder's features.
        z_pred, z_context: per group and mask ``[B, K_pred, D]`` and ``[B, K_enc, D]``, the predictor's outputs.
        masks_enc, masks_pred: per group and mask, integer token ids ``[B, K]``, or ``layers.Packed``, whose features
            (z, z_pred, z_context) are ``[1, M, D]``; or per group one ``layers.packed.Stream``.
        step, total_steps, epoch, epochs: where in the run this is; ``step`` and ``epoch`` count from 0.
        modality: "video" or "image".
        mean, std: normalisation per channel, for uint8 clips.
        drawn: by name of the term what ``Objective.draw`` gave for the step; None: the plan draws it.
    """

    grids: list[tuple[int, int, int]] = _absent()
    clips: list[Tensor] = _absent()
    h: list[Tensor] = _absent()
    z: list[list[Tensor]] = _absent()
    z_pred: list[list[Tensor]] = _absent()
    z_context: list[list[Tensor]] = _absent()
    masks_enc: list[list[Tensor | Packed]] = _absent()
    masks_pred: list[list[Tensor | Packed]] = _absent()
    step: int | None = None
    total_steps: int | None = None
    epoch: int | None = None
    epochs: int | None = None
    modality: str = "video"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    h_normalized: bool = True
    drawn: dict[str, Tensor] = _absent()
    _cache: dict[Any, Any] = field(default_factory=dict[Any, Any], init=False, repr=False, compare=False)
    stop_gradient: bool = field(default=False, init=False, repr=False, compare=False)
    levels: int = field(default=1, init=False, repr=False, compare=False)
    pair_calls: tuple[RowCall, ...] = field(default=(), init=False, repr=False, compare=False)

    def has(self, name: str) -> bool:
        """Whether the field ``name`` was given."""
        return getattr(self, name) is not None

    def prepared(self, stop_gradient: bool, levels: int = 1, pair_calls: tuple[RowCall, ...] = ()) -> LatentState:
        """The same inputs with empty caches, for a plan's forward.

        ``stop_gradient`` detaches ``h`` where a term does not ask otherwise; ``pair_calls`` are what all terms want to
        know about the pairs of ``z``, computed in one pass.
        """
        fresh = replace(self)
        fresh.stop_gradient, fresh.levels, fresh.pair_calls = stop_gradient, levels, pair_calls
        return fresh

    def forget(self) -> None:
        """Drop what was kept: views know their state, and such a circle would hold the features until Python's next
        collection, beyond the backward pass.
        """
        self._cache.clear()

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """``make()``, computed the first time and kept for this step under ``key``."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def target(self, i: int, grad: bool | None = None) -> Tensor:
        """Normalised ``h[i]`` [B, N, D] in the computing dtype.

        ``grad``: True live, False detached, None as the plan decides.
        """
        h = self.h[i]
        grad = h.requires_grad and (not self.stop_gradient if grad is None else grad)

        def make() -> Tensor:
            x = computing(h if grad else h.detach())
            return x if self.h_normalized else ops.target_norm(x, self.levels)

        return self.once(("target", i, grad), make)

    def target_rows(
        self, i: int, x_BKD: Tensor, idx_BK: Tensor, call: RowCall, target: str = "same", after: Tensor | None = None
    ) -> Tensor:
        """``call`` of ``x`` and the target rows at ``idx``, mean over D [B, K]; see ``ops.latent_loss_token``.

        Rows with a negative ``after`` are 0.
        """
        h = by_rows(self.h[i], idx_BK)
        if target == "same" and h.requires_grad and not self.stop_gradient:  # differentiable in h too
            dead = None if after is None else (after < 0)[..., None]
            x_BKD = computing(x_BKD) if dead is None else computing(x_BKD).masked_fill(dead, 0.0)
            value_BKD, _ = function(call.key).formula(x_BKD, take_rows(self.target(i), idx_BK), call.p)
            return (value_BKD if dead is None else value_BKD.masked_fill(dead, 0.0)).mean(-1)
        _, height, width = self.grids[i] if self.has("grids") else (1, 0, 0)
        return ops.latent_loss_token(
            x_BKD,
            h,
            idx_BK.long(),
            call,
            target=target,
            after=after,
            places=height * width,
            levels=self.levels,
            normalize=not self.h_normalized,
        )

    def context(self, i: int, j: int) -> Tensor:
        """Context features ``z[i][j]`` [B, K_enc, D] in their own dtype, 0 in filler."""

        def make() -> Tensor:
            stream = self.stream(i, j)
            z = self.z[i][j]
            return z if stream is None else z.masked_fill(~stream.real[..., None], 0.0)

        return self.once(("z", i, j), make)

    def stream(self, i: int, j: int) -> Stream | None:
        """The context masks of a group, where they are one stream."""
        mask = self.masks_enc[i][j] if self.has("masks_enc") else None
        return mask if isinstance(mask, Stream) else None

    def prediction_errors(self, call: RowCall) -> list[list[Tensor]]:
        """Per group and mask: ``call`` of z_pred and h, mean over D, at each predicted token, [B, K_pred]."""
        return self._errors("z_pred", "masks_pred", call)

    def context_errors(self, call: RowCall) -> list[list[Tensor]]:
        """Per group and mask: ``call`` of z_context and h, mean over D, at each context token, [B, K_enc]."""
        return self._errors("z_context", "masks_enc", call)

    def _errors(self, source: str, masks: str, call: RowCall) -> list[list[Tensor]]:
        def make() -> list[list[Tensor]]:
            return [
                [
                    self.target_rows(i, z, ids(m), call, after=m.live if isinstance(m, Stream) else None)
                    for z, m in zip(zs, ms)
                ]
                for i, (zs, ms) in enumerate(zip(getattr(self, source), getattr(self, masks)))
            ]

        return self.once((source, call), make)

    def distance(self, i: int, j: int, offset: bool) -> Tensor:
        """Of each context token to the predicted ones of its sample, float32 [B, K_enc]; see ``ops.mask_distance``."""
        enc, pred = self.masks_enc[i][j], self.masks_pred[i][j]
        if not isinstance(enc, Packed) or not isinstance(pred, Packed):
            return ops.mask_distance(ids(enc).long(), ids(pred).long(), self.grids[i], offset=offset)
        rows = enc.padded(enc.token), pred.padded(pred.token)  # a token twice changes no distance
        return enc.packed(ops.mask_distance(*rows, self.grids[i], offset=offset), fill=1.0)

    def grid_pairs(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """(idx, after, before) [B, N] of all tokens of group ``i``, for ``ops.latent_loss_pair``."""

        def make() -> tuple[Tensor, Tensor, Tensor]:
            b, n, _ = self.h[i].shape
            _, height, width = self.grids[i]
            idx = torch.arange(n, device=self.h[i].device)
            after = torch.where(idx < n - height * width, idx + height * width, -1)
            before = torch.where(idx >= height * width, idx - height * width, -1)
            return idx.expand(b, n), after.expand(b, n), before.expand(b, n)

        return self.once(("grid_pairs", i), make)

    def temporal(self, min_steps: int = 2) -> Iterator[TemporalView]:
        """A view of each (group, mask) whose grid has at least ``min_steps`` time steps."""
        for i, (t, _, _) in enumerate(self.grids):
            if t >= min_steps:
                for j in range(len(self.masks_enc[i])):
                    yield self.once(("temporal", i, j), partial(TemporalView, self, i, j))

    def outputs(self, name: str) -> list[Tensor]:
        """All tensors of ``z``, ``z_pred`` or ``z_context`` as given, over groups and masks."""
        return [x for xs in getattr(self, name) for x in xs]


class TemporalView:
    """The context tokens of one (group, mask) and how they follow each other in time.

    A token (t, y, x) makes a *pair* if (t+1, y, x) is a context token too. Everything stays in the [B, K] layout of the
    context; a token without a successor counts as its own, so differences are exactly 0 there. Under a packed mask B is
    1 and K all its rows: the samples' grids follow each other, and no pair leads from one to the next, nor to filler.
    """

    def __init__(self, state: LatentState, i: int, j: int):
        self.state, self.i, self.j = state, i, j
        self.steps, height, width = state.grids[i]
        self.places = height * width
        mask = state.masks_enc[i][j]
        self.packed = mask if isinstance(mask, Packed) else None
        self.stream = mask if isinstance(mask, Stream) else None
        self.idx = ids(mask)
        b, k = self.idx.shape
        n = self.steps * self.places * (len(self.packed.sizes) if self.packed else 1)
        slot_BK = torch.arange(k, device=self.idx.device).expand(b, k)
        # one time step more than the grid has, so that the successor of a last token is looked up and not found; and
        # for filler, which is no token of the grid, another entry
        self.cells, beyond = n, n + self.places
        cell_BK = self.idx if self.stream is None else self.stream.cell
        own_BK = cell_BK if self.stream is None else cell_BK.where(self.stream.real, beyond)
        if _check.debugging():  # a token has one row, or gradients go astray
            _check.in_range("objectives", "masks_enc", self.idx, n)
            _check.distinct("objectives", "masks_enc", own_BK.where(own_BK < n, n + slot_BK))
        self.slot_of_token = self.idx.new_full((b, beyond + (self.stream is not None)), -1)
        self.slot_of_token.scatter_(1, own_BK, slot_BK)
        after_BK = self.slot_of_token.gather(1, cell_BK + self.places)
        place_BK = self.idx
        if self.packed:
            place_BK = self.packed.token
            after_BK = after_BK.masked_fill(place_BK >= self.packed.tokens - self.places, -1)  # of the next sample
        if self.stream:
            after_BK = after_BK.masked_fill(~self.stream.real, -1)
        self.pair = after_BK >= 0
        self.after_slot = after_BK  # row of the successor, -1 where there is none
        earlier_BK = torch.where(place_BK >= self.places, cell_BK - self.places, n)
        self.before_slot = self.slot_of_token.gather(1, earlier_BK)
        start_B1 = torch.arange(b, device=self.idx.device).unsqueeze(1) * k
        self._after = (torch.where(self.pair, after_BK, slot_BK) + start_B1).reshape(-1)

    def total(self, x_BK: Tensor) -> Tensor:
        """Sum over all tokens, scalar; or over those of each mask of a stream, [S]."""
        return x_BK.sum() if self.stream is None else self.stream.sums(x_BK)

    @cached_property
    def count(self) -> Tensor:
        """Number of pairs, scalar or [S], at least 1."""
        return self.total(self.pair.long()).clamp(min=1)

    @cached_property
    def present(self) -> Tensor:
        """1 if there is any pair, else 0; scalar or [S]."""
        return (self.total(self.pair.long()) > 0).to(torch.float32)

    def after(self, x: Tensor) -> Tensor:
        """Rows of ``x`` [B, K, C] at each token's successor in time, [B, K, C]."""
        return x.reshape(-1, x.shape[-1]).index_select(0, self._after).view_as(x)

    def step(self, x: Tensor) -> Tensor:
        """x(t+1) - x(t) at each token, 0 where it makes no pair; [B, K, C]."""
        return self.after(x) - x

    def mean(self, x_BK: Tensor) -> tuple[Tensor, Tensor]:
        """(mean over the pairs of the batch, present), for ``reduce.mean_of_entries``; scalars, or [S] in a stream."""
        return self.total(x_BK.masked_fill(~self.pair, 0.0)) / self.count, self.present

    def hard_shares_of_all(self, error_BK: Tensor, temperature: float) -> Tensor:
        """softmax(error / temperature) over the pairs of the batch, of each mask for itself; [B, K]."""
        if self.stream is None:
            return hard_softmax(error_BK.flatten(), temperature, self.pair.flatten()).view_as(error_BK)
        own = self.pair & self.stream.own
        return hard_softmax(error_BK.expand_as(own), temperature, own).sum(0, keepdim=True)

    def hard_shares(self, error_BK: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """(softmax(error / temperature) over the pairs of each sample, number of those), each [B, K] or [B, 1]."""
        if self.packed is None:
            return hard_softmax(error_BK, temperature, self.pair), self.pair.sum(-1, keepdim=True)
        pair = self.packed.padded(self.pair, False)
        share = hard_softmax(self.packed.padded(error_BK.detach()), temperature, pair)
        count = pair.sum(-1, keepdim=True).expand_as(share)
        return self.packed.packed(share), self.packed.packed(count)

    @property
    def features(self) -> Tensor:
        """Context features [B, K, D] in their own dtype, 0 in filler: for ops that compute in float32 all the same."""
        return self.state.context(self.i, self.j)

    @cached_property
    def z(self) -> Tensor:
        """``features`` in the computing dtype."""
        return computing(self.features)

    # for terms in plain PyTorch
    @cached_property
    def z_step(self) -> Tensor:
        """z(t+1) - z(t), [B, K, D]."""
        return self.step(self.z)

    @cached_property
    def h(self) -> Tensor:
        """Detached target at the context tokens, [B, K, D]."""
        return take_rows(self.state.target(self.i, grad=False), self.idx)

    @cached_property
    def h_step(self) -> Tensor:
        """h(t+1) - h(t), detached, [B, K, D]."""
        return self.step(self.h)

    # for terms that lower
    def rows(self, call: RowCall) -> Tensor:
        """``call`` (access PAIR) of z and h at each pair, mean over its channels, 0 where there is no pair; [B, K]."""
        calls = self.state.pair_calls
        if call not in calls:
            return self.rows_of(self.state.z[self.i][self.j], call)
        return self._all_rows[calls.index(call)]

    @cached_property
    def _all_rows(self) -> Tensor:
        return self._rows(self.state.z[self.i][self.j], self.state.pair_calls)

    def rows_of(self, z_BKD: Tensor, call: RowCall) -> Tensor:
        """``rows`` with other features in the place of z."""
        return self._rows(z_BKD, (call,))[0]

    def _rows(self, z_BKD: Tensor, calls: tuple[RowCall, ...]) -> Tensor:
        if self.state.has("h"):
            h, idx, places = by_rows(self.state.h[self.i], self.idx), self.idx, self.places
        else:  # a function of z alone: any tensor of the right shape will do
            h, places = z_BKD.detach(), 0
            idx = torch.arange(self.idx.shape[1], device=self.idx.device).expand_as(self.idx)
        return ops.latent_loss_pair(
            z_BKD,
            h,
            idx,
            after=self.after_slot,
            before=self.before_slot,
            row_calls=calls,
            places=places,
            levels=self.state.levels,
            normalize=not self.state.h_normalized,
        )

    def target_rows(self, x_BKD: Tensor, call: RowCall, target: str) -> Tensor:
        """``call`` (access TOKEN) of ``x`` and the "next" target or its "step", 0 where there is no pair; [B, K]."""
        return self.state.target_rows(self.i, x_BKD, self.idx, call, target, self.after_slot)

    @cached_property
    def columns(self) -> tuple[Tensor, Tensor]:
        """Rows of z, and tokens, of the places seen at every t: (slots, tokens) [B, P, T], -1 in spare entries.

        K tokens fill at most P = K // T columns, which keeps the shapes fixed.
        """
        k = self.packed.longest if self.packed else self.idx.shape[1]
        slot_BTS = self.slot_of_token[:, : self.cells].view(-1, self.steps, self.places)
        seen, place = (slot_BTS >= 0).all(1).to(torch.uint8).sort(dim=1, descending=True, stable=True)
        seen, place = seen[:, : k // self.steps, None] > 0, place[:, : k // self.steps]
        slots = slot_BTS.gather(2, place.unsqueeze(1).expand(-1, self.steps, -1)).transpose(1, 2)
        tokens = place[..., None] + torch.arange(self.steps, device=place.device) * self.places
        if self.packed:
            sample = torch.arange(len(tokens), device=place.device)
            sample = sample % self.stream.batch if self.stream else sample
            tokens = tokens + sample[:, None, None] * self.packed.tokens
        slots, tokens = slots.masked_fill(~seen, -1), tokens.masked_fill(~seen, -1)
        return (slots.flatten(0, 1)[None], tokens.flatten(0, 1)[None]) if self.packed else (slots, tokens)

    def column_mean(self, x_BP: Tensor) -> tuple[Tensor, Tensor]:
        """(mean over the ``columns`` there are, present) of ``column_rows``; scalars, or [S] in a stream."""
        seen = self.columns[0][..., 0] >= 0
        if self.stream is None:
            return x_BP.sum() / seen.sum().clamp(min=1), seen.any()
        x, seen = (v.view(self.stream.masks, -1) for v in (x_BP, seen))
        return x.sum(1) / seen.sum(1).clamp(min=1), seen.any(1)

    def column_rows(self, call: RowCall, constants: Tensor) -> Tensor:
        """``call`` (access COLUMN) of z and h at each of ``columns``, mean over D, 0 in spare entries; [B, P]."""
        slots, tokens = self.columns
        return ops.latent_loss_column(
            self.state.z[self.i][self.j],
            by_rows(self.state.h[self.i], self.idx),
            slots,
            tokens,
            call,
            constants,
            levels=self.state.levels,
            normalize=not self.state.h_normalized,
        )


def computing(x: Tensor) -> Tensor:
    """``x`` in promote_types(x, float32)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def by_rows(x: Tensor, idx_BK: Tensor) -> Tensor:
    """``x`` [B, N, ...] as ``idx`` counts its rows: as it is, or [1, B*N, ...] for the ids of a packed mask."""
    return x if len(x) == len(idx_BK) else x.flatten(0, 1)[None]


def take_rows(x_BND: Tensor, idx_BK: Tensor) -> Tensor:
    """Rows ``idx`` of each sample, [B, N, D], [B, K] -> [B, K, D], or of all samples, with [1, M] -> [1, M, D]."""
    x_BND = by_rows(x_BND, idx_BK)
    b, n, d = x_BND.shape
    start = torch.arange(b, device=x_BND.device).unsqueeze(1) * n
    return x_BND.reshape(b * n, d).index_select(0, (idx_BK.long() + start).reshape(-1)).view(*idx_BK.shape, d)
