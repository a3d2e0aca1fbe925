"""Readouts: planted signals that one pooling or transform alone can read, and what the choice may and may not see."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from tests.evaluation.cases import planted_features, planted_parts, tiny_encoder
from vjepa_fast.errors import ConfigError, DataError
from vjepa_fast.evaluation import (
    ClipSet,
    Features,
    Readout,
    extract_features,
    logistic_episodes,
    pool_tokens,
    readout_rows,
)
from vjepa_fast.evaluation.extract.features import POOLINGS, extract_poolings
from vjepa_fast.evaluation.fewshot import EpisodeProtocol
from vjepa_fast.evaluation.readout import Transform, attentive, choose, fit, read, readout_features
from vjepa_fast.evaluation.readout.probing import Reading

FRAMES, SIDE = 8, 4
COSINES = [Readout("last", pooling, "standard") for pooling in POOLINGS]


class Eye(nn.Module):
    """The pixels themselves as tokens: grid (F, H, W), width 3; counts the clips that it sees."""

    levels, embed_dim, clips = 1, 3, 0
    clip_settings = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}

    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def grid(self, shape):
        return tuple(shape[2:])

    def forward(self, clip, hierarchical=True):
        self.clips += len(clip)
        return clip.flatten(2).mT


def clips_of(draw, classes, seed, per_class=16):
    """ClipSet of ``draw(rng, class) -> [3, F, S, S]`` around 0, in pixels around grey."""
    rng = np.random.default_rng(seed)
    x = np.stack([draw(rng, c) for c in classes for _ in range(per_class)])
    x = x + rng.normal(0, 2, x.shape)
    clips = torch.from_numpy((128 + x).clip(0, 255).astype(np.uint8))
    return ClipSet(clips, np.repeat(classes, per_class), f"{draw.__name__}{seed}", f"{draw.__name__}-{seed}")


def parts_of(draw, count):
    """(base, val, novel) of classes that are apart."""
    order = np.random.default_rng(5).permutation(count)
    return [clips_of(draw, order[i::3][:8], i) for i in range(3)]


def whole(x):
    """[3, F] at every pixel."""
    return np.broadcast_to(x[:, :, None, None], (3, FRAMES, SIDE, SIDE))


def speed(rng, c):
    """Each channel goes up and down, the same far, 1, 2 or 4 times as often by class; where it starts is random."""
    period = [(2, 4, 8)[(c // 3**k) % 3] for k in range(3)]
    at = np.arange(FRAMES)
    return whole(np.stack([rng.choice([-30, 30]) * (1 - 2 * (at // (p // 2) % 2)) for p in period]))


def contrast(rng, c):
    """How much each channel varies over space, by class; all of it also flickers, more or less by clip."""
    spread = np.array([(10, 20, 40)[(c // 3**k) % 3] for k in range(3)])
    board = np.indices((SIDE, SIDE)).sum(0) % 2 * 2 - 1
    flicker = rng.uniform(0, 8, (3, 1)) * rng.choice([-1, 1], (3, FRAMES)) + rng.normal(0, 10, (3, 1))
    return spread[:, None, None, None] * board * rng.choice([-1, 1]) + whole(flicker)


def order(rng, c):
    """One flash per channel, never at an end and no two at once: when, by class."""
    times = [t for t in np.ndindex(3, 3, 3) if len(set(t)) == 3] + [t for t in np.ndindex(6, 6, 6) if len(set(t)) == 3]
    x = np.zeros((3, FRAMES))
    for channel, t in enumerate(sorted(set(times))[c]):
        x[channel, 1 + t] = 60
    return whole(x)


def spot(rng, c):
    """One bright pixel whose other channels have the class's colour, among dark pixels of any colour; all stand."""
    x = rng.uniform(-100, 100, (3, 1, SIDE, SIDE))
    x[0] = rng.uniform(-100, -80, x[0].shape)
    angle = 2 * np.pi * c / 24
    x[:, 0, rng.integers(SIDE), rng.integers(SIDE)] = 110, 100 * np.cos(angle), 100 * np.sin(angle)
    return x.repeat(FRAMES, 1)


