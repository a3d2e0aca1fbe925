import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.evaluation.cases import planted_features, planted_parts, shuffled, tiny_encoder
from vjepa_fast.data import load_manifest
from vjepa_fast.errors import ConfigError, DataError, TrainingError
from vjepa_fast.evaluation import ClipSet, Features, extract_features, mean_ci95, prototype_episodes
from vjepa_fast.evaluation.extract import clips as clips_module
from vjepa_fast.evaluation.fewshot.tuning import meta_baseline as module
from vjepa_fast.evaluation.fewshot.tuning.embedder import Embedder, build_embedder, identity_projection
from vjepa_fast.evaluation.fewshot.tuning.meta_baseline import (
    MetaBaselineSettings,
    episode_logits,
    episode_loss,
    meta_baseline,
    meta_train,
    train_classifier,
)
from vjepa_fast.evaluation.fewshot.tuning.methods import METHODS, OPTIONS
from vjepa_fast.evaluation.fewshot.tuning.parts import part_of, parts_of
from vjepa_fast.evaluation.fewshot.tuning.settings import FitSettings, MetaSettings, Setup, TuneSettings, parse_trunk

QUICK = MetaBaselineSettings(
    trunk="head",
    classifier=FitSettings(epochs=20, lr=0.05, milestones=(18,)),
    meta=MetaSettings(epochs=3, steps=40, lr=1e-2, val_episodes=100),
    queries=15,
    episodes=400,
)
ONE_STEP = MetaSettings(epochs=1, steps=1, queries=3, val_queries=3, val_episodes=20)


def features():
    return planted_features(20, 0), planted_features(8, 1, 20), planted_features(10, 2, 28)


def hand_case():
    support = torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [0.0, 4.0]]])  # [W=2, S=2, d=2]
    query = torch.tensor([[[1.0, 0.0]], [[2.0, 2.0]]])  # [W=2, Q=1, d=2]
    # prototypes: (1.5, 0.5) and (0, 3). Were the shots normalised first, the first would be along (1, 1).
    cosine = torch.tensor([[3 / math.sqrt(10), 0.0], [4 / math.sqrt(20), 1 / math.sqrt(2)]])
    return support, query, cosine


def test_episode_logits_and_loss_by_hand():
    support, query, cosine = hand_case()
    logits = episode_logits(support, query, 10.0)
    assert torch.allclose(logits, 10 * cosine, atol=1e-6)
    losses = [math.log(1 + math.exp(-30 / math.sqrt(10))), math.log(1 + math.exp(40 / math.sqrt(20) - 10 / 2**0.5))]
    assert episode_loss(logits).item() == pytest.approx(sum(losses) / 2, rel=1e-6)
    # scale does not matter, and more episodes are a batch: their mean
    several = episode_logits(torch.stack([support, support.flip(0)]), torch.stack([query * 7, query]), 10.0)
    assert torch.allclose(several[0], logits, atol=1e-5) and torch.allclose(several[1], logits.flip(1), atol=1e-5)
    both = (episode_loss(several[0]) + episode_loss(several[1])) / 2
    assert episode_loss(several).item() == pytest.approx(both.item(), rel=1e-6)


def test_gradient_of_the_temperature_by_hand():
    support, query, cosine = hand_case()
    temperature = torch.tensor(10.0, requires_grad=True)
    episode_loss(episode_logits(support, query, temperature)).backward()
    p = torch.softmax(10 * cosine, 1)
    expected = ((p * cosine).sum(1) - cosine.diagonal()).mean()
    assert temperature.grad.item() == pytest.approx(expected.item(), rel=1e-5)


