import numpy as np
import pytest
from sklearn.neighbors import NearestCentroid

from vjepa_fast.errors import DataError
from vjepa_fast.evaluation import Features, against, episode_rows, prototype_episodes, sample_episodes
from vjepa_fast.evaluation.fewshot import centred


def clouds(classes=12, per_class=25, d=16, spread=1.0, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes, d))
    y = np.repeat(np.arange(classes), per_class)
    return Features(centres[y] + spread * rng.standard_normal((len(y), d)), y + 100)


def test_episodes_are_well_formed_and_seeded():
    labels = np.array([5, 5, 5, 5, 7, 7, 7, 7, 7, 9, 9, 9, 9, 11, 11, 11, 11, 11])
    e = sample_episodes(labels, way=3, shot=1, queries=3, episodes=200, seed=4)
    assert e.support.shape == (200, 3, 1) and e.query.shape == (200, 3, 3)
    both = np.concatenate([e.support, e.query], axis=2)
    drawn = labels[both]
    assert (drawn == drawn[:, :, :1]).all()  # a row is one class
    assert all(len(set(row[:, 0])) == 3 for row in drawn)  # distinct classes
    assert all(len(set(row)) == 4 for episode in both for row in episode)  # distinct samples
    again = sample_episodes(labels, 3, 1, 3, 200, 4)
    assert np.array_equal(again.support, e.support)
    assert not np.array_equal(sample_episodes(labels, 3, 1, 3, 200, 5).support, e.support)
    counts = np.unique(drawn[:, :, 0], return_counts=True)[1]
    assert counts.min() > 110 and counts.sum() == 600  # every class about equally often (150 each)


def test_hand_computed():
    # two classes; cosine puts the query (1, 3) with the second class, the euclidean distance with the first
    x = np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 3.0], [0.0, 100.0], [0.0, 100.0], [0.0, 100.0]])
    f = Features(x, np.array([0, 0, 0, 1, 1, 1]))
    drawn = sample_episodes(f.y, 2, 2, 1, 400, seed=0)
    cosine = prototype_episodes(f, 2, 2, 1, 400, seed=0)
    euclidean = prototype_episodes(f, 2, 2, 1, 400, seed=0, metric="euclidean")
    # class 0's own query: (1,3) -> cos with mean (1,1) = .894 < cos with (0,1) = .949: wrong;
    # (1,1) against the mean of (1,1) and (1,3) = (1,2): .949 > .707: right
    outlier = (drawn.query == 2).any((1, 2))
    assert np.allclose(cosine.accuracies, np.where(outlier, 0.5, 1.0))
    assert np.allclose(euclidean.accuracies, 1.0)
    share = outlier.mean()
    assert cosine.mean == pytest.approx(1 - share / 2)
    assert cosine.ci95 == pytest.approx(1.96 * 0.5 * np.sqrt(share * (1 - share)) / 20)


def test_agrees_with_nearest_centroid_episode_by_episode():
    f = clouds(spread=2.5)
    r = prototype_episodes(f, 5, 5, 10, 40, seed=7, metric="euclidean", chunk=16)
    drawn = sample_episodes(f.y, 5, 5, 10, 40, seed=7)
    for e in range(40):
        s, q = drawn.support[e].ravel(), drawn.query[e].ravel()
        model = NearestCentroid().fit(f.x[s].astype(np.float64), f.y[s])
        assert r.accuracies[e] == pytest.approx((model.predict(f.x[q].astype(np.float64)) == f.y[q]).mean(), abs=1e-9)
    assert 0.3 < r.mean < 0.99


def test_planted_signal_and_shuffled_labels():
    f = clouds(spread=0.2)
    assert prototype_episodes(f, episodes=300, queries=10).mean > 0.95
    noise = Features(np.random.default_rng(1).standard_normal((600, 32)), np.arange(600) % 12)
    r = prototype_episodes(noise, episodes=2000, queries=10)
    assert (
        abs(r.mean - 0.2) < 3 * r.ci95 + 0.01
    )  # the same 600 samples recur, so the episodes' interval is a little narrow


def test_interval_shrinks_with_episodes_and_shots_help():
    f = clouds(spread=2.5)
    few, many = prototype_episodes(f, episodes=100), prototype_episodes(f, episodes=1600)
    assert many.ci95 == pytest.approx(few.ci95 / 4, rel=0.25)
    assert prototype_episodes(f, shot=5, episodes=400).mean > many.mean + 0.05


def test_impossible_episodes_are_refused():
    f = clouds(classes=4, per_class=6)
    with pytest.raises(DataError, match="5-way episodes need 5 classes"):
        prototype_episodes(f)
    with pytest.raises(DataError, match="6 samples|has 6"):
        prototype_episodes(f, way=3, shot=1, queries=15)
    with pytest.raises(ValueError, match="metric"):
        prototype_episodes(f, way=3, queries=2, metric="manhattan")


def test_accuracy_by_sample_adds_up():
    f = clouds(spread=2.5)
    r = prototype_episodes(f, 5, 1, 4, 60, seed=1, chunk=7)
    drawn = sample_episodes(f.y, 5, 1, 4, 60, seed=1)
    asked = np.bincount(drawn.query.ravel(), minlength=len(f.y))
    assert np.isnan(r.by_sample).tolist() == (asked == 0).tolist()
    assert np.nansum(r.by_sample * asked) / asked.sum() == pytest.approx(r.mean)


def test_a_difference_between_few_shot_rows_is_judged_over_clips_not_episodes():
    f = clouds(spread=2.5)
    worse = Features(f.x + np.random.default_rng(5).standard_normal(f.x.shape), f.y)
    widths, spans = [], []
    for episodes in (300, 3000):
        a = episode_rows("a", "pretrained", "s", f, shots=(1,), episodes=episodes)
        b = episode_rows("b", "random", "s", worse, shots=(1,), episodes=episodes)
        row = against(a, b)[0]
        assert row.difference["value"] == pytest.approx(a[0].accuracy - b[0].accuracy)
        widths.append(row.difference["high"] - row.difference["low"])
        spans.append(row.high - row.low)
    assert spans[1] < 0.5 * spans[0]
    assert widths[1] > 0.6 * widths[0]  # ten times the episodes do not make it three times as narrow


def test_centring_by_the_base_classes_removes_what_all_share():
    f = clouds(spread=0.5)
    shared = Features(f.x + 50, f.y)
    base = shared.take(np.arange(len(f.y)) % 2 == 0)
    assert prototype_episodes(centred(shared, base), shot=1, queries=10, episodes=200).mean > 0.9
    assert np.allclose(centred(base, base).x.mean(0), 0, atol=1e-4)
