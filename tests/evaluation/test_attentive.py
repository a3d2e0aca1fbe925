import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vjepa_fast.errors import DataError, TrainingError
from vjepa_fast.evaluation.extract.tokens import Tokens, from_array
from vjepa_fast.evaluation.probes import attentive
from vjepa_fast.evaluation.probes.attentive import AttentiveHeads, attentive_probe, split_views, train_heads

SMALL = {"lrs": (3e-3, 1e-3), "weight_decays": (0.01, 0.4), "num_heads": 2, "batch_size": 32, "depth": 2}


def planted(n, seed, classes=4, tokens=2, d=8, signal=8.0, shuffle=False, name="planted", views=(1, 1)):
    """Noise with the label written on one channel of one token, which the mean over tokens dilutes."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = rng.standard_normal((n, views[0] * views[1], tokens, d)).astype(np.float32)
    x[np.arange(n), :, rng.integers(tokens, size=n), y] += signal
    return from_array(x, rng.permutation(y) if shuffle else y, name, views)


class Alone(nn.Module):
    """One attentive classifier written with torch's own layers: the oracle."""

    def __init__(self, d, classes, depth, num_heads):
        super().__init__()
        self.num_heads = num_heads
        names = ("norm1", "norm2", "qkv", "proj", "fc1", "fc2")
        self.blocks = nn.ModuleList(
            nn.ModuleDict(dict(zip(names, self._layers(d, nn.Linear(d, 3 * d), nn.Linear(d, d))))) for _ in range(depth)
        )
        names = ("norm1", "norm2", "q", "kv", "fc1", "fc2")
        self.pool = nn.ModuleDict(dict(zip(names, self._layers(d, nn.Linear(d, d), nn.Linear(d, 2 * d)))))
        self.query = nn.Parameter(torch.zeros(1, d))
        self.linear = nn.Linear(d, classes)

    def _layers(self, d, first, second):
        return nn.LayerNorm(d), nn.LayerNorm(d), first, second, nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def _attend(self, q, k, v):
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)

    def forward(self, x):
        for b in self.blocks:
            x = x + b["proj"](self._attend(*b["qkv"](b["norm1"](x)).chunk(3, -1)))
            x = x + b["fc2"](F.gelu(b["fc1"](b["norm2"](x))))
        p, q = self.pool, self.query.expand(len(x), -1, -1)
        q = q + self._attend(p["q"](q), *p["kv"](p["norm1"](x)).chunk(2, -1))
        q = q + p["fc2"](F.gelu(p["fc1"](p["norm2"](q))))
        return self.linear(q[:, 0])


def alone_from(heads, g, d, classes):
    model = Alone(d, classes, heads.depth - 1, heads.num_heads)
    model.load_state_dict({k: v[g] for k, v in heads.state_dict().items()})
    return model


def test_every_head_computes_what_one_alone_does():
    torch.manual_seed(0)
    heads = AttentiveHeads(3, 8, 5, depth=3, num_heads=4)
    with torch.no_grad():
        for p in heads.parameters():
            p.normal_(std=0.3)  # every head, norm and bias its own
    x = torch.randn(6, 7, 8)
    out = heads(x)
    assert out.shape == (3, 6, 5)
    for g in range(3):
        torch.testing.assert_close(out[g], alone_from(heads, g, 8, 5)(x), atol=1e-5, rtol=1e-4)


def test_weights_start_as_v_jepa_2_starts_them():
    heads = AttentiveHeads(2, 256, 100, depth=4)
    ends = [b.proj.weight for b in heads.blocks], [b.fc2.weight for b in heads.blocks]
    for weights in ends:
        found = [w.std().item() for w in weights]
        assert found == pytest.approx([0.02 / math.sqrt(2 * (i + 1)) for i in range(3)], rel=0.02)
    assert heads.pool.fc2.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * 3), rel=0.02)
    alone = AttentiveHeads(1, 256, 100, depth=1)
    assert alone.pool.fc2.weight.std().item() == pytest.approx(0.02 / math.sqrt(2), rel=0.02)
    inner = (
        *(b.qkv for b in heads.blocks),
        *(b.fc1 for b in heads.blocks),
        heads.pool.q,
        heads.pool.kv,
        heads.pool.fc1,
    )
    for layer in inner:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.02) and not layer.bias.any()
    for p in (heads.linear.weight, heads.linear.bias):  # uniform in +-1/16
        assert p.abs().max() <= 1 / 16 and p.std().item() == pytest.approx(1 / 16 / math.sqrt(3), rel=0.15)
    assert all(torch.equal(p[0], p[1]) for p in heads.parameters())


