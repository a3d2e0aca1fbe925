"""How a query is compared with the classes of an episode: cosine with the mean shot, or the earth mover's distance
between parts of the clips (DeepEMD, arXiv:2003.06777).

Shapes: W ways, S shots, Q queries per class, M = W*Q, d features; K nodes of a clip of width D (then d = K*D), P
problems.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from vjepa_fast.errors import ConfigError
from vjepa_fast.evaluation.extract.features import Features
from vjepa_fast.evaluation.fewshot.episodes import EpisodeResult, result_of_hits, sample_episodes
from vjepa_fast.evaluation.fewshot.prototype import prototype_episodes

if TYPE_CHECKING:
    from vjepa_fast.evaluation.fewshot.tuning.embedder import Embedder

AT_ONCE = 32  # transport problems that one call of the solver takes, as blocks of one linear programme


def episode_logits(support: Tensor, query: Tensor, temperature: Tensor | float) -> Tensor:
    """Logits ``[..., M, W]`` of queries ``[..., W, Q, d]`` against the classes of shots ``[..., W, S, d]``.

    The prototype is the mean of the shots as they are, then normalised like the queries: ``temperature`` x cosine
    (Meta-Baseline, arXiv:2003.04390, section 3.3, equation 3).
    """
    proto_EWd = F.normalize(support.mean(-2), dim=-1)
    query_EMd = F.normalize(query.flatten(-3, -2), dim=-1)
    return temperature * query_EMd @ proto_EWd.mT


class Metric:
    """The cosine between a query and the mean of a class's shots (Meta-Baseline)."""

    def represent(self, model: Embedder, x: Tensor) -> Tensor:
        """What is compared, ``[B, d]``, of clips or features ``x``."""
        return model(x)

    def logits(self, support: Tensor, query: Tensor, temperature: Tensor | float) -> Tensor:
        """Logits ``[..., M, W]`` of queries ``[..., W, Q, d]`` against the classes of shots ``[..., W, S, d]``."""
        return episode_logits(support, query, temperature)

    def episodes(
        self, features: Features, way: int, shot: int, queries: int, episodes: int, seed: int
    ) -> EpisodeResult:
        """Accuracy over episodes of what `represent` gave."""
        return prototype_episodes(features, way, shot, queries, episodes, seed)


COSINE = Metric()


@dataclass(frozen=True)
class EmdMetric(Metric):
    """DeepEMD: minus the cheapest transport between the nodes of query and class.

    ``nodes``: the token grid is averaged down to at most (t, h, w) nodes. The nodes of a class are the mean of its
    shots' (DeepEMD's structured fully connected layer starts there and trains on the shots; it is left out).
    """

    nodes: tuple[int, int, int] = (2, 2, 2)

    def __post_init__(self) -> None:
        if len(self.nodes) != 3 or min(self.nodes) < 1:
            raise ConfigError(f"nodes: {self.nodes}; expected three numbers of at least 1 (time, height, width)")

    @property
    def count(self) -> int:
        """K."""
        return math.prod(self.nodes)

    def represent(self, model: Embedder, x: Tensor) -> Tensor:
        """The nodes of clips side by side, ``[B, K*D]``. ConfigError where the grid is smaller than ``nodes``."""
        z, grid = model.tokens(x)
        if any(n > g for n, g in zip(self.nodes, grid)):
            raise ConfigError(f"nodes: {self.nodes}, but a clip has tokens of a grid {tuple(grid)}; give no more")
        z_BDTHW = z.mT.unflatten(2, tuple(grid))
        return F.adaptive_avg_pool3d(z_BDTHW, self.nodes).flatten(2).mT.flatten(1)

    def logits(self, support: Tensor, query: Tensor, temperature: Tensor | float) -> Tensor:
        """``temperature`` x similarity, in [-1, 1] before: the mean over what is moved of the nodes' cosines."""
        if support.dim() > 3:
            pairs = zip(support.flatten(0, -4), query.flatten(0, -4))
            found = torch.stack([self.logits(s, q, temperature) for s, q in pairs])
            return found.unflatten(0, support.shape[:-3])
        proto_WKD = support.mean(1).unflatten(-1, (self.count, -1))
        query_MKD = query.flatten(0, 1).unflatten(-1, (self.count, -1))
        ways, asked = len(proto_WKD), len(query_MKD)
        proto_PKD = proto_WKD.expand(asked, *proto_WKD.shape).flatten(0, 1)
        query_PKD = query_MKD[:, None].expand(asked, ways, *query_MKD.shape[1:]).flatten(0, 1)
        return temperature * emd_similarity(query_PKD, proto_PKD).unflatten(0, (asked, ways))

    def episodes(
        self, features: Features, way: int, shot: int, queries: int, episodes: int, seed: int
    ) -> EpisodeResult:
        """Accuracy over episodes, one after the other: each takes way x way x queries transport problems."""
        drawn, x = sample_episodes(features.y, way, shot, queries, episodes, seed), torch.from_numpy(features.x)
        with torch.no_grad():
            best = [self.logits(x[s], x[q], 1.0).argmax(-1) for s, q in zip(drawn.support, drawn.query)]
        hits_EM = torch.stack(best) == torch.arange(way).repeat_interleave(queries)
        return result_of_hits(hits_EM, torch.from_numpy(drawn.query).flatten(1), len(x), way, shot)