# ---------------------------------------------------------------- poolings


def test_poolings_of_differences_by_hand():
    z = torch.tensor([[[0.0, 4.0], [2.0, 4.0], [4.0, 4.0], [10.0, 4.0]]])  # T=2, two places, D=2
    spread = float(np.std([0, 2, 4, 10]))
    tdiff = pool_tokens(z, (2, 1, 2), "tdiff")[0].tolist()
    assert tdiff == pytest.approx([4, 4, spread, 0, 6, 0, 6, 0])
    sal = pool_tokens(z, (2, 1, 2), "sal")[0].tolist()
    weighted = (4 * (0 + 4) + 16 * (2 + 10)) / (2 * 4 + 2 * 16)
    assert sal == pytest.approx([weighted - 4, 0, np.sqrt(10), 0, 6, 0])


@pytest.mark.parametrize("z", [torch.randn(3, 4, 5), torch.randn(3, 1, 5).repeat(1, 4, 1)])
def test_images_and_clips_that_stand_have_differences_of_zero(z):
    grid = (1, 2, 2) if z[0, 0, 0] != z[0, 1, 0] else (4, 1, 1)
    tdiff, sal = (pool_tokens(z, grid, p) for p in ("tdiff", "sal"))
    assert not tdiff[:, 10:].any() and not sal.any() and torch.equal(tdiff[:, :10], pool_tokens(z, grid, "meanstd"))


def test_all_poolings_and_levels_from_one_pass_are_those_of_a_pass_each(tmp_path):
    encoder, clips = tiny_encoder(), planted_parts()[1]
    keys = [(level, pooling) for level in ("last", "all") for pooling in POOLINGS]
    for where in (None, tmp_path, tmp_path):  # written, then read
        bank = extract_poolings(encoder, clips, keys, cache_dir=where)
        assert list(bank) == keys
        for level, pooling in keys:
            alone = extract_features(encoder, clips, level=level, pooling=pooling)
            assert np.array_equal(bank[level, pooling].x, alone.x)


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize(("draw", "wanted"), [(speed, "tdiff"), (contrast, "meanstd"), (order, "time")])
def test_a_planted_signal_is_read_by_the_pooling_that_has_it(draw, wanted):
    base, val, novel = parts_of(draw, 24)
    choice = choose(Eye(), base, val, candidates=COSINES, episodes=100)
    assert choice.readout.pooling == wanted and choice.readout.name == f"last/{wanted}/standard/cosine"
    others = [s.score for s in choice.table[1:]]
    assert choice.table[0].score > max(others) + 0.03 and len(choice.table) == len(POOLINGS)
    rule = EpisodeProtocol("x", 5, (1, 5), 5, 200)
    found = {r.name: [a.mean for a in read(Eye(), fit(Eye(), r, base), novel, rule)] for r in COSINES}
    assert max(found, key=lambda name: sum(found[name])) == choice.readout.name
    assert found[choice.readout.name][1] > 0.6


def test_standardised_features_win_over_a_background_of_huge_variance():
    base, val = (planted_features(8, seed, first=20 * seed, signal=11, width=12, noise=0.0) for seed in (1, 2))
    for part in (base, val):
        part.x[:, 0] += np.random.default_rng(len(part)).normal(0, 60, len(part))
    choice = choose(None, {("last", "mean"): base}, {("last", "mean"): val}, episodes=100)
    assert choice.readout.transform.startswith("standard")
    scores = {s.readout.name: s.score for s in choice.table}
    best = {t: scores[f"last/mean/{t}/cosine"] for t in ("none", "centre", "standard")}
    assert best["standard"] > max(best["none"], best["centre"]) + 0.2