def test_parallel_training_is_each_head_alone_with_torch_adamw():
    grid = list(itertools.product((5e-3, 1e-3), (0.01, 0.8)))
    shape = {"depth": 2, "num_heads": 2}
    trainer = attentive._Trainer(grid, 8, 4, 3, "cpu", 0, **shape)  # groups of three and one
    alone = [alone_from(AttentiveHeads(1, 8, 4, **shape), 0, 8, 4) for _ in grid]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=lr, weight_decay=wd) for m, (lr, wd) in zip(alone, grid)]
    data, steps = planted(64, 0), 8
    for step in range(steps):
        rows = np.arange(8 * step, 8 * step + 8)
        x, y = data.rows(rows)[:, 0], torch.from_numpy(data.y[rows])
        rate = 0.5 * (1 + math.cos(math.pi * step / steps))
        losses = trainer.step(x, y, rate, torch.enable_grad)
        for g, (model, optimizer) in enumerate(zip(alone, optimizers)):
            optimizer.param_groups[0]["lr"] = grid[g][0] * rate
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert losses[g].item() == pytest.approx(loss.item(), rel=1e-4)
    stacked = [{k: v[g] for k, v in m.state_dict().items()} for m, _ in trainer.groups for g in range(m.heads)]
    for found, model in zip(stacked, alone):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-3)
    assert not torch.allclose(stacked[0]["linear.weight"], stacked[1]["linear.weight"], atol=1e-4)  # wd acts


def test_a_head_of_the_grid_is_the_grid_of_that_head():
    more = {"epochs": 3, "batch_size": 16, "depth": 2, "num_heads": 2, "join": True, "seed": 3, "device": "cpu"}
    train, test = planted(48, 1), planted(64, 2, signal=3.0)
    grid = [(3e-3, 0.01), (1e-3, 0.4), (1e-4, 0.1)]
    together, losses = train_heads(train, 4, grid, heads_at_once=None, **more)
    split, split_losses = train_heads(train, 4, grid, heads_at_once=1, **more)
    np.testing.assert_allclose(losses, split_losses, rtol=1e-4)
    for g, one in enumerate(grid):
        predict, loss = train_heads(train, 4, [one], heads_at_once=1, **more)
        np.testing.assert_allclose(losses[g], loss[0], rtol=1e-4)
        assert (predict(test)[0] == together(test)[g]).mean() > 0.98


def test_planted_signal_is_read_with_the_whole_grid():
    parts = (planted(240, 1), planted(80, 2), planted(240, 3))
    r = attentive_probe(*parts, num_heads=2, batch_size=16, epochs=12)
    assert r.accuracy > 0.95 and r.ci95[0] <= r.accuracy <= r.ci95[1] and r.n == 240
    assert r.chosen["heads"] == 20 and r.chosen["lr"] in attentive.LRS and r.chosen["wd"] in attentive.WEIGHT_DECAYS
    assert r.chosen["max_over_heads_on_test"] >= r.accuracy


def test_the_seed_draws_start_and_order():
    parts = [planted(64, s, signal=3.0) for s in (1, 2, 3)]
    a, b = (attentive_probe(*parts, epochs=2, seed=s, **SMALL) for s in (0, 1))
    assert not np.array_equal(a.correct, b.correct)


def test_the_test_part_is_read_last_and_moves_no_choice(monkeypatch):
    read = []
    rows = Tokens.rows
    monkeypatch.setattr(Tokens, "rows", lambda self, index: read.append(self.name) or rows(self, index))
    train, val, test = (planted(64, i, signal=3.0, name=n) for i, n in enumerate(("train", "val", "test")))
    first = attentive_probe(train, val, test, epochs=3, **SMALL)
    at = read.index("test")
    assert set(read[:at]) == {"train", "val"} and set(read[at:]) == {"test"}
    names = ("lr", "wd", "val_accuracy")
    other = planted(64, 9, shuffle=True)
    second = attentive_probe(train, val, other, epochs=3, **SMALL)
    assert [first.chosen[k] for k in names] == [second.chosen[k] for k in names]
    # validation labelled by what one head predicts: only that head can win
    grid = list(itertools.product(SMALL["lrs"], SMALL["weight_decays"]))
    more = {"epochs": 1, "batch_size": 8, "depth": 2, "num_heads": 2, "join": True, "seed": 0, "device": "cpu"}
    predict, _ = train_heads(train, 4, grid, heads_at_once=None, **more)
    by_head = predict(val)
    assert not np.array_equal(by_head[0], by_head[2])
    for g in (0, 2):
        said = Tokens(by_head[g], val.views, val.grid, val.dim, val.shards, "val")
        r = attentive_probe(train, said, test, epochs=1, **{**SMALL, "batch_size": 8})
        assert r.chosen["lr"] == grid[g][0] and r.chosen["val_accuracy"] == 1.0


