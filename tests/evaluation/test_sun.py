import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tests.evaluation.cases import planted_clips, planted_features, planted_parts, shuffled, tiny_encoder
from vjepa_fast.errors import ConfigError, DataError
from vjepa_fast.evaluation import Features, against, mean_ci95, pool_tokens, prototype_episodes
from vjepa_fast.evaluation.fewshot.tuning import sun as module
from vjepa_fast.evaluation.fewshot.tuning import tune
from vjepa_fast.evaluation.fewshot.tuning.augment import Augment, paired_views, weak_views
from vjepa_fast.evaluation.fewshot.tuning.embedder import build_embedder
from vjepa_fast.evaluation.fewshot.tuning.meta_baseline import MetaBaselineSettings
from vjepa_fast.evaluation.fewshot.tuning.parts import part_of
from vjepa_fast.evaluation.fewshot.tuning.settings import FitSettings, MetaSettings, Setup
from vjepa_fast.evaluation.fewshot.tuning.sun import (
    SunSettings,
    background_tokens,
    label_clips,
    location_loss,
    soft_labels,
    sun,
    token_logits,
    train_student,
)
from vjepa_fast.evaluation.run.rows import tune_rows

FIT = FitSettings(9, 24, "adamw", 8e-3, schedule="cosine", warmup=1)
META = MetaSettings(epochs=1, steps=2, way=10, queries=3, val_queries=3, val_episodes=50, reduce_way=True)
QUICK = SunSettings(
    pooling="mean",
    teacher=FIT,
    student=FIT,
    meta=META,
    top_k=3,
    queries=5,
    episodes=300,
    augment=Augment(weak=0.02, strong=0.1, grey=0.0),
)
ONCE = replace(QUICK, teacher=replace(FIT, epochs=1), student=replace(FIT, epochs=1))


# ---------------------------------------------------------------- labels and loss


def test_soft_labels_by_hand():
    logits = torch.tensor([[[3.0, 1.0, 2.0, 0.0], [0.0, 5.0, 1.0, 4.0], [9.0, 0.0, 0.0, 1.0]]])
    background = torch.tensor([[False, False, True]])
    labels = soft_labels(logits, background, top_k=2, smoothing=0.1)
    on, off = 0.925, 0.025  # 0.1 / 4, and 0.9 more
    expected = [[on, off, on, off, off], [off, on, off, on, off], [off, off, off, off, on]]
    assert torch.allclose(labels, torch.tensor([expected]))
    assert soft_labels(logits, background, top_k=1, smoothing=0.0).tolist()[0] == [
        [1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1],
    ]
    for k in (0, 4):
        with pytest.raises(ConfigError, match=f"top_k {k} with 4 base classes; expected 1 to 3"):
            soft_labels(logits, background, top_k=k)


def test_background_by_confidence_and_by_low_motion():
    top = torch.tensor([[5.0, 1.0, 3.0, 2.0, 4.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    logits = torch.stack([top, top - 3, -9 * top], -1)  # the smallest logit says the reverse
    assert background_tokens(logits, lowest=2).tolist() == [
        [False, True, False, True, False],
        [True, True, False, False, False],
    ]
    motion = torch.tensor([[1.0, 0.5, 0.04, 0.06, 0.0], [0.0] * 5])  # the second clip stands still
    assert background_tokens(logits, motion, lowest=1, still=0.05).tolist() == [
        [False, True, True, False, True],
        [True, False, False, False, False],
    ]
    assert not background_tokens(logits, motion, lowest=0, still=0.0).any()
    with pytest.raises(ConfigError, match="background 5 of 5 tubelets"):
        background_tokens(logits, lowest=5)


def test_location_loss_value_and_gradient_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0]]], requires_grad=True)
    labels = torch.tensor([[[0.05, 0.95], [0.95, 0.05]]])
    loss = location_loss(logits, labels)
    assert loss.item() == pytest.approx((0.05 * np.log(4) + 0.95 * np.log(4 / 3) + np.log(2)) / 2, rel=1e-6)
    loss.backward()
    expected = torch.tensor([[[0.25 - 0.05, 0.75 - 0.95], [0.5 - 0.95, 0.5 - 0.05]]]) / 2
    assert torch.allclose(logits.grad, expected, atol=1e-6)