def test_attention_learns_on_base_classes_where_to_look():
    base, val, novel = parts_of(spot, 24)
    choice = choose(Eye(), base, val, episodes=100)
    assert choice.readout.pooling == "attentive" and not choice.notes
    rest = [s.score for s in choice.table if s.readout.pooling != "attentive"]
    assert choice.table[0].score > max(rest) + 0.2
    rule = EpisodeProtocol("x", 5, (5,), 5, 200)
    plain = read(Eye(), fit(Eye(), Readout("last", "mean", "standard"), base), novel, rule)[0].mean
    assert read(Eye(), choice, novel, rule)[0].mean > plain + 0.3
    assert choice.attentive.query.argmax() == 0  # the bright pixel is looked at


def test_each_clip_passes_once_and_a_seed_repeats_bit_by_bit():
    base, val, novel = parts_of(speed, 24)
    encoder = Eye()
    one = choose(encoder, base, val, seed=3, episodes=40)
    assert encoder.clips == len(base) + len(val) and len({s.readout.key for s in one.table}) == 6
    read(encoder, one, novel, EpisodeProtocol("x", 5, (1,), 5, 20))
    assert encoder.clips == len(base) + len(val) + len(novel)
    two = choose(Eye(), base, val, seed=3, episodes=40)
    assert json.dumps(one.to_dict()) == json.dumps(two.to_dict())
    assert np.array_equal(readout_features(encoder, one, novel).x, readout_features(encoder, two, novel).x)
    assert choose(Eye(), base, val, seed=4, episodes=40).to_dict() != one.to_dict()


def test_ties_go_to_the_simpler():
    x = np.repeat(np.eye(4), 8, 0)
    bank = {(level, "mean"): Features(x, np.repeat(np.arange(4), 8)) for level in ("last", "all")}
    choice = choose(None, bank, bank, episodes=10)
    assert choice.table[0].score == choice.table[-1].score == 1 and choice.readout.name == "last/mean/none/cosine"


def test_raw_pixels_by_the_same_rule_and_rows():
    base, val, novel = planted_parts()
    choice = choose("pixels", base, val, episodes=20)
    assert choice.readout.key == ("input", "pixels") and len(choice.table) == 8
    rows = readout_rows("raw", "pixels", "s", "pixels", choice, novel, EpisodeProtocol("x", 5, (1, 5), 3, 20))
    assert [r.probe for r in rows] == ["1-shot", "5-shot"] and rows[0].chosen["name"] == choice.readout.name
    with pytest.raises(ConfigError, match=r"raw pixels have no last/mean"):
        choose("pixels", base, val, candidates=[Readout("last", "mean")])


def test_still_images_have_a_readout():
    base, val, _ = (ClipSet(p.clips[:, :, :1], p.labels, p.hash, p.name, images=True) for p in planted_parts())
    choice = choose(tiny_encoder(), base, val, images="single", episodes=20, attentive=False)
    assert {s.readout.key for s in choice.table} == {(level, p) for level in ("last", "all") for p in POOLINGS}


def test_base_clips_of_one_class_or_too_many_train_no_attention(monkeypatch):
    base, val, _ = parts_of(speed, 24)
    unlabelled = ClipSet(base.clips, np.zeros_like(base.labels), "u", "unlabelled")
    choice = choose(Eye(), unlabelled, val, episodes=10)
    assert "unlabelled has fewer than two classes" in choice.notes[0]
    monkeypatch.setattr(attentive, "TOKEN_BYTES", 4 * len(base) * FRAMES * SIDE**2 * 3 - 1)
    choice = choose(Eye(), base, val, episodes=10)
    assert "attentive pooling left out: the tokens of 128 base clips" in choice.notes[0]
    assert not any(s.readout.pooling == "attentive" for s in choice.table)
    with pytest.raises(DataError, match="left out"):
        fit(Eye(), Readout("last", "attentive"), base)


def test_few_clips_per_class_and_few_classes_make_small_episodes():
    val = planted_features(3, 1, per_class=4)
    rule = choose(None, {("last", "mean"): val}, {("last", "mean"): val}, episodes=10).validation
    assert (rule.way, rule.shots, rule.queries) == (3, (1,), 3)


