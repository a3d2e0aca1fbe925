"""Few-shot episodes on frozen features: how they are drawn, both classifiers, all options, the protocols' intervals."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid

from vjepa_fast.errors import ConfigError, DataError
from vjepa_fast.evaluation import Features, against, episode_rows, sample_episodes
from vjepa_fast.evaluation.fewshot import (
    PROTOCOLS,
    episode_protocol,
    episodes,
    evaluate_episodes,
    logistic_episodes,
    prototype_episodes,
)
from vjepa_fast.evaluation.fewshot.logistic import fit_dual, logistic_scores
from vjepa_fast.evaluation.fewshot.prototype import prototype_scores
from vjepa_fast.evaluation.intervals import student_ci95

OPTIONS = list(itertools.product(("cosine", "euclidean"), ("none", "base", "shots"), (False, True)))
BOTH = pytest.mark.parametrize("classify", [prototype_episodes, logistic_episodes])


def clouds(classes=12, per_class=25, d=16, spread=1.0, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes, d))
    y = np.repeat(np.arange(classes), per_class)
    return Features(centres[y] + spread * rng.standard_normal((len(y), d)), 3 * y + 100)  # labels with gaps


# ---------------------------------------------------------------- drawing


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


def test_draws_are_uniform_over_ordered_choices():
    labels = np.repeat([4, 7], [5, 4])
    drawn = sample_episodes(labels, way=2, shot=1, queries=1, episodes=24_000, seed=0)
    both = np.concatenate([drawn.support, drawn.query], axis=2)
    for label, size in ((4, 5), (7, 4)):
        rows = both[labels[drawn.support[:, :, 0]] == label]
        pairs, counts = np.unique(rows, axis=0, return_counts=True)
        assert len(pairs) == size * (size - 1) and stats.chisquare(counts).pvalue > 0.001
    assert 0.48 < (labels[drawn.support[:, 0, 0]] == 4).mean() < 0.52  # classes come in random order too


def test_all_samples_of_a_class_may_be_needed():
    drawn = sample_episodes(np.repeat([0, 1, 2], 6), way=3, shot=5, queries=1, episodes=50, seed=1)
    both = np.sort(np.concatenate([drawn.support, drawn.query], axis=2), axis=2)
    assert (both % 6 == np.arange(6)).all()


# ---------------------------------------------------------------- prototypes


def gaps_by_hand(metric, center, l2):
    """Score of class A minus score of class B for the query (1, 1), shots A (4, 0), (0, 2) and B (0, 1), (0, 3)."""
    return {
        # prototypes (2, 1) and (0, 2): 3 / sqrt 5 - 2 / 2; distances 1 and 2
        ("cosine", "none", False): 3 / 5**0.5 - 1,
        ("euclidean", "none", False): 2 - 1,
        # shots (1, 0), (0, 1) and (0, 1) twice, query (1, 1) / sqrt 2
        ("cosine", "none", True): 1 - 0.5**0.5,
        ("euclidean", "none", True): (2 * 0.5**0.5 - 0.5) - (2 * 0.5**0.5 - 1),
        # less (0, 1): prototypes (2, 0) and (0, 1), query (1, 0)
        ("cosine", "base", False): 1 - 0,
        ("euclidean", "base", False): 2 - 1,
        # shots (4, -1) / sqrt 17, (0, 1) and (0, 0), (0, 1)
        ("cosine", "base", True): 1 / (1 + ((17**0.5 - 1) / 4) ** 2) ** 0.5,
        ("euclidean", "base", True): (4 / 17**0.5 - (4 / 17 + (1 - 17**-0.5) ** 2 / 4)) - (0 - 1 / 4),
        # less (1, 1.5): prototypes (1, -0.5) and (-1, 0.5), query (0, -0.5)
        ("cosine", "shots", False): 2 * 0.25 / 1.25**0.5,
        ("euclidean", "shots", False): 2 - 1,
        # shots (2, -1), (-2, 1), (-2, -1) / sqrt 5, (-2, 3) / sqrt 13, query (0, -1): A's prototype is 0
        ("cosine", "shots", True): 0 + _half_b()[1] / np.hypot(*_half_b()),
        ("euclidean", "shots", True): 0 - (-2 * _half_b()[1] - np.square(_half_b()).sum()),
    }[metric, center, l2]


def _half_b():
    return np.array([-2 / 5**0.5 - 2 / 13**0.5, -1 / 5**0.5 + 3 / 13**0.5]) / 2


@pytest.mark.parametrize(("metric", "center", "l2"), OPTIONS)
@pytest.mark.parametrize("table", [True, False])
def test_prototypes_by_hand(metric, center, l2, table, monkeypatch):
    if not table:
        monkeypatch.setattr(episodes, "TABLE_BYTES", 0)
    shots_a, shots_b, query = [(4, 0), (0, 2)], [(0, 1), (0, 3)], (1, 1)
    f = Features(np.array([*shots_a, query, *shots_b, (9, -9)], float), np.array([0, 0, 0, 1, 1, 1]))
    base = Features(np.array([(-3.0, 2.0), (3.0, 0.0)]), np.array([0, 1]))
    drawn = sample_episodes(f.y, 2, 2, 1, 300, seed=0)
    seen = []

    def scores(products):
        seen.append(prototype_scores(products, 2, metric))
        return seen[-1]

    kwargs = {"base": base, "center": center, "l2": l2, "any_origin": metric == "euclidean"}
    episodes.run_episodes(f, scores, 2, 2, 1, 300, 0, **kwargs)
    scores_EMW = torch.cat(seen).double().numpy()
    found = 0
    for shots, asked, score in zip(drawn.support, drawn.query, scores_EMW):
        a = int((shots[1] < 3).all())  # the row of class A
        if set(shots[a]) == {0, 1} and set(shots[1 - a]) == {3, 4}:
            found += 1
            assert asked[a, 0] == 2
            gap = score[a, a] - score[a, 1 - a]  # the only query of row a
            assert gap == pytest.approx(gaps_by_hand(metric, center, l2), abs=1e-5)
    assert found > 5


def naive(f, drawn, metric, center, l2, base):
    """Accuracy per episode, by loops in float64."""
    out = []
    for support, query in zip(drawn.support, drawn.query):
        s, q = f.x[support].astype(float), f.x[query].astype(float)
        mean = {"none": 0, "base": base.x.astype(float).mean(0), "shots": s.mean((0, 1))}[center]
        s, q = s - mean, q - mean
        if l2:
            s, q = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (s, q))
        right = 0
        for w in range(len(s)):
            for one in q[w]:
                if metric == "cosine":
                    score = [one @ p / np.linalg.norm(p) for p in s.mean(1)]
                else:
                    score = [-np.square(one - p).sum() for p in s.mean(1)]
                right += int(np.argmax(score)) == w
        out.append(right / query.size)
    return np.array(out)


@pytest.mark.parametrize(("metric", "center", "l2"), OPTIONS)
def test_prototypes_episode_by_episode(metric, center, l2, monkeypatch):
    rng = np.random.default_rng(0)
    f = clouds(spread=2.0)
    f = Features(f.x * rng.lognormal(0, 1, (len(f.x), 1)) + 1, f.y)
    base = Features(rng.standard_normal((50, 16)) + 1.5, np.zeros(50))
    drawn = sample_episodes(f.y, 5, 3, 4, 60, seed=3)
    kwargs = {"metric": metric, "center": center, "l2": l2, "base": base}
    expected = naive(f, drawn, metric, center, l2, base)
    assert np.allclose(prototype_episodes(f, 5, 3, 4, 60, 3, **kwargs).accuracies, expected)
    monkeypatch.setattr(episodes, "TABLE_BYTES", 0)
    assert np.allclose(prototype_episodes(f, 5, 3, 4, 60, 3, chunk=7, **kwargs).accuracies, expected)


def test_the_options_matter():
    rng = np.random.default_rng(0)
    f = clouds(spread=1.0)
    f = Features((f.x + 1) * rng.lognormal(0, 1, (len(f.x), 1)), f.y)
    base = Features(np.full((3, 16), 1.0), np.zeros(3))
    found = {
        prototype_episodes(f, shot=5, episodes=400, metric=metric, center=center, l2=l2, base=base).accuracies.tobytes()
        for metric, center, l2 in OPTIONS
    }
    assert len(found) == 12 - 2  # distances alone are the same from any origin


def test_a_far_origin_does_not_cost_precision():
    f = clouds(spread=2.0)
    far = Features(f.x.astype(float) + 3000, f.y)
    near = Features(far.x.astype(float) - 3000, f.y)  # as float32 keeps it
    for classify in (lambda f: prototype_episodes(f, metric="euclidean"), lambda f: logistic_episodes(f, episodes=200)):
        assert np.array_equal(classify(far).accuracies, classify(near).accuracies)


# ---------------------------------------------------------------- logistic regression


@pytest.mark.parametrize(
    ("shot", "c", "scale", "l2"),
    [(1, 1.0, 1.0, False), (5, 1.0, 1.0, True), (3, 0.1, 0.2, False), (5, 10.0, 1.0, False)],
)
def test_logistic_agrees_with_scikit_learn(shot, c, scale, l2):
    f = clouds(d=40, spread=2.5)
    f = Features(scale * f.x + 0.5, f.y)
    if l2:
        f = Features(f.x / np.linalg.norm(f.x, axis=1, keepdims=True), f.y)
    r = logistic_episodes(f, 5, shot, 6, 10, seed=2, c=c)
    drawn = sample_episodes(f.y, 5, shot, 6, 10, seed=2)
    for e in range(10):
        s, q = drawn.support[e].ravel(), drawn.query[e].ravel()
        x = torch.from_numpy(f.x[np.concatenate([s, q])].astype(np.float64))
        gram, n = x @ x.T, len(s)
        products = episodes.Products(gram[None, :n, :n], gram[None, n:, :n], gram.diagonal()[None, n:])
        ours = logistic_scores(products, 5, c)[0].numpy()
        model = LogisticRegression(C=c, tol=1e-9, max_iter=5_000).fit(x[:n].numpy(), np.repeat(np.arange(5), shot))
        theirs = model.decision_function(x[n:].numpy())
        assert np.abs((ours - ours.mean(1, keepdims=True)) - theirs).max() < 1e-3 * np.abs(theirs).max()
        assert r.accuracies[e] == pytest.approx((model.predict(x[n:].numpy()) == np.repeat(np.arange(5), 6)).mean())
    assert 0.25 < r.mean < 0.98


def test_two_ways_are_scikit_learns_at_twice_c():
    f = clouds(d=10, spread=3.0)
    x = f.x[:50].astype(np.float64)  # two classes of 25
    centred = torch.from_numpy(x - x.mean(0))
    a, b = fit_dual((centred @ centred.T)[None], 2, 0.3)
    w = (a[0].T @ centred).numpy()
    model = LogisticRegression(C=0.6, tol=1e-10, max_iter=10_000).fit(x, np.repeat([0, 1], 25))
    assert np.allclose(w[1] - w[0], model.coef_[0], atol=1e-4)
    assert float(b[0, 0, 1] - b[0, 0, 0]) - (w[1] - w[0]) @ x.mean(0) == pytest.approx(model.intercept_[0], abs=1e-3)


@pytest.mark.parametrize(("scale", "c"), [(1e-3, 1.0), (1.0, 1.0), (30.0, 1.0), (1.0, 1e4), (1.0, 1e-6), (0.0, 1.0)])
def test_logistic_reaches_its_minimum(scale, c):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(scale * (rng.standard_normal((20, 15, 30)) + 4))
    x[:, 1] = x[:, 0]  # two equal shots
    x = x - x.mean(1, keepdim=True)
    a, b = fit_dual(x @ x.mT, 5, c)
    y = torch.eye(5, dtype=torch.float64).repeat_interleave(3, 0)
    w = (a.mT @ x).requires_grad_()
    b = b.clone().requires_grad_()
    loss = -c * (y * (x @ w.mT + b).log_softmax(2)).sum() + 0.5 * w.square().sum()
    grad_w, grad_b = torch.autograd.grad(loss, (w, b))
    assert grad_w.abs().max() <= 2e-6 * w.abs().max() * 30**0.5 + 1e-9 * c
    assert grad_b.abs().max() <= 1e-5 * c


def test_a_fit_that_does_not_converge_is_no_number():
    x = torch.randn(2, 10, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="2 of 2 episodes did not converge in 1 steps"):
        fit_dual(x @ x.mT, 5, 1.0, max_iter=1)


def test_logistic_and_centroid_agree_where_they_must():
    """The weaker C, the more does regression on balanced shots point at the class means."""
    f = clouds(spread=2.0)
    r = logistic_episodes(f, 5, 5, 8, 30, seed=4, c=1e-6)
    drawn = sample_episodes(f.y, 5, 5, 8, 30, seed=4)
    dots = []
    for support, query in zip(drawn.support, drawn.query):
        x = f.x.astype(np.float64) - f.x[support].astype(np.float64).mean((0, 1))
        score = x[query].reshape(40, -1) @ x[support].mean(1).T
        dots.append((score.argmax(1) == np.repeat(np.arange(5), 8)).mean())
    assert np.allclose(r.accuracies, dots)


# ---------------------------------------------------------------- both


@BOTH
def test_planted_signal(classify):
    assert classify(clouds(spread=0.2), episodes=300, queries=10).mean > 0.95
    assert classify(clouds(spread=0.5), shot=5, episodes=300, queries=10, l2=True, center="shots").mean > 0.95


@BOTH
def test_shuffled_labels_are_at_chance_within_the_interval(classify):
    f = clouds(classes=10, per_class=400, spread=0.2)
    inside, means = 0, []
    for seed in range(20):
        labels = np.random.default_rng(seed).permutation(f.y)
        r = classify(Features(f.x, labels), queries=1, episodes=300, seed=seed)
        inside += abs(r.mean - 0.2) <= r.ci95
        means.append(r.mean)
    assert inside >= 17  # of 20 expected 19
    assert abs(np.mean(means) - 0.2) < 3 * 0.18 / np.sqrt(20 * 300)


@pytest.mark.parametrize("l2", [False, True])
def test_nearest_centroid_of_scikit_learn(l2):
    f = clouds(spread=2.5)
    x = f.x / np.linalg.norm(f.x, axis=1, keepdims=True) if l2 else f.x
    r = prototype_episodes(f, 5, 5, 10, 30, seed=7, metric="euclidean", l2=l2, chunk=16)
    drawn = sample_episodes(f.y, 5, 5, 10, 30, seed=7)
    for e in range(30):
        s, q = drawn.support[e].ravel(), drawn.query[e].ravel()
        model = NearestCentroid().fit(x[s].astype(np.float64), f.y[s])
        assert r.accuracies[e] == pytest.approx((model.predict(x[q].astype(np.float64)) == f.y[q]).mean(), abs=1e-9)


@BOTH
def test_bad_features_and_settings_are_refused(classify):
    f = clouds(classes=6, per_class=8)
    broken = Features(np.where(np.arange(len(f.y))[:, None] == 11, np.nan, f.x), f.y, "novel")
    with pytest.raises(DataError, match="novel: features of 1 of 48 samples are not finite"):
        classify(broken, queries=2)
    with pytest.raises(DataError, match="no samples"):
        classify(f.take(np.zeros(48, bool)))
    with pytest.raises(DataError, match="7-way episodes need 7 classes, but there are 6"):
        classify(f, way=7)
    with pytest.raises(DataError, match=r"episodes need 9 samples per class \(5 shots \+ 4 queries\).* has 8"):
        classify(f, shot=5, queries=4)
    with pytest.raises(DataError, match="at least 1"):
        classify(f, shot=0, queries=4)
    with pytest.raises(ConfigError, match="needs their features"):
        classify(f, queries=2, center="base")
    with pytest.raises(ConfigError, match="unknown center 'mean'; choose from none, base, shots"):
        classify(f, queries=2, center="mean")
    with pytest.raises(DataError, match="base: 3 features per sample, but features has 16"):
        classify(f, queries=2, center="base", base=Features(np.ones((4, 3)), np.zeros(4), "base"))
    with pytest.raises(DataError, match="base: features of 4 of 4"):
        classify(f, queries=2, center="base", base=Features(np.full((4, 16), np.inf), np.zeros(4), "base"))


def test_settings_of_one_classifier():
    f = clouds(classes=6, per_class=8)
    with pytest.raises(ConfigError, match="C must be a positive number"):
        logistic_episodes(f, queries=2, c=0)
    with pytest.raises(ConfigError, match="at least 2 ways"):
        logistic_episodes(f, way=1, queries=2)
    with pytest.raises(ConfigError, match="unknown metric 'manhattan'; choose from cosine, euclidean"):
        prototype_episodes(f, queries=2, metric="manhattan")


def test_accuracy_by_sample_adds_up():
    f = clouds(spread=2.5)
    r = prototype_episodes(f, 5, 1, 4, 60, seed=1, chunk=7)
    drawn = sample_episodes(f.y, 5, 1, 4, 60, seed=1)
    asked = np.bincount(drawn.query.ravel(), minlength=len(f.y))
    assert np.isnan(r.by_sample).tolist() == (asked == 0).tolist()
    assert np.nansum(r.by_sample * asked) / asked.sum() == pytest.approx(r.mean)


def test_interval_shrinks_with_episodes_and_shots_help():
    f = clouds(spread=2.5)
    few, many = prototype_episodes(f, episodes=100), prototype_episodes(f, episodes=1600)
    assert many.ci95 == pytest.approx(few.ci95 / 4, rel=0.25)
    assert prototype_episodes(f, shot=5, episodes=400).mean > many.mean + 0.05


def test_a_difference_between_few_shot_rows_is_judged_over_clips_not_episodes():
    f = clouds(spread=2.5)
    worse = Features(f.x + np.random.default_rng(5).standard_normal(f.x.shape), f.y)
    widths, spans = [], []
    for count in (300, 3000):
        a = episode_rows("a", "pretrained", "s", f, shots=(1,), episodes=count)
        b = episode_rows("b", "random", "s", worse, shots=(1,), episodes=count)
        row = against(a, b)[0]
        assert row.difference["value"] == pytest.approx(a[0].accuracy - b[0].accuracy)
        widths.append(row.difference["high"] - row.difference["low"])
        spans.append(row.high - row.low)
    assert spans[1] < 0.5 * spans[0]
    assert widths[1] > 0.6 * widths[0]  # ten times the episodes do not make it three times as narrow


# ---------------------------------------------------------------- protocols


def test_protocols_are_the_published_ones():
    numbers = {k: (p.way, p.shots, p.queries, p.episodes, p.interval, p.group) for k, p in PROTOCOLS.items()}
    assert numbers == {
        "action": (5, (1, 5), 1, 10_000, "normal", 1),
        "meta_baseline": (5, (1, 5), 15, 8_000, "student", 4),
        "sun": (5, (1, 5), 15, 2_000, "student", 1),
    }
    p = episode_protocol("meta_baseline", shots=(3,), seed=None, way=2)
    assert (p.shots, p.seed, p.way, p.episodes) == ((3,), 0, 2, 8_000)
    assert "2,000 means of 4 episodes" in p.text and "15 queries" in p.text


def test_intervals_by_their_formulas():
    values = np.random.default_rng(0).random(8)
    mean, half = episode_protocol("action", episodes=8).ci95(values)
    assert (mean, half) == pytest.approx((values.mean(), 1.96 * values.std() / 8**0.5))
    mean, half = episode_protocol("meta_baseline", episodes=8).ci95(values)
    means = [values[:4].mean(), values[4:].mean()]
    t = 12.706204736  # 0.975 quantile with one degree of freedom
    assert (mean, half) == pytest.approx((values.mean(), t * np.std(means, ddof=1) / 2**0.5))
    low, high = stats.t.interval(0.95, 7, loc=values.mean(), scale=stats.sem(values))
    assert student_ci95(values) == pytest.approx((values.mean(), (high - low) / 2))
    with pytest.raises(ValueError, match="at least two"):
        student_ci95([0.5])


@pytest.fixture(scope="module")
def many():
    """Accuracies of 200,000 episodes of so many samples that episodes hardly share any."""
    f = clouds(classes=10, per_class=3000, d=3, spread=1.0)
    return prototype_episodes(f, queries=2, episodes=200 * 1000).accuracies


@pytest.mark.parametrize("name", ["action", "meta_baseline", "sun"])
def test_intervals_cover_the_mean_93_to_97_percent(many, name):
    protocol, truth = episode_protocol(name, episodes=200), many.mean()
    assert 0.3 < truth < 0.9
    covered = [abs(mean - truth) <= half for mean, half in map(protocol.ci95, many.reshape(1000, 200))]
    assert 0.93 < np.mean(covered) < 0.97


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"episodes": 10}, "10 cannot be averaged in groups of 4"),
        ({"episodes": 4}, "at least two means"),
        ({"way": 0}, "way: 0 is not a positive number"),
        ({"shots": ()}, "shots"),
        ({"shots": (1, 0)}, "shots"),
        ({"interval": "bootstrap"}, "unknown interval 'bootstrap'"),
        ({"rounds": 3}, "unknown field of an episode protocol 'rounds'"),
    ],
)
def test_impossible_protocols_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        episode_protocol("meta_baseline", **change)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="unknown protocol 'otam'"):
        episode_protocol("otam")
    with pytest.raises(ConfigError, match="unknown few-shot classifier 'svm'"):
        evaluate_episodes(clouds(), classifier="svm")


def test_evaluation_follows_the_protocol():
    f = clouds(spread=2.0)
    protocol = episode_protocol("meta_baseline", episodes=40, queries=3, seed=5)
    for classifier, run in (("prototype", prototype_episodes), ("logistic", logistic_episodes)):
        one, five = evaluate_episodes(f, protocol, classifier, l2=True)
        assert (one.shot, five.shot, one.queries, one.episodes) == (1, 5, 3, 40)
        alone = run(f, 5, 5, 3, 40, 5, l2=True)
        assert np.array_equal(five.accuracies, alone.accuracies)
        assert five.ci95 == protocol.ci95(alone.accuracies)[1] != alone.ci95