def test_location_loss_vanishes_where_the_student_agrees():
    hard = torch.tensor([[[0.0, 1.0, 0.0]]])
    logits = torch.tensor([[[0.0, 200.0, 0.0]]], requires_grad=True)
    loss = location_loss(logits, hard)
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().max() == 0
    # soft labels that do not sum to 1: no gradient where the softmax is their share
    soft = torch.tensor([[[0.95, 0.05, 0.95, 0.05]]])
    logits = (soft / soft.sum(-1, keepdim=True)).log().requires_grad_()
    location_loss(logits, soft).backward()
    assert logits.grad.abs().max() < 1e-6
    with torch.no_grad():
        assert location_loss(logits, soft) < location_loss(logits + torch.tensor([0.1, 0, 0, 0]), soft)


@pytest.mark.parametrize("pooling", ["mean", "time"])
def test_the_answers_of_tokens_average_to_that_of_the_clip(pooling):
    torch.manual_seed(0)
    grid, z = (3, 2, 2), torch.randn(2, 12, 5)
    head = nn.Linear(15 if pooling == "time" else 5, 4)
    tokens = token_logits(head, z, grid, pooling)
    assert tokens.shape == (2, 12, 4)
    assert torch.allclose(tokens.mean(1), head(pool_tokens(z, grid, pooling)), atol=1e-5)
    weight = head.weight[:, 10:] * 3 if pooling == "time" else head.weight
    assert torch.allclose(tokens[1, 9], weight @ z[1, 9] + head.bias, atol=1e-5)  # a token of the last time step


# ---------------------------------------------------------------- views


def coordinates(size=32, frames=4):
    """Clip whose pixels say where (red: column, green: row) and when (blue: frame) they are."""
    clip = torch.empty(3, frames, size, size, dtype=torch.uint8)
    clip[0], clip[1] = torch.arange(size) * 7, torch.arange(size)[:, None] * 7
    clip[2] = torch.arange(frames)[:, None, None] * 60
    return clip


def test_both_views_have_one_crop_and_one_time():
    clips = coordinates().expand(12, -1, -1, -1, -1)
    weak, strong = paired_views(clips, np.random.default_rng(0), Augment(weak=0, strong=0, grey=0, blur=0))
    assert torch.equal(weak, strong) and weak.shape == clips.shape
    assert all((weak[:, 2, f] == 60 * f).all() for f in range(4))  # frames in place
    assert (weak[:, :2] == weak[:, :2, :1]).all()  # one box for all frames
    boxes = {tuple(c[:2, 0, [0, -1], [0, -1]].flatten().tolist()) for c in weak}
    assert len(boxes) > 8  # each clip its own
    mirrored = weak[:, 0, 0, 0, 0] > weak[:, 0, 0, 0, -1]
    assert 2 <= mirrored.sum() <= 10


def test_strong_colours_move_nothing():
    generator = np.random.default_rng(1)
    smooth = torch.from_numpy(generator.uniform(90, 160, (6, 3, 4, 32, 32)).astype(np.uint8))
    augment = Augment(weak=0.1, strong=0.4, grey=0.3, blur=0)
    weak, strong = (v.float().flatten(2).mT for v in paired_views(smooth, generator, augment))
    for one, other in zip(weak, strong):
        # colour changes are affine in RGB: fitted on half of the pixels they hold on the rest, which no other crop does
        a = torch.cat([one, torch.ones(len(one), 1)], 1)
        fitted = torch.linalg.lstsq(a[::2], other[::2]).solution
        inside = ((other[1::2] > 0) & (other[1::2] < 255)).all(1)
        assert inside.float().mean() > 0.9 and ((a @ fitted)[1::2] - other[1::2])[inside].abs().max() < 3
        assert (one - other).abs().mean() > 2
        moved = other.roll(16 * 32 + 16, 0)  # what another crop would look like
        assert (a @ torch.linalg.lstsq(a, moved).solution - moved).abs().max() > 15


