"""``build_objectives``: the named terms as one module that turns a ``LatentState`` into a loss."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vjepa_fast.config.fields import require
from vjepa_fast.config.schema import Config
from vjepa_fast.errors import ConfigError
from vjepa_fast.objectives.api import Objective, TermContext, head_generator, make_objective
from vjepa_fast.objectives.state import LatentState
from vjepa_fast.ops.latent import function


@dataclass(frozen=True)
class ObjectiveOutput:
    """``total``: scalar, sum of weight x term. ``terms``: unweighted values, detached scalars.

    ``weights``: floats; none where they were given as a tensor.
    """

    total: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, float]


class ObjectivePlan(nn.Module):
    """The loss of a run: its terms, their learnable heads and how they add up. Built by ``build_objectives``.

    ``heads`` alone has parameters: hand ``plan.parameters()`` to the optimiser and save ``plan.state_dict()``.
    All formulas run in promote_types(input, float32), whatever autocast says; for float64 features call
    ``plan.double()``.
    """

    def __init__(self, terms: dict[str, Objective], ctx: TermContext, stop_gradient: bool):
        super().__init__()
        self.terms = terms
        self.ctx = ctx
        self.stop_gradient = stop_gradient
        built = {name: term.build_head(ctx, head_generator(ctx.seed, name)) for name, term in terms.items()}
        self.heads = nn.ModuleDict({name: head for name, head in built.items() if head is not None})
        # what the terms want to know of the pairs of z, computed in one pass
        wanted = [c for term in terms.values() if term.access == "PAIR" and "z" in term.needs for c in term.lower(ctx)]
        wanted = [c for c in wanted if function(c.key).access == "PAIR" and function(c.key).everywhere]
        self.pair_calls = tuple(dict.fromkeys(wanted))

    @property
    def needs(self) -> set[str]:
        """The ``LatentState`` fields that the terms read."""
        return set().union(*(term.needs for term in self.terms.values()))

    def describe(self) -> str:
        """One line per term: coefficient, access class, where its gradient goes, parameters of its head."""
        rows = [("term", "coeff", "access", "gradient to", "head")]
        for name, term in self.terms.items():
            size = sum(p.numel() for p in self.heads[name].parameters()) if name in self.heads else 0
            rows.append((name, f"{term.coeff:g}", term.access, term.gradient_to, f"{size:,}" if size else "-"))
        widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)

    def weights(self, state: LatentState) -> dict[str, float]:
        """The coefficient in force of each term; reads of the state only where in the run it is, and its modality."""
        return {name: term.weight(state) for name, term in self.terms.items()}

    def draw(self, state: LatentState, device: torch.device) -> dict[str, Tensor]:
        """What terms draw anew for each step (`Objective.draw`), by name; reads of the state what `weights` does."""
        found = {name: term.draw(state, self.ctx, device) for name, term in self.terms.items()}
        return {name: drawn for name, drawn in found.items() if drawn is not None}

    def forward(self, state: LatentState, weights: Tensor | None = None) -> ObjectiveOutput:
        """The loss of one step.

        Args:
            state: its features.
            weights: float64 [terms] on their device, the values of `weights`: then no number that changes from step to
                step comes from the host, and with ``state.drawn`` given the work can be captured as a CUDA graph.

        Raises:
            ValueError: the state lacks something that a term needs, or its shapes disagree.
        """
        device = self._check(state)
        if not state.has("drawn"):
            state = replace(state, drawn=self.draw(state, device))
        state = state.prepared(self.stop_gradient, self.ctx.levels, self.pair_calls)
        heads = dict(self.heads.items())
        with _no_autocast(device):
            values = {name: term.value(state, heads.get(name), self.ctx) for name, term in self.terms.items()}
        in_force = self.weights(state) if weights is None else {}
        state.forget()
        factors = in_force.values() if weights is None else weights.unbind()
        # a weight of 0 keeps its graph: a zero gradient is not the same as none to AdamW or DDP
        first, *others = (
            (w.to(value.dtype) if isinstance(w, Tensor) else w) * value for w, value in zip(factors, values.values())
        )
        total = sum(others, first)
        return ObjectiveOutput(total, {name: value.detach() for name, value in values.items()}, in_force)

    def _check(self, state: LatentState) -> torch.device:
        for name, term in self.terms.items():
            missing = sorted(f for f in term.needs if not state.has(f))
            if missing:
                raise ValueError(f"objective {name} needs LatentState.{missing[0]}, which is None")
        for i, h in enumerate(state.h if state.has("h") else ()):
            if state.has("grids"):
                t, height, width = state.grids[i]
                if h.shape[1:] != (t * height * width, self.ctx.dim):
                    raise ValueError(
                        f"h[{i}] is {tuple(h.shape)}; grid {t}x{height}x{width} with {self.ctx.levels} levels of "
                        f"{self.ctx.embed_dim} channels needs [B, {t * height * width}, {self.ctx.dim}]"
                    )
        if state.has("h"):
            return state.h[0].device
        return next(x for x in (state.z, state.z_pred, state.z_context) if x)[0][0].device


def build_objectives(
    spec: Mapping[str, Any],
    *,
    levels: int,
    embed_dim: int,
    compat: str = "intended",
    target_grad: bool = False,
    stop_gradient: bool | None = None,
    seed: int = 0,
    tubelet_size: int = 2,
    patch_size: int = 16,
) -> ObjectivePlan:
    """The terms of ``spec`` ({term: {field: value}}) as a module.

    Args:
        spec: exactly these terms, in this order, each a mapping of fields or None; see docs/objectives.md.
        levels: encoder depths whose outputs are concatenated, D = levels*embed_dim.
        embed_dim: width of each.
        compat: "intended", or "published" for what the released code of arXiv:2605.17165 computes.
        target_grad: whether ``h`` carries gradient (runs without an EMA target).
        stop_gradient: detach ``h`` for every term but kinematic. None: yes under intended, no under published.
        seed: of the heads' weights and of SIGReg's directions.
        tubelet_size: frames of a token of a video.
        patch_size: side of a token in pixels.

    Raises:
        ConfigError: an unknown term, field or value; a term that can get no gradient (intended only).
    """
    require(Config, "", compat=compat)
    if not spec:
        raise ConfigError("objectives: no term is named; give at least one, such as {pred: {}}")
    ctx = TermContext(
        levels=levels, embed_dim=embed_dim, compat=compat, seed=seed, tubelet=tubelet_size, patch=patch_size
    )
    terms = {name: make_objective(name, values) for name, values in spec.items()}
    if compat == "intended":
        for name, term in terms.items():
            reason = term.refusal(ctx, target_grad)
            if reason:
                raise ConfigError(f"objectives.{name}: no gradient can reach this term: {reason}")
    return ObjectivePlan(terms, ctx, stop_gradient if stop_gradient is not None else compat == "intended")


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device_type=device.type, enabled=False)
    return contextlib.nullcontext()
