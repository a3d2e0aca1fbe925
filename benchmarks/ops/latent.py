"""The latent losses, as one loss block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.ops._inputs import GRID, LEVELS, Case, E, Inputs, N, forced
from vjepa_fast import ops
from vjepa_fast.ops import _latent_rows, latent
from vjepa_fast.reference import losses
from vjepa_fast.reference.step import normalize_levels


class _Given(torch.nn.Module):
    """In the place of a head: hands out, in turn, outputs that were computed before."""

    def __init__(self, outputs: list[Tensor]):
        super().__init__()
        self.outputs, self.turn = outputs, 0

    def forward(self, _):
        self.turn = (self.turn + 1) % len(self.outputs)
        return self.outputs[self.turn - 1]


@contextlib.contextmanager
def transparent() -> Iterator[None]:
    """The latent skeletons as plain PyTorch, for torch.compile to look into; autograd derives the backward."""

    def token(*args):
        return _latent_rows.token(_latent_rows.Token(*args[:-1]), keep=False)

    def pair(*args):
        return _latent_rows.pair(_latent_rows.Pair(*args))

    kept = latent._token, latent._pair
    latent._token, latent._pair = token, pair
    try:
        yield
    finally:
        latent._token, latent._pair = kept


def latent_loss(x: Inputs) -> Case:
    """The loss block of ``fwm_hw_ld`` from raw targets to gradients: target normalisation, prediction, hard regions,
    distance-weighted context, static appearance, latent dynamics under hard weighting.

    Matrix products are left out on all sides: the head's outputs are given (and receive gradient), and the
    cross-covariance is not asked for. The reference is also given the distances, ours computes them.
    """
    from vjepa_fast.objectives import LatentState, build_objectives

    d = LEVELS * E
    enc, pred = x.masks()
    h = 2 * x.randn(x.batch, N, d, seed=1) + 0.5
    z_pred = [x.randn(*m.shape, d, seed=2 + j, grad=True) for j, m in enumerate(pred)]
    z_context = [x.randn(*m.shape, d, seed=4 + j, grad=True) for j, m in enumerate(enc)]
    z = [x.randn(*m.shape, d, seed=6 + j, grad=True) for j, m in enumerate(enc)]
    change = [x.randn(*m.shape, d, seed=8 + j, grad=True) for j, m in enumerate(enc)]
    distances = [[ops.mask_distance(e, p, GRID) for e, p in zip(enc, pred)]]

    def published():
        target = [normalize_levels(losses.full(h), LEVELS)]
        masks_e, masks_p = [enc], [pred]
        turn = iter(change)

        def head(_):  # the rows that the published code would pass through it: those that start a pair
            c = next(turn)
            j = next(j for j, e in enumerate(change) if e is c)
            Z, V = losses.to_grid(losses.full(c), enc[j], GRID)
            return Z[:, :-1][losses.pair_mask(V)]

        return (
            losses.token_loss([z_pred], target, masks_p)
            + losses.hard_weighted_loss([z_pred], target, masks_p)
            + 0.5 * losses.token_loss([z_context], target, masks_e, weights=distances)
            + 0.05 * losses.fwm_static_loss([z], [GRID], masks_e)
            + losses.ld_loss([z], target, [GRID], masks_e, head, 0, 1.0, grad_under_hard=True)
        )

    plan = build_objectives(
        {
            "pred": {},
            "hw": {},
            "context": {"coeff": 0.5, "warmup": [0, 0], "weight_distance": True},
            "fwm_static": {"coeff": 0.05},
            "ld": {"hidden_dim": 1, "hard_weighting": 1.0},
        },
        levels=LEVELS,
        embed_dim=E,
    )

    def loss(*given: Tensor) -> Tensor:
        """Of the leaves, in their order."""
        n = len(enc)
        predicted, context, features, heads = (list(given[n * i : n * (i + 1)]) for i in range(4))
        plan.heads["ld"] = _Given(heads)
        state = LatentState(
            grids=[GRID],
            h=[h],
            z=[features],
            z_pred=[predicted],
            z_context=[context],
            masks_enc=[[*enc]],
            masks_pred=[[*pred]],
            step=0,
            total_steps=1,
            h_normalized=False,
        )
        return plan(state).total

    leaves = [*z_pred, *z_context, *z, *change]

    def ours() -> Tensor:
        return loss(*leaves)

    def plain(*given: Tensor) -> Tensor:
        with transparent():
            return loss(*given)

    read = sum(t.numel() for t in leaves) * x.size + h.numel() * x.size
    written = sum(t.numel() for t in leaves) * x.size
    shape = f"B{x.batch} D{d} {'+'.join(str(m.shape[1]) for m in pred)} predicted"
    return Case(
        "latent_loss",
        shape,
        {"reference": published, "eager": forced("eager", ours), "fused": ours},
        leaves=leaves,
        compile_=plain,
        recorded=True,
        floor_bytes=read,
        floor_full=read + written,
        atol=1e-4 if x.size == 4 else 2e-2,
    )


CASES = {"latent_loss": latent_loss}
