"""``LatentState``: the features of one step, and the views of them that the terms share.

Every view is built once per step and kept, so two terms never repeat a gather, a difference or an error. Nothing here
waits for the device: pairs are found by table look-up with fixed shapes, empty ones have a count of 0.

B batch, N = T*H*W grid tokens, K kept tokens of a mask, D = levels * embed_dim channels, S = H*W places.
Group i is an entry of the outer lists (one per frames-per-clip value), j a mask.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class LatentState:
    """What the objectives read at one step.

    Fields (those that no term of the plan needs may stay None; ``plan.needs`` tells):
        grids: token grid (T, H, W) of each group.
        clips: per group ``[B, C, F, height, width]``, uint8 or normalised float.
        h: per group ``[B, N, D]``, the normalised target.
        z: per group and mask ``[B, K_enc, D]``, the context encoder's features.
        z_pred, z_context: per group and mask ``[B, K_pred, D]`` and ``[B, K_enc, D]``, the predictor's outputs.
        masks_enc, masks_pred: per group and mask, integer token ids ``[B, K]``.
        step, total_steps, epoch, epochs: where in the run this is; ``step`` and ``epoch`` count from 0.
        modality: "video" or "image".
        mean, std: normalisation per channel, for uint8 clips.
    """

    grids: list[tuple[int, int, int]] | None = None
    clips: list[Tensor] | None = None
    h: list[Tensor] | None = None
    z: list[list[Tensor]] | None = None
    z_pred: list[list[Tensor]] | None = None
    z_context: list[list[Tensor]] | None = None
    masks_enc: list[list[Tensor]] | None = None
    masks_pred: list[list[Tensor]] | None = None
    step: int | None = None
    total_steps: int | None = None
    epoch: int | None = None
    epochs: int | None = None
    modality: str = "video"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    _cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _stop_gradient: bool = field(default=False, init=False, repr=False, compare=False)

    def prepared(self, stop_gradient: bool) -> LatentState:
        """The same inputs with empty caches; ``stop_gradient`` detaches ``h`` where a term does not ask otherwise."""
        fresh = replace(self)
        fresh._stop_gradient = stop_gradient
        return fresh

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """``make()``, computed the first time and kept for this step under ``key``."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def target(self, i: int, grad: bool | None = None) -> Tensor:
        """``h[i]`` [B, N, D] in the computing dtype. ``grad``: True live, False detached, None as the plan decides."""
        h = self.h[i]
        grad = h.requires_grad and (not self._stop_gradient if grad is None else grad)
        return self.once(("target", i, grad), lambda: computing(h if grad else h.detach()))

    def target_at_context(self, i: int, j: int, grad: bool | None = None) -> Tensor:
        """Target rows at the context tokens, [B, K_enc, D]."""
        h = self.target(i, grad)
        return self.once(("target_enc", i, j, h.requires_grad), lambda: take_rows(h, self.masks_enc[i][j]))

    def context(self, i: int, j: int) -> Tensor:
        """Context features ``z[i][j]`` [B, K_enc, D] in the computing dtype."""
        return self.once(("z", i, j), lambda: computing(self.z[i][j]))

    def prediction_errors(self, p: float) -> list[list[Tensor]]:
        """Per group and mask: mean over D of abs(z_pred - h)^p / p at each predicted token, [B, K_pred]."""

        def make():
            return [
                [token_error(computing(z), take_rows(self.target(i), m), p) for z, m in zip(zs, ms)]
                for i, (zs, ms) in enumerate(zip(self.z_pred, self.masks_pred))
            ]

        return self.once(("prediction_errors", float(p)), make)

    def context_errors(self, p: float) -> list[list[Tensor]]:
        """Per group and mask: mean over D of abs(z_context - h)^p / p at each context token, [B, K_enc]."""

        def make():
            return [
                [token_error(computing(z), self.target_at_context(i, j), p) for j, z in enumerate(zs)]
                for i, zs in enumerate(self.z_context)
            ]

        return self.once(("context_errors", float(p)), make)

    def temporal(self, min_steps: int = 2) -> Iterator[TemporalView]:
        """A view of each (group, mask) whose grid has at least ``min_steps`` time steps."""
        for i, (t, _, _) in enumerate(self.grids):
            if t >= min_steps:
                for j in range(len(self.masks_enc[i])):
                    yield self.once(("temporal", i, j), lambda i=i, j=j: TemporalView(self, i, j))

    def outputs(self, name: str) -> list[Tensor]:
        """All tensors of ``z``, ``z_pred`` or ``z_context`` as given, over groups and masks."""
        return [x for xs in getattr(self, name) for x in xs]