def test_gradient_reaches_temperature_and_the_chosen_trunk():
    base, val, novel = planted_parts()
    encoder = tiny_encoder()
    before = copy.deepcopy(encoder.state_dict())
    settings = MetaBaselineSettings(
        trunk=1, classifier=FitSettings(epochs=0), meta=ONE_STEP, episodes=20, queries=2, shots=(1,)
    )
    r = meta_baseline(encoder, base, val, novel, settings=settings)
    assert r.temperature != 10.0 and abs(r.temperature - 10) < 0.1
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())  # the caller's is left alone
    changed = {k for k, v in r.encoder.state_dict().items() if not torch.equal(v, before[k])}
    assert {"blocks.1.attn.qkv.weight", "blocks.1.mlp.fc2.weight", "norms_block.1.weight"} <= changed
    assert all(k.startswith(("blocks.1.", "norms_block.1.")) for k in changed)
    tuned = copy.deepcopy(encoder)
    tuned.load_state_dict(r.encoder.state_dict())  # what is saved can be loaded
    a, b = (extract_features(e, novel, pooling="time").x for e in (tuned, r.encoder))
    assert np.array_equal(a, b) and not np.array_equal(a, extract_features(encoder, novel, pooling="time").x)
    every = meta_baseline(encoder, base, val, novel, settings=replace(settings, trunk="all"))
    assert {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "video_mod_embed"} <= {
        k for k, v in every.encoder.state_dict().items() if not torch.equal(v, before[k])
    }


def test_planted_signal_and_shuffled_labels_on_features():
    base, val, novel = features()
    r = meta_baseline(None, base, val, novel, settings=QUICK)
    for shot in (1, 5):
        start = prototype_episodes(novel, 5, shot, 15, 400, 0)
        assert r.test["start"][shot].mean == pytest.approx(start.mean)  # the projection starts as the identity
        assert start.mean < 0.3 and r.test["meta"][shot].mean > 0.95
    assert r.test["classifier"][1].mean < r.test["meta"][1].mean
    assert r.losses["classifier"][-1] < 0.2 * r.losses["classifier"][0]
    assert len(r.validation["meta"]) == 3 and r.best_epoch == 1 + int(np.argmax(r.validation["meta"]))
    assert not r.notes and r.encoder is None
    wrong = meta_baseline(None, *(shuffled(p, i) for i, p in enumerate((base, val, novel))), settings=QUICK)
    x = wrong.model(torch.from_numpy(novel.x)).numpy()
    assert max(r.mean for r in wrong.test["meta"].values()) < 0.25
    for shot in (1, 5):
        # one order of labels serves all episodes, so that the spread is taken over orders
        orders = [prototype_episodes(shuffled(Features(x, novel.y), i), 5, shot, 15, 400, i).mean for i in range(30)]
        mean, half = mean_ci95(orders)
        assert abs(mean - 0.2) < half < 0.01


def test_planted_signal_on_clips():
    base, val, novel = planted_parts()
    settings = MetaBaselineSettings(
        pooling="mean",
        classifier=FitSettings(14, 32, "adamw", 6e-3, schedule="cosine", warmup=1),
        meta=replace(ONE_STEP, steps=5),
        episodes=300,
        queries=5,
    )
    r = meta_baseline(tiny_encoder(), base, val, novel, settings=settings)
    assert r.test["start"][1].mean < 0.5
    assert r.test["meta"][1].mean > 0.95 and r.test["meta"][5].mean > 0.95
    again = r.model(novel.clips[:3])
    assert torch.allclose(again, torch.from_numpy(extract_features(r.encoder, novel, pooling="mean").x[:3]), atol=1e-5)


def test_head_on_clips_is_the_head_on_their_features():
    base, val, novel = planted_parts()
    encoder = tiny_encoder()
    settings = MetaBaselineSettings(
        trunk="head", classifier=FitSettings(epochs=2, lr=0.01), meta=ONE_STEP, queries=5, episodes=50
    )
    a = meta_baseline(encoder, base, val, novel, settings=settings)
    b = meta_baseline(
        None, *(extract_features(encoder, p, pooling="time") for p in (base, val, novel)), settings=settings
    )
    assert np.allclose(a.losses["classifier"], b.losses["classifier"], rtol=1e-4)
    assert a.test["meta"][1].mean == pytest.approx(b.test["meta"][1].mean, abs=0.02)
    x = extract_features(encoder, novel, pooling="time").x
    assert torch.allclose(a.model(novel.clips[:4]), a.model(torch.from_numpy(x[:4])), atol=1e-5)
    assert all(torch.equal(v, encoder.state_dict()[k]) for k, v in a.encoder.state_dict().items())


