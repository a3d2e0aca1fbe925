"""Latent temporal contrast: z(t) closer to h(t) than to h(t+1) by a margin (arXiv:2605.17165, LTC-JEPA)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vjepa_fast.objectives.api import Objective, TermContext, number, objective
from vjepa_fast.objectives.reduce import Entry, mean_of_entries
from vjepa_fast.objectives.rows import PairRow
from vjepa_fast.objectives.state import LatentState
from vjepa_fast.ops.latent import RowCall, RowFunction

_EPS = 1e-8  # of a norm


def _zz(z0: Tensor, z1: Tensor, h0: Tensor, h1: Tensor, p: float) -> PairRow:
    return z0 * z0, 2 * z0, torch.zeros_like(z0)


def _zh(z0: Tensor, z1: Tensor, h0: Tensor, h1: Tensor, p: float) -> PairRow:
    return z0 * h0, h0, torch.zeros_like(z0)


def _zh_later(z0: Tensor, z1: Tensor, h0: Tensor, h1: Tensor, p: float) -> PairRow:
    return z0 * h1, h1, torch.zeros_like(z0)


def _hh(z0: Tensor, z1: Tensor, h0: Tensor, h1: Tensor, p: float) -> PairRow:
    return h0 * h0, torch.zeros_like(z0), torch.zeros_like(z0)


def _hh_later(z0: Tensor, z1: Tensor, h0: Tensor, h1: Tensor, p: float) -> PairRow:
    return h1 * h1, torch.zeros_like(z0), torch.zeros_like(z0)


def _device(name: str) -> Callable[[], Any]:
    def make() -> Any:
        import triton
        import triton.language as tl

        @triton.jit
        def zz(z0: tl.tensor, z1: tl.tensor, h0: tl.tensor, h1: tl.tensor, p: tl.tensor) -> tuple[tl.tensor, ...]:
            return z0 * z0, 2 * z0, tl.zeros_like(z0)

        @triton.jit
        def zh(z0: tl.tensor, z1: tl.tensor, h0: tl.tensor, h1: tl.tensor, p: tl.tensor) -> tuple[tl.tensor, ...]:
            return z0 * h0, h0, tl.zeros_like(z0)

        @triton.jit
        def zh_later(z0: tl.tensor, z1: tl.tensor, h0: tl.tensor, h1: tl.tensor, p: tl.tensor) -> tuple[tl.tensor, ...]:
            return z0 * h1, h1, tl.zeros_like(z0)

        @triton.jit
        def hh(z0: tl.tensor, z1: tl.tensor, h0: tl.tensor, h1: tl.tensor, p: tl.tensor) -> tuple[tl.tensor, ...]:
            return h0 * h0, tl.zeros_like(z0), tl.zeros_like(z0)

        @triton.jit
        def hh_later(z0: tl.tensor, z1: tl.tensor, h0: tl.tensor, h1: tl.tensor, p: tl.tensor) -> tuple[tl.tensor, ...]:
            return h1 * h1, tl.zeros_like(z0), tl.zeros_like(z0)

        return {"zz": zz, "zh": zh, "zh_later": zh_later, "hh": hh, "hh_later": hh_later}[name]

    return make


ZZ, ZH, ZH_LATER, HH, HH_LATER = (
    RowFunction(f"ltc_{name}", "PAIR", formula, _device(name), cpp=cpp, reads=reads)
    for name, formula, cpp, reads in (
        ("zz", _zz, 3, "z"),
        ("zh", _zh, 4, "zh"),
        ("zh_later", _zh_later, 5, "zh"),
        ("hh", _hh, 6, "h"),
        ("hh_later", _hh_later, 7, "h"),
    )
)


@objective("ltc")
@dataclass(frozen=True)
class TemporalContrast(Objective):
    """mean over pairs of max(0, margin - cos(z(t), h(t)) + cos(z(t), h(t+1)))."""

    access = "PAIR"
    needs = frozenset({"z", "h", "masks_enc", "grids"})
    gradient_to = "z"
    published = {"coeff": "optimization.ltc_coeff", "margin": "optimization.ltc_margin"}

    margin: float = number(0.5)

    def lower(self, ctx: TermContext) -> tuple[RowCall, ...]:
        return ZZ(), ZH(), ZH_LATER(), HH(), HH_LATER()

    def value(self, state: LatentState, head: nn.Module | None, ctx: TermContext) -> Tensor:
        entries: list[Entry] = []
        for view in state.temporal():
            zz, zh, zh_later, hh, hh_later = (view.rows(call) * ctx.dim for call in self.lower(ctx))
            zz = zz.clamp(min=_EPS**2)  # also keeps the root's slope finite
            now = zh * (zz * hh.clamp(min=_EPS**2)).rsqrt()
            later = zh_later * (zz * hh_later.clamp(min=_EPS**2)).rsqrt()
            entries.append(view.mean((self.margin - now + later).clamp(min=0)))
        return mean_of_entries(entries, state.outputs("z"))