class TemporalView:
    """The context tokens of one (group, mask) and how they follow each other in time.

    A token (t, y, x) makes a *pair* if (t+1, y, x) is a context token too. Everything stays in the [B, K] layout of the
    context; a token without a successor counts as its own, so differences are exactly 0 there.
    """

    def __init__(self, state: LatentState, i: int, j: int):
        self.state, self.i, self.j = state, i, j
        self.steps, height, width = state.grids[i]
        self.places = height * width
        self.idx = state.masks_enc[i][j].long()
        b, k = self.idx.shape
        n = self.steps * self.places
        slot_BK = torch.arange(k, device=self.idx.device).expand(b, k)
        # one time step more than the grid has, so that the successor of a last token is looked up and not found
        self.slot_of_token = self.idx.new_full((b, n + self.places), -1).scatter_(1, self.idx, slot_BK)
        after_BK = self.slot_of_token.gather(1, self.idx + self.places)
        self.pair = after_BK >= 0
        start_B1 = torch.arange(b, device=self.idx.device).unsqueeze(1) * k
        self._after = (torch.where(self.pair, after_BK, slot_BK) + start_B1).reshape(-1)

    @cached_property
    def count(self) -> Tensor:
        """Number of pairs, scalar, at least 1."""
        return self.pair.sum().clamp(min=1)

    @cached_property
    def present(self) -> Tensor:
        """1 if there is any pair, else 0; scalar."""
        return self.pair.any().to(torch.float32)

    def after(self, x: Tensor) -> Tensor:
        """Rows of ``x`` [B, K, C] at each token's successor in time, [B, K, C]."""
        return x.reshape(-1, x.shape[-1]).index_select(0, self._after).view_as(x)

    def step(self, x: Tensor) -> Tensor:
        """x(t+1) - x(t) at each token, 0 where it makes no pair; [B, K, C]."""
        return self.after(x) - x

    def mean(self, x_BK: Tensor) -> tuple[Tensor, Tensor]:
        """(mean over the pairs of the batch, present), for ``reduce.mean_of_entries``."""
        return x_BK.masked_fill(~self.pair, 0.0).sum() / self.count, self.present

    @property
    def z(self) -> Tensor:
        """Context features [B, K, D]."""
        return self.state.context(self.i, self.j)

    @property
    def h(self) -> Tensor:
        """Detached target at the context tokens [B, K, D]."""
        return self.state.target_at_context(self.i, self.j, grad=False)

    @cached_property
    def z_step(self) -> Tensor:
        """z(t+1) - z(t), [B, K, D]."""
        return self.step(self.z)

    @cached_property
    def h_after(self) -> Tensor:
        """Detached target one step later, [B, K, D]."""
        return self.after(self.h)

    @cached_property
    def h_step(self) -> Tensor:
        """h(t+1) - h(t), detached, [B, K, D]."""
        return self.h_after - self.h

    @cached_property
    def columns(self) -> tuple[Tensor, Tensor]:
        """(z - h along time at places seen at every t [B, T, P, D], which of the P entries are such places [B, P]).

        K tokens fill at most P = K // T columns, which keeps the shapes fixed; the other entries are 0.
        """
        b, k, d = self.z.shape
        slot_BTS = self.slot_of_token.view(b, self.steps + 1, self.places)[:, : self.steps]
        seen, order = (slot_BTS >= 0).all(1).to(torch.uint8).sort(dim=1, descending=True, stable=True)
        seen, order = seen[:, : k // self.steps].bool(), order[:, : k // self.steps]
        slot_BTP = slot_BTS.gather(2, order.unsqueeze(1).expand(-1, self.steps, -1)).clamp(min=0)
        gap = take_rows(self.z - self.h, slot_BTP.flatten(1)).view(b, self.steps, k // self.steps, d)
        return gap.masked_fill(~seen[:, None, :, None], 0.0), seen


def computing(x: Tensor) -> Tensor:
    """``x`` in promote_types(x, float32)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def take_rows(x_BND: Tensor, idx_BK: Tensor) -> Tensor:
    """Rows ``idx`` of each sample: [B, N, D], [B, K] -> [B, K, D]."""
    b, n, d = x_BND.shape
    start = torch.arange(b, device=x_BND.device).unsqueeze(1) * n
    return x_BND.reshape(b * n, d).index_select(0, (idx_BK.long() + start).reshape(-1)).view(*idx_BK.shape, d)


def token_error(z_BKD: Tensor, h_BKD: Tensor, p: float) -> Tensor:
    """mean over D of abs(z - h)^p / p, [B, K]."""
    error = (z_BKD - h_BKD).abs()
    return error.mean(-1) if p == 1 else (error**p).mean(-1) / p