# ---------------------------------------------------------------- the earth mover's distance


def cross_weights(u_PKD: Tensor, v_PKD: Tensor) -> tuple[Tensor, Tensor]:
    """Weights ``[P, K]`` of the nodes of ``u`` and of ``v``, each summing to K: how much a node resembles the mean of
    the other clip (DeepEMD, equations 6 to 8). Where no node does, all weigh the same.
    """

    def of(a: Tensor, b: Tensor) -> Tensor:
        raw = (a @ b.mean(1, keepdim=True).mT).squeeze(-1).clamp_min(0)
        total = raw.sum(1, keepdim=True)
        return torch.where(total > 0, raw * (raw.shape[1] / total.clamp_min(1e-30)), 1.0)

    return of(u_PKD, v_PKD), of(v_PKD, u_PKD)


def emd_similarity(u_PKD: Tensor, v_PKD: Tensor) -> Tensor:
    """``[P]``: the mean, over the flow of the cheapest transport from ``u`` to ``v``, of the cosine between the nodes
    it joins (DeepEMD, equations 2 to 5, divided by K). Differentiable once.
    """
    u_PKD, v_PKD = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (u_PKD, v_PKD))
    cost_PKK = 1 - F.normalize(u_PKD, dim=-1) @ F.normalize(v_PKD, dim=-1).mT
    supply_PK, demand_PK = cross_weights(u_PKD, v_PKD)
    return 1 - Transport.apply(cost_PKK, supply_PK, demand_PK) / u_PKD.shape[1]


class Transport(torch.autograd.Function):
    """Least cost ``[P]`` of moving ``supply`` ``[P, K]`` to ``demand`` ``[P, L]`` at ``cost`` ``[P, K, L]``.

    The gradient is that of the optimum: the flow for the cost, the dual variables for supply and demand, which is what
    DeepEMD's differentiation of the optimality conditions gives for this value (section 3.3).
    """

    @staticmethod
    def forward(ctx: Any, cost: Tensor, supply: Tensor, demand: Tensor) -> Tensor:
        """Solve all problems; keeps what the gradient is made of."""
        flow, of_supply, of_demand = (
            torch.from_numpy(a).to(cost) for a in transport(*(t.detach().cpu().numpy() for t in (cost, supply, demand)))
        )
        ctx.save_for_backward(flow, of_supply, of_demand)
        return (cost * flow).sum((1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch decorator
        """Of cost, supply and demand."""
        flow, of_supply, of_demand = ctx.saved_tensors
        return grad_P[:, None, None] * flow, grad_P[:, None] * of_supply, grad_P[:, None] * of_demand


def transport(cost: np.ndarray, supply: np.ndarray, demand: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(flow ``[P, K, L]``, dual variables ``[P, K]`` and ``[P, L]``) of the cheapest transports, solved exactly as
    linear programmes by HiGHS.

    ``demand`` is scaled to the total of ``supply``. The last demand follows from the others: its dual variable is 0.
    """
    from scipy import sparse
    from scipy.optimize import linprog

    problems, rows, columns = cost.shape
    cost, supply, demand = (a.astype(np.float64) for a in (cost, supply, demand))
    demand = demand * (supply.sum(1, keepdims=True) / demand.sum(1, keepdims=True))
    leaves = sparse.kron(sparse.eye(rows), np.ones((1, columns)))
    arrives = sparse.kron(np.ones((1, rows)), sparse.eye(columns)).tocsr()[:-1]
    one = sparse.vstack([leaves, arrives])
    flow, duals = [], []
    for first in range(0, problems, AT_ONCE):
        part = slice(first, first + AT_ONCE)
        given = np.concatenate([supply[part], demand[part, :-1]], axis=1)
        matrix = sparse.block_diag([one] * len(given), format="csc")
        found = linprog(cost[part].ravel(), A_eq=matrix, b_eq=given.ravel(), bounds=(0, None), method="highs-ds")
        if found.status != 0:
            raise RuntimeError(f"the transport problem was not solved: {found.message}")
        flow.append(found.x.reshape(-1, rows, columns))
        duals.append(found.eqlin.marginals.reshape(len(given), -1))
    dual = np.concatenate(duals)
    return np.concatenate(flow), dual[:, :rows], np.pad(dual[:, rows:], ((0, 0), (0, 1)))