def test_blur_and_grey():
    clip = planted_clips([0.1], 0, per_class=1).clips
    _, grey = paired_views(clip, np.random.default_rng(0), Augment(weak=0, strong=0, grey=1, blur=0))
    assert (grey[0, 0] == grey[0, 1]).all() and (grey[0, 0] == grey[0, 2]).all()
    big = torch.nn.functional.interpolate(clip[0].float(), size=(224, 224)).to(torch.uint8)[None]
    sharp, soft = paired_views(big, np.random.default_rng(5), Augment(weak=0, strong=0, grey=0, blur=1))
    assert (soft.float().diff(dim=-1).square().mean() < 0.8 * sharp.float().diff(dim=-1).square().mean()).item()
    assert (soft.float() - sharp.float()).mean().abs() < 1


def test_views_are_seeded():
    clips = planted_clips([0.1, 0.5], 0, per_class=2).clips
    a, b, c = (weak_views(clips, np.random.default_rng(s), Augment()) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


# ---------------------------------------------------------------- training


def stage(pooling="mean"):
    base = part_of(planted_parts()[0], "base", tiny_encoder())
    settings = replace(ONCE, pooling=pooling, student=FitSettings(1, 72, lr=1e-3))
    return base, settings, *(build_embedder(tiny_encoder(), base, settings, "cpu", per_token=True) for _ in range(2))


def test_the_teacher_sees_weak_views_and_the_student_strong_ones(monkeypatch):
    base, settings, teacher, student = stage()
    seen = {"teacher": [], "student": []}
    pair = (torch.full((72, 3, 4, 32, 32), 50, dtype=torch.uint8), torch.full((72, 3, 4, 32, 32), 200).byte())
    monkeypatch.setattr(module, "paired_views", lambda clips, generator, augment: pair)
    for name, model in (("teacher", teacher), ("student", student)):

        def tokens(x, own=model.tokens, name=name):
            seen[name].append(x.unique().tolist())
            return own(x)

        model.tokens = tokens
    before = copy.deepcopy(teacher.state_dict())
    start = copy.deepcopy(student.state_dict())
    losses, location = train_student(student, teacher, nn.Linear(24, 12), base, settings, Setup(72))
    assert seen["teacher"] == [[50], [50]] and seen["student"][1:] == [[200], [200]]  # [0]: its width is looked up
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not all(torch.equal(v, start[k]) for k, v in student.state_dict().items())
    assert len(losses) == len(location) == 1 and 0.5 * location[0] < losses[0]


def test_the_weight_of_the_location_loss_counts():
    def run(weight):
        base, settings, teacher, student = stage("time")
        torch.manual_seed(0)
        head = nn.Linear(48, 12)
        losses, location = train_student(student, teacher, head, base, replace(settings, location_weight=weight))
        return losses[0] - weight * location[0], student.state_dict()["encoder.blocks.0.mlp.fc1.weight"]

    (none, a), (some, b) = run(0.0), run(0.5)
    assert none == pytest.approx(np.log(12), rel=0.1) and some == pytest.approx(none, rel=0.02)
    assert not torch.equal(a, b)  # its gradient reaches the encoder


def test_labels_of_clips_use_motion():
    base, settings, teacher, _ = stage()
    clip = torch.full((1, 3, 4, 32, 32), 100, dtype=torch.uint8)
    clip[0, :, 1::2, :8, 8:16] = 255  # only the tubelets at row 0, column 1 change
    labels = label_clips(teacher, nn.Linear(24, 12), clip, replace(settings, background=0))
    assert labels.shape == (1, 32, 13)
    background = labels[0, :, 12] > 0.5
    assert background.logical_not().nonzero().flatten().tolist() == [1, 17]
    assert (
        not label_clips(teacher, nn.Linear(24, 12), clip, replace(settings, background=0, still=0))[0, :, 12]
        .gt(0.5)
        .any()
    )


def test_planted_signal_and_shuffled_labels():
    base, val, novel = planted_parts()
    r = sun(tiny_encoder(), base, val, novel, settings=QUICK)
    assert r.test["start"][1].mean < 0.5
    for name in ("teacher", "student", "meta"):
        assert r.test[name][1].mean > 0.95 and r.test[name][5].mean > 0.95
    assert r.losses["student"][-1] < r.losses["student"][0] and r.losses["location"][-1] < r.losses["location"][0]
    assert set(r.validation) == set(r.test) == {"start", "teacher", "student", "meta"} and not r.notes
    wrong = sun(tiny_encoder(), shuffled(base), shuffled(val), shuffled(novel), settings=ONCE)
    x = torch.cat([wrong.model(c) for c in novel.clips.split(24)]).numpy()
    for shot in (1, 5):
        orders = [
            prototype_episodes(shuffled(Features(x, novel.labels), i), 5, shot, 5, 400, i).mean for i in range(30)
        ]
        mean, half = mean_ci95(orders)
        assert abs(mean - 0.2) < half < 0.01


def test_deterministic_and_the_way_is_reduced():
    hues = np.arange(16) / 16
    parts = planted_clips(hues[:6], 0, per_class=6), *(planted_clips(hues[a : a + 5], a, a, 9) for a in (6, 11))
    a, b, c = (sun(tiny_encoder(), *parts, settings=replace(ONCE, episodes=20, shots=(1,)), seed=s) for s in (1, 1, 2))
    assert a.to_dict() == b.to_dict() and a.losses != c.losses
    assert all(torch.equal(v, b.encoder.state_dict()[k]) for k, v in a.encoder.state_dict().items())
    assert a.notes == ["meta stage: 10-way asked for, but 6 base classes; 6-way taken"]
    with pytest.raises(DataError, match="base part.*10-way episodes need 10 classes.*there are 6"):
        sun(tiny_encoder(), *parts, settings=replace(ONCE, meta=replace(META, reduce_way=False)))


def test_a_method_by_its_name_and_its_rows():
    base, val, novel = planted_parts()
    few = {"trunk": "head", "episodes": 30, "shots": (1,), "queries": 2}
    r = tune("sun", tiny_encoder(), base, val, novel, settings=replace(ONCE, **few), seed=1)
    frozen = tiny_encoder().state_dict()
    assert all(torch.equal(v, frozen[k]) for k, v in r.encoder.state_dict().items())
    assert not torch.equal(r.model.projection.weight, torch.eye(24))
    rows = tune_rows(r, label="mine", kind="pretrained", suite="hues")
    assert [row.probe for row in rows] == [f"sun {s} 1-shot" for s in ("start", "teacher", "student", "meta")]
    assert rows[3].accuracy == r.test["meta"][1].mean and rows[3].chance == 0.2 and len(rows[3].hits) == len(novel)
    control = [replace(row, kind="random") for row in rows]
    assert [row.difference["value"] for row in against(rows, control)] == [0.0] * 4
    with pytest.raises(ConfigError, match="'protonet'; choose from meta-baseline, sun, sun-d"):
        tune("protonet", None, base, val, novel)
    with pytest.raises(ConfigError, match="settings must be SunSettings, got MetaBaselineSettings"):
        tune("sun", tiny_encoder(), base, val, novel, settings=MetaBaselineSettings())


def test_bad_input():
    parts = planted_parts()
    features = planted_features(12, 0), planted_features(6, 1, 20), planted_features(6, 2, 40)
    with pytest.raises(DataError, match="sun labels tubelets and needs clips"):
        sun(None, *features, settings=replace(QUICK, trunk="head"))
    for fields, match in (
        ({"top_k": 12}, "top_k 12 with 12 base classes"),
        ({"background": 32}, "background 32 of 32 tubelets"),
        ({"pooling": "meanstd"}, "pooling 'meanstd'; accepted: mean, time"),
    ):
        with pytest.raises(ConfigError, match=match):
            sun(tiny_encoder(), *parts, settings=replace(QUICK, **fields))