def test_what_cannot_be_chosen_on_is_refused():
    good, key = planted_features(6, 1), ("last", "mean")
    wrong = good.x.copy()
    wrong[3, 2] = np.nan
    for base, val, message in (
        (good, Features(wrong, good.y, "bad"), "bad: features of 1 of 144 samples are not finite"),
        (Features(wrong, good.y, "bad"), good, "bad: features of 1 of 144 samples are not finite"),
        (good, planted_features(1, 1), "1 validation classes; .* at least two"),
        (good, Features(good.x[:6], np.arange(6), "few"), "few: a class has 1 clips"),
    ):
        with pytest.raises(DataError, match=message):
            choose(None, {key: base}, {key: val})
    with pytest.raises(ConfigError, match="no features of last/time"):
        choose(None, {key: good}, {key: good}, candidates=[Readout()])
    with pytest.raises(DataError, match="give --base"):
        fit(Eye(), Readout(transform="centre"), None)


# ---------------------------------------------------------------- parts of a readout


def test_transforms_take_base_statistics_and_leave_constant_dimensions_out():
    rng = np.random.default_rng(0)
    x = np.c_[
        rng.normal(5, 3, 50), np.full(50, 1000.0) + rng.normal(0, 1e-3, 50), rng.normal(0, 1e-3, 50), np.zeros(50)
    ]
    base, other = Features(x, np.zeros(50)), Features(rng.normal(1000, 100, (4, 4)), np.zeros(4))
    standard = Transform.fit("standard", base)
    mine = standard(base).x
    assert mine.std(0) == pytest.approx([1, 0, 1, 0], abs=1e-5) and abs(mine.mean(0)).max() < 1e-5
    assert not standard(other).x[:, [1, 3]].any()  # as large as they are there
    assert np.allclose(Transform.fit("centre", base)(other).x, other.x - base.x.mean(0), rtol=1e-5)
    assert np.linalg.norm(Transform.fit("standard+l2", base)(other).x, axis=1) == pytest.approx(1)
    assert np.array_equal(Transform.fit("none", None)(other).x, other.x)
    zero = Transform.fit("centre+l2", Features(np.ones((2, 3)), np.zeros(2)))
    assert not zero(Features(np.ones((1, 3)), np.zeros(1))).x.any()


def test_shots_in_few_dimensions_have_a_fit():
    x = planted_features(5, 1, signal=3, width=6, noise=0.0).x[:, :3]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)  # 25 shots span 3 dimensions
    features = Features(np.c_[unit, 1e-4 * unit], np.repeat(np.arange(5), 24))
    assert logistic_episodes(features, 5, 5, 10, 100, c=1000.0).mean > 0.7


def test_names_and_dicts_of_readouts():
    for readout in (*COSINES, Readout("input", "pixels"), Readout("all", "sal", "standard+l2", "logistic", 0.1)):
        assert Readout.from_name(readout.name) == Readout.from_dict(readout.to_dict()) == readout
        assert json.loads(json.dumps(readout.to_dict()))["name"] == readout.name
    for name, message in (
        ("tdiff", "expected level/pooling/transform/classifier"),
        ("last/tdif/none/cosine", "unknown pooling of a readout 'tdif'.*did you mean tdiff"),
        ("all/attentive/none/cosine", "unknown pooling"),
        ("last/mean/white/cosine", "unknown transform of a readout"),
        ("last/mean/none/svm", "unknown classifier of a readout"),
        ("last/mean/none/logistic", "C is None"),
        ("last/mean/none/cosine=1", "C is 1.0"),
        ("last/mean/none/logistic=-1", "C is -1.0"),
        ("last/mean/none/logistic=x", "C is 'x'"),
    ):
        with pytest.raises(ConfigError, match=message):
            Readout.from_name(name)
    assert Reading.from_name("all/sal/centre").name == "all/sal/centre"
    for name in ("last/tdiff/standard/cosine", "last/attentive/none", "last/mean/standard+l2"):
        with pytest.raises(ConfigError, match="readout"):
            Reading.from_name(name)
