import numpy as np
import pytest

from vjepa_fast.errors import DataError
from vjepa_fast.evaluation import Features, knn_probe, linear_probe, split_validation
from vjepa_fast.evaluation.probes.frozen import knn_predict

PROBES = [linear_probe, knn_probe]


def planted(n, classes=8, d=24, signal=3.0, seed=0, shuffle=False, name="planted"):
    """Noise with the label written on one channel per class; ``shuffle`` breaks the tie between both."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    x = rng.standard_normal((n, d)).astype(np.float32)
    x[np.arange(n), y] += signal
    return Features(x, rng.permutation(y) if shuffle else y, name)


@pytest.mark.parametrize("probe", PROBES)
def test_planted_signal_is_read(probe):
    r = probe(planted(400, signal=6, seed=1), planted(160, signal=6, seed=2), planted(400, signal=6, seed=3))
    assert r.accuracy > 0.95 and r.ci95[0] <= r.accuracy <= r.ci95[1] and r.n == 400
    assert r.correct.sum() == round(r.accuracy * 400)


@pytest.mark.parametrize("probe", PROBES)
def test_shuffled_labels_give_chance(probe):
    r = probe(*(planted(800, signal=6, seed=s, shuffle=True) for s in (1, 2, 3)))
    assert r.ci95[0] <= 0.125 <= r.ci95[1]


@pytest.mark.parametrize("probe", PROBES)
def test_the_choice_is_made_on_validation_never_on_test(probe):
    train, val, test = (
        planted(160, seed=1, signal=1.5),
        planted(160, seed=2, signal=1.5),
        planted(160, seed=3, signal=1.5),
    )
    other = planted(160, seed=9, signal=1.5, shuffle=True)
    first, second = probe(train, val, test), probe(train, val, other)
    assert first.chosen == second.chosen  # another test part cannot move the choice
    grid = {"c_grid": (1e-6, 1.0)} if probe is linear_probe else {"ks": (1, 150)}
    # a validation part on which only the first value of the grid can win, and one on which only the second can
    names = "C" if probe is linear_probe else "k"
    by_val = {probe(train, v, test, **grid).chosen[names] for v in _opposed(probe, train, grid, names)}
    assert by_val == set(grid.popitem()[1])


def _opposed(probe, train, grid, name):
    """Two validation parts labelled by what the probe itself predicts at each of two grid values."""
    x = planted(300, seed=5, signal=1.5).x
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


@pytest.mark.parametrize("probe", PROBES)
def test_same_inputs_same_result(probe):
    parts = [planted(200, seed=s, signal=1.0) for s in (1, 2, 3)]
    a, b = probe(*parts), probe(*parts)
    assert a.chosen == b.chosen and np.array_equal(a.correct, b.correct)


def test_linear_probe_ignores_scale_offset_and_dead_channels():
    parts = [planted(240, seed=s, signal=2.0) for s in (1, 2, 3)]
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
    r = knn_probe(planted(12, classes=2), planted(40, classes=2, seed=1), planted(40, classes=2, seed=2))
    assert r.chosen["k"] == 10
    r = knn_probe(planted(6, classes=2), planted(40, classes=2, seed=1), planted(40, classes=2, seed=2))
    assert r.chosen["k"] == 6


def test_split_validation_holds_every_class_once():
    train = planted(80)
    rest, val = split_validation(train, 0.25, seed=3)
    assert np.bincount(val.y).tolist() == [2] * 8
    assert len(rest.y) + len(val.y) == 80
    joined = {tuple(r) for r in np.r_[rest.x, val.x].tolist()}
    assert len(joined) == 80
    again = split_validation(train, 0.25, seed=3)[1]
    assert np.array_equal(again.x, val.x)


@pytest.mark.parametrize("probe", PROBES)
def test_bad_parts_are_named(probe):
    good = planted(80)
    with pytest.raises(DataError, match="wide.*25 features"):
        probe(good, good, planted(80, d=25, name="wide"))
    with pytest.raises(DataError, match="two classes"):
        probe(Features(good.x, np.zeros(80)), good, good)
    with pytest.raises(DataError, match="none: no samples"):
        probe(good, good, Features(np.zeros((0, 24)), np.zeros(0), "none"))
    broken = good.x.copy()
    broken[3, 3] = np.nan
    with pytest.raises(DataError, match="not finite"):
        probe(good, good, Features(broken, good.y))


@pytest.mark.parametrize("probe", PROBES)
def test_label_gaps_and_a_validation_part_that_is_the_test_part(probe):
    train, val, test = (planted(80, seed=s, name=n) for s, n in enumerate(("train", "val", "test")))
    kept = train.take(train.y != 3)
    with pytest.raises(DataError, match="train: no sample of label 3; number the classes"):
        probe(kept, val, test)
    with pytest.raises(DataError, match="train: label -1 is negative"):
        probe(Features(train.x, train.y - 1, "train"), val, test)
    for parts in ((val, Features(test.x, test.y + 1, "test")), (None, Features(test.x, test.y + 1, "test"))):
        with pytest.raises(DataError, match="test: label 8 is none of the training part, which has 0 to 7"):
            probe(train, *parts)
    with pytest.raises(DataError, match="val: label 8 is none of the training part"):
        probe(train, Features(val.x, val.y + 1, "val"), test)
    with pytest.raises(DataError, match="val: no samples"):
        probe(train, Features(np.zeros((0, 24)), [], "val"), test)
    with pytest.raises(DataError, match="validation and test part are the same samples"):
        probe(train, test, test)
    for name in ("train", "val", "test"):
        parts = {"train": train, "val": val, "test": test}
        parts[name] = Features(np.where(np.arange(80)[:, None] == 7, np.inf, parts[name].x), parts[name].y, name)
        with pytest.raises(DataError, match=f"{name}: features are not finite"):
            probe(*parts.values())