def test_deterministic_and_seeded():
    parts = features()
    settings = replace(QUICK, classifier=FitSettings(epochs=2, lr=0.05), meta=ONE_STEP)
    a, b, c = (meta_baseline(None, *parts, settings=settings, seed=s) for s in (3, 3, 4))
    assert a.to_dict() == b.to_dict()
    assert all(torch.equal(v, b.model.state_dict()[k]) for k, v in a.model.state_dict().items())
    assert a.losses != c.losses and not torch.equal(a.model.projection.weight, c.model.projection.weight)


def test_novel_classes_choose_nothing():
    base, val, novel = features()
    settings = replace(QUICK, classifier=FitSettings(epochs=2, lr=0.05), meta=replace(ONE_STEP, epochs=3))
    a = meta_baseline(None, base, val, novel, settings=settings)
    b = meta_baseline(None, base, val, shuffled(novel), settings=settings)
    assert a.validation == b.validation and a.best_epoch == b.best_epoch and a.test != b.test
    assert torch.equal(a.model.projection.weight, b.model.projection.weight)


def test_the_best_epoch_on_validation_is_kept(monkeypatch):
    (base, val, _), _ = parts_of(None, *features(), QUICK, 0)

    def run(epochs, scores):
        scores = iter(scores)
        monkeypatch.setattr(module, "validate", lambda *a: next(scores))
        model = Embedder(None, identity_projection(24))
        out = meta_train(model, base, val, replace(ONE_STEP, epochs=epochs, lr=0.1))
        return out, model.projection.weight.detach()

    (losses, scores, best, temperature), weight = run(4, [0.3, 0.7, 0.7, 0.5])
    assert best == 2 and scores == [0.3, 0.7, 0.7, 0.5] and len(losses) == 4
    (_, _, _, expected), two_epochs = run(2, [0.1, 0.2])
    assert torch.equal(weight, two_epochs) and temperature == expected
    assert not torch.equal(weight, run(3, [0.1, 0.2, 0.3])[1])
    assert run(0, [])[0] == ([], [], 0, 10.0)


