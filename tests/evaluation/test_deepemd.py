"""DeepEMD's metric and SUN-D: transport against brute force, weights by hand, gradients, a signal only parts have."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.evaluation.cases import planted_parts, tiny_encoder
from vjepa_fast.errors import ConfigError
from vjepa_fast.evaluation import Features
from vjepa_fast.evaluation.fewshot.tuning import tune
from vjepa_fast.evaluation.fewshot.tuning.augment import Augment
from vjepa_fast.evaluation.fewshot.tuning.metric import COSINE, EmdMetric, cross_weights, emd_similarity, transport
from vjepa_fast.evaluation.fewshot.tuning.settings import FitSettings, MetaSettings
from vjepa_fast.evaluation.fewshot.tuning.sun import SunDSettings, SunSettings


def brute(cost, supply, demand):
    """Least cost of whole supplies and demands: every way to send unit after unit."""
    from_, to = (np.repeat(np.arange(len(x)), x) for x in (supply, demand))
    return min(sum(cost[i, j] for i, j in zip(from_, order)) for order in itertools.permutations(to))


def test_transport_is_the_cheapest_of_all():
    rng = np.random.default_rng(0)
    supply, demand = (np.array(x) for x in ([[2, 1, 3], [1, 1, 4]] * 20, [[1, 4, 1], [2, 2, 2]] * 20))
    cost = rng.uniform(size=(40, 3, 3))  # more problems than one call of the solver takes
    flow, of_supply, of_demand = transport(cost, supply, demand)
    assert (flow >= 0).all()
    np.testing.assert_allclose(flow.sum(2), supply, atol=1e-9)
    np.testing.assert_allclose(flow.sum(1), demand, atol=1e-9)
    for p in range(40):
        assert (cost[p] * flow[p]).sum() == pytest.approx(brute(cost[p], supply[p], demand[p]), abs=1e-9)
    value = (of_supply * supply).sum(1) + (of_demand * demand).sum(1)  # strong duality: both are the optimum
    np.testing.assert_allclose(value, (cost * flow).sum((1, 2)), atol=1e-9)
    flow, _, _ = transport(cost[:1, :2], np.ones((1, 2)), np.ones((1, 3)))  # unequal totals: the demand is scaled
    np.testing.assert_allclose(flow.sum(1), 2 / 3)


def test_weights_and_similarity_by_hand():
    u, v = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[4.0, 0.0], [0.0, 2.0]]])
    supply, demand = cross_weights(u, v)  # means (2, 1) and (0.5, 1): products 2, 2 and 2, 2
    assert supply.tolist() == [[1, 1]] and demand.tolist() == [[1, 1]]
    assert emd_similarity(u, v).item() == pytest.approx(1)  # each node meets its like
    supply, _ = cross_weights(
        torch.tensor([[[3.0, 0.0], [1.0, 0.0], [-5.0, 0.0], [0.0, 9.0]]]), torch.ones(1, 4, 2) * v[:, :1]
    )
    assert supply.tolist() == [[3, 1, 0, 0]]
    supply, _ = cross_weights(-u, v)
    assert supply.tolist() == [[1, 1]]  # none resembles it: all the same
    wrong_way = torch.tensor([[[0.0, 5.0], [5.0, 0.0]]])
    assert emd_similarity(u, wrong_way).item() == pytest.approx(1)  # where a node lies does not matter
    assert emd_similarity(u, -u).item() == pytest.approx(0)  # crosswise: cosines of 0, not of -1


def test_gradients_are_those_of_the_optimum():
    g = torch.Generator().manual_seed(0)
    u, v = (torch.randn(2, 3, 4, generator=g, dtype=torch.float64).add(0.8).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(emd_similarity, (u, v), eps=1e-6, atol=1e-5)


def in_the_parts(classes, per_class, seed):
    """Clips of four nodes in random order, in pairs about one mean that all classes share: only which nodes there are
    tells the class."""
    rng = np.random.default_rng(seed)
    common, own = 3 * np.eye(12)[0], np.eye(12)[1:]
    y = np.repeat(np.arange(classes), per_class)
    x = np.stack([np.stack([common + 3 * s * own[2 * c + i] for i in range(2) for s in (-1, 1)]) for c in y])
    x = np.stack([clip[rng.permutation(4)] for clip in x])
    return Features((x + 0.05 * rng.standard_normal(x.shape)).reshape(len(y), -1), y, "parts")


def test_only_the_earth_movers_distance_reads_a_signal_in_the_parts():
    parts, metric = in_the_parts(5, 8, 0), EmdMetric((1, 2, 2))
    for shot in (1, 3):
        r = metric.episodes(parts, 5, shot, 2, 20, 0)
        assert r.accuracies.mean() == r.mean > (0.95 if shot == 1 else 0.5) and (r.way, r.shot, r.queries) == (
            5,
            shot,
            2,
        )
    pooled = Features(parts.x.reshape(len(parts), 4, -1).mean(1), parts.y)
    assert COSINE.episodes(pooled, 5, 1, 2, 400, 0).mean < 0.35
    one = metric.logits(
        *(torch.from_numpy(parts.x[i]) for i in (np.arange(0, 40, 8)[:, None], np.arange(1, 41, 8)[:, None])), 2.0
    )
    assert one.shape == (5, 5) and one.diagonal().min() > 1.9 > one.fill_diagonal_(0).max()
    several = metric.logits(torch.zeros(2, 5, 1, 48), torch.ones(2, 5, 3, 48), 1.0)
    assert several.shape == (2, 15, 5)


def test_sun_d_is_a_method_by_its_name():
    fit = FitSettings(1, 24, "adamw", 8e-3)
    meta = MetaSettings(
        epochs=1, steps=1, episodes_per_step=1, way=3, queries=1, val_queries=1, val_episodes=5, temperature=12.5
    )
    few = {"pooling": "mean", "teacher": fit, "student": fit, "meta": meta, "top_k": 3, "queries": 1, "episodes": 5}
    settings = SunDSettings(**few, shots=(1,), augment=Augment(weak=0.02, strong=0.1, grey=0.0))
    base, val, novel = planted_parts()
    r = tune("sun-d", tiny_encoder(), base, val, novel, settings=settings)
    assert r.method == "sun-d" and list(r.test) == ["start", "teacher", "student", "meta"] and r.metric == EmdMetric()
    assert r.best_epoch == 1 and r.temperature != 12.5 and np.isfinite(r.losses["meta"][0])
    assert r.to_dict()["settings"]["nodes"] == (2, 2, 2)
    with pytest.raises(ConfigError, match=r"nodes: \(3, 2, 2\), but a clip has tokens of a grid \(2, 4, 4\)"):
        tune("sun-d", tiny_encoder(), base, val, novel, settings=replace(settings, nodes=(3, 2, 2)))
    with pytest.raises(ConfigError, match="expected three numbers of at least 1"):
        EmdMetric((0, 2, 2))
    with pytest.raises(ConfigError, match="settings must be SunSettings, got SunDSettings"):
        tune("sun", tiny_encoder(), base, val, novel, settings=settings)
    assert SunSettings().metric is COSINE