def test_max_over_heads_is_the_best_on_test_and_never_below_the_chosen():
    train, val, test = planted(64, 1, signal=3.0), planted(24, 2, shuffle=True), planted(200, 3, signal=3.0)
    r = attentive_probe(train, val, test, epochs=2, **SMALL)
    grid = list(itertools.product(SMALL["lrs"], SMALL["weight_decays"]))
    more = {"epochs": 2, "batch_size": 32, "depth": 2, "num_heads": 2, "join": True, "seed": 0, "device": "cpu"}
    predict, _ = train_heads(train, 4, grid, heads_at_once=None, **more)
    accuracies = (predict(test) == test.y).mean(1)
    assert r.chosen["max_over_heads_on_test"] == accuracies.max() > accuracies.min()
    assert r.accuracy == accuracies[grid.index((r.chosen["lr"], r.chosen["wd"]))]


def test_views_are_averaged_as_probabilities():
    """Two views say 0 faintly, one says 1 loudly: mean probability 1, most votes 0; all computed by hand."""
    trainer = attentive._Trainer([(1e-3, 0.0)], 2, 2, 1, "cpu", 0, depth=0, num_heads=1)
    model = trainer.groups[0][0]
    with torch.no_grad():
        model.linear.weight.copy_(torch.eye(2)[None])  # logits are the token itself
        model.linear.bias.zero_()
    views = [torch.tensor([[[0.2, 0.0]]]), torch.tensor([[[0.2, 0.0]]]), torch.tensor([[[0.0, 3.0]]])]
    faint, loud = 1 / (1 + math.exp(-0.2)), 1 / (1 + math.exp(3.0))
    expected = (2 * faint + loud) / 3
    found = trainer.probabilities(views, torch.no_grad)
    assert found.shape == (1, 1, 2) and found[0, 0].tolist() == pytest.approx([expected, 1 - expected], abs=1e-6)
    assert expected < 0.5 < faint


def test_clips_are_joined_and_crops_kept_apart():
    x = torch.arange(2 * 6 * 3 * 1).reshape(2, 6, 3, 1)  # 2 clips x 3 crops, 3 tokens
    joined = split_views(x, (2, 3), True)
    assert joined.shape == (2, 3, 6, 1)
    assert joined[0, 1, :, 0].tolist() == [3, 4, 5, 12, 13, 14]  # crop 1 of clip 0, then of clip 1
    assert split_views(x, (2, 3), False) is x


def test_several_views_are_used():
    """Labels are legible in half of the views of each sample only; reading all of them decides."""
    parts = []
    for seed in (1, 2, 3):
        p = planted(120, seed, views=(2, 2))
        x = p.shards[0].x
        x[:, :2] = torch.randn(x[:, :2].shape, generator=torch.Generator().manual_seed(seed))  # clip 0 says nothing
        parts.append(p)
    more = {**SMALL, "batch_size": 8, "lrs": (5e-3,)}
    assert attentive_probe(*parts, epochs=12, **more).accuracy > 0.6
    one = [from_array(p.shards[0].x[:, :1], p.y) for p in parts]
    assert attentive_probe(*one, epochs=12, **more).accuracy < 0.4


def test_number_of_attention_heads_divides_the_width():
    assert [AttentiveHeads(1, w, 2).num_heads for w in (768, 96, 40, 14, 7)] == [16, 16, 10, 14, 7]


def test_a_head_that_diverges_is_left_out():
    parts = [planted(64, s) for s in (1, 2, 3)]
    more = {**SMALL, "lrs": (1e-3, 1e30), "weight_decays": (0.01,), "epochs": 2}
    r = attentive_probe(*parts, **more)
    alone = attentive_probe(*parts, **{**more, "lrs": (1e-3,)})
    assert r.chosen["lr"] == 1e-3 and r.chosen["diverged"] == 1 and np.array_equal(r.correct, alone.correct)
    zeros = [Tokens(np.zeros(64), p.views, p.grid, p.dim, p.shards, "zeros") for p in parts[1:]]
    r = attentive_probe(parts[0], *zeros, **more)  # what is not finite reads as class 0, and would win here
    assert r.chosen["lr"] == 1e-3 and r.chosen["val_accuracy"] < 1 and r.chosen["max_over_heads_on_test"] < 1
    with pytest.raises(TrainingError, match="all 1 heads diverged"):
        attentive_probe(*parts, **{**more, "lrs": (1e30,)})


def test_the_number_of_classes_may_be_given():
    good = planted(40, 0)
    with pytest.raises(DataError, match="no sample of label 4; 5 classes are expected, found 4"):
        attentive_probe(good, good, good, classes=5, epochs=1, **SMALL)


def test_the_same_rows_are_no_validation_part_wherever_they_come_from():
    train, test = planted(32, 0), planted(32, 1, name="test")
    with pytest.raises(DataError, match="validation and test part are the same samples"):
        attentive_probe(train, test.take(np.arange(32)), test, epochs=1, **SMALL)
    attentive_probe(train, test.take(np.arange(16)), test.take(np.arange(16, 32)), epochs=1, **SMALL)