def test_clips_give_the_same_step_as_features():
    """Episodes of clips go one at a time, those of features together: the same mean gradient."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (24, 3, 2, 8, 8), dtype=np.uint8)
    y = np.repeat(np.arange(3), 8)
    encoder = torch.nn.Module()
    encoder.proj = torch.nn.Linear(384, 5)
    encoder.grid = lambda shape: (1, 1, 1)
    encoder.forward = lambda clip, hierarchical: encoder.proj(clip.flatten(1)[:, None])
    clips = part_of(ClipSet(torch.from_numpy(x), y, "a"), "base", encoder)
    embedder = Embedder(encoder, None, "mean")
    meta = replace(ONE_STEP, way=3, val_way=2, lr=0.05, queries=2)

    def step(model, part):
        model.load_state_dict(start)
        return meta_train(model, part, part, meta)[3], model.encoder.proj.weight.detach().clone()

    start = copy.deepcopy(embedder.state_dict())
    one = step(embedder, clips)
    together = step(embedder, replace(clips, features=True))
    assert one[0] == pytest.approx(together[0], rel=1e-6) and one[0] != 10.0
    assert torch.allclose(one[1], together[1], atol=1e-6) and not torch.equal(one[1], start["encoder.proj.weight"])


def test_portions_of_a_batch_are_the_same_step():
    base = part_of(features()[0], "base", None)

    def train(chunk):
        model = Embedder(None, identity_projection(24))
        losses = train_classifier(model, base, FitSettings(epochs=2, lr=0.02, batch_size=100), Setup(chunk))[1]
        return losses, model.projection.weight.detach()

    (a, whole), (b, portions) = train(100), train(7)
    assert np.allclose(a, b, rtol=1e-4) and torch.allclose(whole, portions, atol=1e-5)


def test_validation_classes_can_be_set_aside():
    base, _, novel = features()
    (b, v, _), notes = parts_of(None, base, None, novel, QUICK, seed=1)
    assert b.classes == 15 and v.classes == 5 and v.role == "val" and not set(b.ids) & set(v.ids)
    assert set(b.ids) | set(v.ids) == set(range(20)) and "5 of the base classes were set aside" in notes[0]
    row = v.fetch(np.array([30]))[0].numpy()
    assert base.y[np.flatnonzero((base.x == row).all(1))[0]] == v.ids[v.labels[30]]
    with pytest.raises(DataError, match="only 6 base classes, of which 5"):
        parts_of(None, planted_features(6, 0), None, novel, QUICK, 0)


def test_shared_class_numbers_are_stated():
    base, val, _ = features()
    notes = parts_of(None, base, val, planted_features(10, 2, 0), QUICK, 0)[1]
    assert len(notes) == 1 and "base and novel part share class numbers (0, 1, 2" in notes[0]


def test_a_manifest_is_read(tiny_suites, monkeypatch):
    encoder = tiny_encoder()
    encoder.clip_settings = {"num_frames": 4, "crop_size": 32, "frame_step": 2}
    source = load_manifest(tiny_suites["motion8"]["train"])
    held = part_of(source, "base", encoder)
    whole = held.fetch(np.array([5, 0]))
    assert whole.shape == (2, 3, 4, 32, 32) and held.classes == len(set(source.labels.tolist()))
    monkeypatch.setattr(clips_module, "IN_MEMORY", 0)  # larger than memory: read per batch
    for workers in (0, 2):
        assert torch.equal(
            part_of(source, "base", encoder, replace(QUICK, workers=workers)).fetch(np.array([5, 0])), whole
        )


@pytest.mark.parametrize("room", [clips_module.IN_MEMORY, 0])
def test_short_videos_hold_their_last_frame_where_asked(tiny_suites, monkeypatch, room):
    monkeypatch.setattr(clips_module, "IN_MEMORY", room)
    novel = load_manifest(tiny_suites["motion8"]["test"])  # 16 frames
    view = TuneSettings(num_frames=20, crop_size=32, frame_step=1)
    clip = part_of(novel, "novel", tiny_encoder(), replace(view, short="hold")).fetch(np.array([1]))[0]
    assert (
        clip.shape == (3, 20, 32, 32) and (clip[:, 15:] == clip[:, 15:16]).all() and (clip[:, 14] != clip[:, 15]).any()
    )
    with pytest.raises(DataError, match="frames"):
        part_of(novel, "novel", tiny_encoder(), view).fetch(np.array([1]))


def test_rates_and_trunks():
    step = FitSettings()
    assert [step.rate(e, 9, 10) for e in (0, 89, 90, 99)] == [1, 1, pytest.approx(0.1), pytest.approx(0.1)]
    cosine = FitSettings(epochs=10, schedule="cosine", warmup=2)
    assert cosine.rate(0, 0, 5) == pytest.approx(0.1) and cosine.rate(1, 4, 5) == pytest.approx(1)
    assert cosine.rate(2, 0, 5) == 1 and cosine.rate(6, 0, 5) == pytest.approx(0.5) and cosine.rate(9, 4, 5) < 0.01
    assert [parse_trunk(t) for t in ("all", "HEAD", 2, "3", "last 4 blocks", "last 1 block")] == [
        "all",
        "head",
        2,
        3,
        4,
        1,
    ]
    for bad in ("tail", 0, -1, "last blocks"):
        with pytest.raises(ConfigError, match="trunk.*accepted: all, head"):
            parse_trunk(bad)


BASE, VAL, NOVEL = features()


@pytest.mark.parametrize(
    ("parts", "settings", "error", "match"),
    [
        ((planted_features(4, 0), VAL, NOVEL), {}, DataError, "base part.*5-way episodes need 5 classes.*there are 4"),
        ((BASE, planted_features(4, 1), NOVEL), {}, DataError, "val part.*5-way.*there are 4"),
        ((BASE, VAL, planted_features(4, 2)), {}, DataError, "novel part.*5-way.*there are 4"),
        ((BASE, VAL, planted_features(5, 2, per_class=19)), {}, DataError, "novel.*5 shots.*has 19"),
        ((planted_features(9, 2, per_class=9), VAL, NOVEL), {}, DataError, "base.*1 shots.*15 queries.*has 9"),
        ((BASE, VAL, Features(np.zeros((0, 24)), [], "none")), {}, DataError, "novel part none: no samples"),
        ((Features(BASE.x, np.zeros(len(BASE.y)), "one"), VAL, NOVEL), {}, DataError, "base part one: one class"),
        (
            (Features(BASE.x * [*[1] * 23, np.nan], BASE.y, "sick"), VAL, NOVEL),
            {},
            DataError,
            "base.*480 of 480.*not finite",
        ),
        ((BASE, VAL, Features(NOVEL.x[:, :9], NOVEL.y, "thin")), {}, DataError, "unequal shape.*novel \\(9,\\)"),
        ((BASE, NOVEL, NOVEL), {}, DataError, "val and novel part are the same data"),
        ((NOVEL, VAL, NOVEL), {}, DataError, "base and novel part are the same data"),
        (
            (BASE, VAL, NOVEL),
            {"classifier": FitSettings(lr=1e30, epochs=3)},
            TrainingError,
            "classifier: the loss is.*lr",
        ),
        (
            (BASE, VAL, NOVEL),
            {"meta": replace(ONE_STEP, lr=float("inf"), steps=3)},
            TrainingError,
            "meta stage: the loss",
        ),
    ],
)
def test_bad_input(parts, settings, error, match):
    with pytest.raises(error, match=match):
        meta_baseline(None, *parts, settings=replace(QUICK, **{"classifier": FitSettings(epochs=0), **settings}))


def test_bad_settings():
    clips = planted_parts()
    with pytest.raises(DataError, match="clips need an encoder"):
        meta_baseline(None, *clips)
    with pytest.raises(ConfigError, match="'all' cannot be trained on frozen features"):
        meta_baseline(tiny_encoder(), BASE, VAL, NOVEL)
    with pytest.raises(DataError, match="clips for all parts or features for all"):
        parts_of(tiny_encoder(), BASE, clips[1], NOVEL, QUICK, 0)
    with pytest.raises(DataError, match="uint8"):
        part_of(ClipSet(torch.zeros(4, 3, 2, 8, 8), np.arange(4), "f"), "base", tiny_encoder())
    with pytest.raises(ConfigError, match="last 3 blocks of an encoder with 2"):
        build_embedder(tiny_encoder(), part_of(clips[0], "base", tiny_encoder()), replace(QUICK, trunk=3), "cpu")
    for kind, fields in (
        (MetaSettings, {"way": 1}),
        (MetaSettings, {"steps": 0}),
        (MetaSettings, {"lr": 0.0}),
        (FitSettings, {"epochs": -1}),
        (FitSettings, {"optimizer": "lion"}),
        (MetaBaselineSettings, {"way": 1}),
        (MetaBaselineSettings, {"shots": ()}),
    ):
        with pytest.raises(ConfigError):
            kind(**fields)


def test_arguments_of_the_command_line():
    from argparse import ArgumentParser

    from vjepa_fast.cli import _fewshot_tune
    from vjepa_fast.cli._fewshot_tune import add_arguments, settings_of

    assert tuple(METHODS) == _fewshot_tune.METHODS and {"val", *OPTIONS} == set(_fewshot_tune.EVERY)
    parser = ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args([])
    assert settings_of("meta-baseline", args) == MetaBaselineSettings()
    assert settings_of("sun", args) == METHODS["sun"][1]()
    args = parser.parse_args(
        [
            "--trunk",
            "2",
            "--tune-epochs",
            "30",
            "--tune-lr",
            "0.01",
            "--meta-epochs",
            "3",
            "--meta-way",
            "4",
            "--flip",
            "0",
        ]
    )
    mb, sun = settings_of("meta-baseline", args, way=4, shots=(2,)), settings_of("sun", args)
    assert (mb.trunk, mb.way, mb.shots, mb.meta.epochs, mb.meta.way) == ("2", 4, (2,), 3, 4)
    assert mb.classifier == FitSettings(30, lr=0.01, milestones=(27,))
    assert sun.augment.flip == 0 and sun.teacher.epochs == sun.student.epochs == 30 and not sun.meta.reduce_way
    assert sun.teacher.warmup == pytest.approx(0.5) and sun.student.warmup == pytest.approx(5 * 30 / 800)
    with pytest.raises(ConfigError, match="choose from meta-baseline, sun"):
        settings_of("maml", SimpleNamespace())
