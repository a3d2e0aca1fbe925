"""Contract of every registered probe, plugins included; then what linear and kNN do of their own."""

from dataclasses import replace

import numpy as np
import pytest

from vjepa_fast.errors import ConfigError, DataError
from vjepa_fast.evaluation import Features, knn_probe, linear_probe, split_validation
from vjepa_fast.evaluation.extract.tokens import from_array
from vjepa_fast.evaluation.probes import PROBES, Probe, ProbeOptions, ProbeResult
from vjepa_fast.evaluation.probes.knn import knn_predict

EVERY = pytest.mark.parametrize("name", list(PROBES))
POOLED = pytest.mark.parametrize("probe", [linear_probe, knn_probe])
FEW = ProbeOptions(epochs=6, batch_size=16)


def planted(n, classes=4, d=8, signal=8.0, seed=0, shuffle=False, name="planted"):
    """Noise with the label written on one channel per class; ``shuffle`` breaks the tie between both."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = rng.standard_normal((n, d)).astype(np.float32)
    x[np.arange(n), y] += signal
    return Features(x, rng.permutation(y) if shuffle else y, name)


def read(name, *parts, options=FEW):
    """What the probe ``name`` makes of Features; one that needs tokens sees one token per sample."""
    if PROBES[name].needs == "tokens":
        tokens = {id(p): p and from_array(p.x[:, None], p.y, p.name) for p in parts}  # the same part, the same tokens
        parts = [tokens[id(p)] for p in parts]
    return PROBES[name]()(*parts, options)


# ---------------------------------------------------------------- contract


@EVERY
def test_planted_signal_is_read(name):
    r = read(name, planted(160, seed=1), planted(80, seed=2), planted(200, seed=3))
    assert isinstance(r, ProbeResult) and isinstance(r.chosen, dict)
    assert r.accuracy > 0.95 and r.ci95[0] <= r.accuracy <= r.ci95[1] and r.n == 200
    assert r.correct.shape == (200,) and r.correct.sum() == round(r.accuracy * 200)


@EVERY
def test_shuffled_labels_give_chance(name):
    r = read(name, *(planted(400, seed=s, shuffle=True) for s in (1, 2, 3)), options=replace(FEW, epochs=2))
    assert r.ci95[0] <= 0.25 <= r.ci95[1]


@EVERY
def test_same_inputs_same_result(name):
    train, val, test = (planted(64, seed=s, signal=2.0) for s in (1, 2, 3))
    options = replace(FEW, epochs=1)
    a, b = (read(name, train, val, test, options=options) for _ in range(2))
    assert a.chosen == b.chosen and np.array_equal(a.correct, b.correct)
    other = read(name, train, val, planted(64, seed=9, shuffle=True), options=options)
    assert {k: v for k, v in a.chosen.items() if "on_test" not in k} == {
        k: v for k, v in other.chosen.items() if "on_test" not in k
    }


@EVERY
def test_without_a_validation_part_one_is_held_out(name):
    assert read(name, planted(160, seed=1), None, planted(80, seed=3)).accuracy > 0.9


TRAIN, VAL, TEST = (planted(40, seed=s, name=n) for s, n in enumerate(("train", "val", "test")))


def broken(part):
    return Features(np.where(np.arange(40)[:, None] == 7, np.inf, part.x), part.y, part.name)


@EVERY
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": TRAIN.take(TRAIN.y != 2)}, "train: no sample of label 2; number the classes"),
        ({"train": Features(TRAIN.x, TRAIN.y - 1, "train")}, "train: label -1 is negative"),
        ({"train": Features(TRAIN.x, np.zeros(40), "train")}, "train: .*at least two classes"),
        ({"train": TRAIN.take(np.zeros(40, bool))}, "train: no samples"),
        ({"train": broken(TRAIN)}, "train: features .*not finite"),
        (
            {"test": Features(TEST.x, TEST.y + 1, "test")},
            "test: label 4 is none of the training part, which has 0 to 3",
        ),
        ({"test": TEST.take(np.zeros(40, bool))}, "test: no samples"),
        ({"test": planted(40, d=9, name="test")}, "test: width 9, but train has 8"),
        ({"test": broken(TEST)}, "test: features .*not finite"),
        ({"val": Features(VAL.x, VAL.y + 1, "val")}, "val: label 4 is none of the training part"),
        ({"val": VAL.take(np.zeros(40, bool))}, "val: no samples"),
        ({"val": broken(VAL)}, "val: features .*not finite"),
        ({"val": TEST}, "validation and test part are the same samples"),
    ],
)
def test_bad_parts_are_refused(name, change, message):
    parts = {"train": TRAIN, "val": VAL, "test": TEST} | change
    if (
        "val" in change
        and read(name, TRAIN, VAL, TEST, options=replace(FEW, epochs=1)).chosen.get("selection") == "none"
    ):
        return  # it reads no validation part
    with pytest.raises(DataError, match=message):
        read(name, *parts.values(), options=replace(FEW, epochs=1))


def test_what_is_no_probe_is_not_registered():
    with pytest.raises(TypeError, match="must be a subclass of Probe"):
        PROBES.add("function", linear_probe)
    with pytest.raises(TypeError, match="needs is 'pixels'; expected features or tokens"):
        PROBES.add("pixels", type("Pixels", (Probe,), {"needs": "pixels"}))
    with pytest.raises(ConfigError, match="--probes: unknown probe 'lineer'; accepted: .*did you mean linear?"):
        PROBES.get_named("lineer", "--probes")


# ---------------------------------------------------------------- linear and kNN


@POOLED
def test_the_choice_is_made_on_validation_never_on_test(probe):
    train, test = (planted(160, 8, 24, signal=1.5, seed=s) for s in (1, 3))
    grid = {"c_grid": (1e-6, 1.0)} if probe is linear_probe else {"ks": (1, 150)}
    # a validation part on which only the first value of the grid can win, and one on which only the second can
    names = "C" if probe is linear_probe else "k"
    by_val = {probe(train, v, test, **grid).chosen[names] for v in _opposed(probe, train, grid, names)}
    assert by_val == set(grid.popitem()[1])


def _opposed(probe, train, grid, name):
    """Two validation parts labelled by what the probe itself predicts at each of two grid values."""
    x = planted(300, 8, 24, signal=1.5, seed=5).x
    values = next(iter(grid.values()))
    for value in values:
        if name == "k":
            y = knn_predict(train, x, (value,))[value]
        else:
            y = _logistic(train, x, value)
        yield Features(x, y, "val")


def _logistic(train, x, c):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train.x)
    return LogisticRegression(C=c, max_iter=500).fit(scaler.transform(train.x), train.y).predict(scaler.transform(x))


def test_linear_probe_ignores_scale_offset_and_dead_channels():
    parts = [planted(240, 8, 24, signal=2.0, seed=s) for s in (1, 2, 3)]
    plain = linear_probe(*parts)
    factor = np.logspace(-3, 3, 24)
    moved = [Features(np.c_[p.x * factor + 10 * factor, np.full((240, 3), 4.0)], p.y) for p in parts]
    assert linear_probe(*moved).accuracy == pytest.approx(plain.accuracy, abs=0.02)


def test_knn_weights_hand_computed():
    # one very near neighbour of class 1 against two far ones of class 0: the weights decide, not the count
    angles = np.deg2rad([3.0, 60.0, 62.0])
    train = Features(np.c_[np.cos(angles), np.sin(angles)], np.array([1, 0, 0]))
    query = np.array([[5.0, 0.0]], np.float32)
    assert knn_predict(train, query, (3,), temperature=0.07)[3].tolist() == [1]
    assert knn_predict(train, query, (3,), temperature=100.0)[3].tolist() == [0]
    score1, score0 = np.exp(np.cos(angles[0]) / 0.07), np.exp(np.cos(angles[1:]) / 0.07).sum()
    assert score1 > score0


def test_knn_uses_no_k_above_the_training_set():
    r = knn_probe(planted(12, 2, signal=3.0), planted(40, 2, signal=3.0, seed=1), planted(40, 2, signal=3.0, seed=2))
    assert r.chosen["k"] == 10
    r = knn_probe(planted(6, 2, signal=3.0), planted(40, 2, signal=3.0, seed=1), planted(40, 2, signal=3.0, seed=2))
    assert r.chosen["k"] == 6


def test_split_validation_holds_every_class_once():
    train = planted(80, classes=8)
    rest, val = split_validation(train, 0.25, seed=3)
    assert np.bincount(val.y).tolist() == [2] * 8
    assert len(rest.y) + len(val.y) == 80
    joined = {tuple(r) for r in np.r_[rest.x, val.x].tolist()}
    assert len(joined) == 80
    again = split_validation(train, 0.25, seed=3)[1]
    assert np.array_equal(again.x, val.x)
