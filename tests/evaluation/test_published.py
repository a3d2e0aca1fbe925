"""The published evaluation: its settings, its clips, and a planted signal per task that only its own probe can read."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vjepa_fast.data import load_manifest
from vjepa_fast.data.manifests.manifest import Manifest
from vjepa_fast.errors import DataError, UserError
from vjepa_fast.evaluation import Features, get_task, published_probe
from vjepa_fast.evaluation.extract.tokens import from_array
from vjepa_fast.evaluation.probes.published import PublishedHead, published_parts, published_settings
from vjepa_fast.evaluation.run.probe import ProbeProtocol

TASKS = ("diving48", "ssv2", "imagenet100", "ucf101", "motion8")


def settings(name):
    return published_settings(get_task(name))


def test_settings_are_those_of_the_scripts():
    found = {n: (s.tokens, s.head, s.lr, s.weight_decay, s.epochs, s.batch_size) for n in TASKS if (s := settings(n))}
    assert found == {
        "diving48": ("all", "attention", 1e-3, 0.01, 100, 16),
        "ssv2": ("mean", "attention", 1e-3, 0.01, 100, 16),
        "imagenet100": ("mean", "linear", 1e-3, 0.01, 50, 256),
        "ucf101": ("all", "attention", 3e-4, 0.01, 100, 16),
        "motion8": ("all", "attention", 3e-4, 0.01, 100, 32),
    }
    assert all(
        (s.level, s.num_frames, s.spread, s.short) == ("last", 16, "whole", "hold") for s in map(settings, TASKS)
    )
    assert (settings("motion8").geometry, settings("motion8").storage) == ("native", "float32")
    assert {(settings(n).geometry, settings(n).storage) for n in TASKS[:-1]} == {("short_side", "float16")}
    rows = [published_settings(get_task(n), "mixed_4gpu_fwm_ld").epochs for n in TASKS]
    assert rows == [50, 50, 50, 100, 100]
    assert not published_settings(get_task("k400")).known and not published_settings(None).known


def test_the_protocol_takes_them_over():
    p = ProbeProtocol(name="published", task="ssv2", level="all", pooling="time", probes=("linear",), clips=4).settled()
    found = (
        p.level,
        p.pooling,
        p.probes,
        p.epochs,
        p.num_frames,
        p.spread,
        p.short,
        p.geometry,
        p.clips,
        p.probe_batch,
    )
    assert found == ("last", "mean", ("published",), 100, 16, "whole", "hold", "short_side", 1, 16)
    assert p.extraction()["geometry"] == "short_side" and "dtype" not in p.extraction()
    p = ProbeProtocol(name="published", task="motion8", epochs=7, probe_batch=5).settled()
    assert (p.epochs, p.probe_batch, p.storage, p.extraction()["dtype"]) == (7, 5, "float32", torch.float32)
    assert ProbeProtocol(name="published", task="diving48", row="mixed_4gpu_hw_ld").settled().epochs == 50
    for protocol, message in (
        (ProbeProtocol(name="other"), "unknown protocol 'other'; choose from vjepa_fast, published"),
        (ProbeProtocol(probes=("lineer",)), "probes: unknown probe 'lineer'.*did you mean linear?"),
        (ProbeProtocol(probes=("published",)), "give --protocol published"),
        (ProbeProtocol(task="motion9"), "task: unknown evaluation task 'motion9'.*did you mean motion8?"),
    ):
        with pytest.raises(UserError, match=message):
            protocol.settled()


# ---------------------------------------------------------------- the probe


class Plain(nn.Module):
    """The published probe as it is described: self-attention of all tokens, of which the first is read."""

    def __init__(self, width, classes):
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.attention = nn.MultiheadAttention(width, 8, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, classes)

    def forward(self, x):
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        x = self.norm(x + self.attention(x, x, x)[0])
        return self.linear(x[:, 0])


def test_the_head_is_plain_self_attention_read_at_the_cls_token():
    head, plain = PublishedHead(24, 5), Plain(24, 5)
    with torch.no_grad():
        for p in head.parameters():
            p.normal_(std=0.3)
    plain.load_state_dict(head.state_dict())
    x = torch.randn(6, 7, 24)
    for model in (head, plain):
        F.cross_entropy(model(x), torch.arange(6) % 5).backward()
    torch.testing.assert_close(head(x), plain(x), atol=1e-5, rtol=1e-4)
    for (name, a), b in zip(head.named_parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-3, msg=name)
    start = PublishedHead(768, 5, seed=3)
    assert start.cls.std().item() == pytest.approx(0.02, rel=0.1) and start.attention.num_heads == 8
    assert torch.equal(start.linear.weight, PublishedHead(768, 5, seed=3).linear.weight)
    assert torch.equal(
        PublishedHead(8, 2, "linear")(x[..., :8]), PublishedHead(8, 2, "linear")(x[..., :8].mean(1)[:, None])
    )


def test_training_is_adamw_at_a_constant_rate(monkeypatch):
    asked = []
    step = torch.optim.AdamW.step
    note = lambda self, *a: asked.append([(g["lr"], g["weight_decay"]) for g in self.param_groups]) or step(self, *a)  # noqa: E731
    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    published_probe(in_one_token(40, 1), in_one_token(20, 2), settings("ucf101"), epochs=3)
    assert asked == [[(3e-4, 0.01)]] * 9  # three batches of at most 16


def in_one_token(n, seed, classes=4):
    """The label on one channel of one token, taken off another one: the mean of the tokens does not have it."""
    rng = np.random.default_rng(seed)
    y, x = np.arange(n) % classes, rng.standard_normal((n, 6, 16)).astype(np.float32)
    x -= x.mean(1, keepdims=True)
    places = rng.permuted(np.tile(np.arange(6), (n, 1)), axis=1)
    x[np.arange(n), places[:, 0], y] += 6
    x[np.arange(n), places[:, 1], y] -= 6
    return from_array(x, y, "planted")


def in_the_length(n, seed):
    """The label is how far the mean token lies from the origin, on either side: no linear function of it."""
    rng = np.random.default_rng(seed)
    y, x = np.arange(n) % 2, 0.1 * rng.standard_normal((n, 16)).astype(np.float32)
    x[:, 0] += rng.choice([-1, 1], n) * np.where(y, 3, 0.3)
    return Features(x, y, "planted")


def in_the_mean(n, seed, classes=4):
    """The label on one channel of the mean token, under noise that is far larger and sums to zero over the tokens."""
    rng = np.random.default_rng(seed)
    y, x = np.arange(n) % classes, 300 * rng.standard_normal((n, 6, 16))
    x -= x.mean(1, keepdims=True)
    x[np.arange(n), :, y] += 3
    return from_array(x.astype(np.float32), y, "planted")


@pytest.mark.parametrize(
    ("name", "plant", "chance", "wrong"),
    [
        ("diving48", in_one_token, 0.25, ("ssv2", "imagenet100")),
        ("ssv2", in_the_length, 0.5, ("imagenet100",)),
        ("imagenet100", in_the_mean, 0.25, ("diving48", "motion8")),
        ("ucf101", in_one_token, 0.25, ("ssv2", "imagenet100")),
        ("motion8", in_one_token, 0.25, ("ssv2", "imagenet100")),
    ],
)
def test_only_the_tasks_own_probe_reads_the_planted_signal(name, plant, chance, wrong):
    train, test = plant(240, 1), plant(240, 2)
    epochs = {"diving48": 12, "ssv2": 20, "imagenet100": 150, "ucf101": 25, "motion8": 40}[name]
    right = published_probe(train, test, settings(name), epochs=epochs)
    assert right.accuracy > 0.95 and right.chosen["selection"] == "none" and right.chosen["epochs"] == epochs
    assert right.chosen["head"] == settings(name).head and right.chosen["batch"] == settings(name).batch_size
    for other in wrong:
        assert published_probe(train, test, settings(other), epochs=6).accuracy < chance + 0.15


def test_features_are_rounded_to_half_precision_and_views_refused():
    x = np.full((8, 3), 1 + 2**-12, np.float32)
    x[::2] = 1  # the two are one number in half precision
    part = Features(x, np.arange(8) % 2)
    assert published_probe(part, part, settings("imagenet100"), epochs=1).accuracy == 0.5
    with pytest.raises(DataError, match="too large for float16"):
        published_probe(Features(1e5 * x, part.y), part, settings("imagenet100"))
    views = from_array(np.zeros((4, 2, 1, 8), np.float32), np.arange(4) % 2, views=(2, 1))
    with pytest.raises(DataError, match="reads one view, got 2 x 1"):
        published_probe(views, views, settings("diving48"))


# ---------------------------------------------------------------- the clips that are taken


def listed(n):
    return Manifest("list", "list.csv", [f"{i}.mp4" for i in range(n)], np.arange(n) % 8, "video")


def test_the_list_of_synthetic_motion_is_split_and_ucf101_drawn():
    parts = published_parts({"train": listed(200)}, settings("motion8"))
    assert [len(parts[p]) for p in ("train", "test")] == [160, 40]
    assert parts["train"].paths == listed(160).paths and parts["test"].paths[0] == "160.mp4"
    assert parts["test"].labels.tolist() == (np.arange(160, 200) % 8).tolist()
    both = {"train": listed(20), "val": listed(3), "test": listed(10)}
    found = published_parts(both, settings("motion8"))
    assert {p: len(m) for p, m in found.items()} == {"train": 20, "test": 10}

    long = {"train": listed(2600), "test": listed(800)}
    drawn = published_parts(long, settings("ucf101"))
    assert [len(drawn[p]) for p in ("train", "test")] == [2000, 500]
    assert drawn["train"].paths != listed(2000).paths and len(set(drawn["train"].paths)) == 2000
    again = published_parts(long, settings("ucf101"))
    assert again["train"].paths == drawn["train"].paths and drawn["train"].hash != long["train"].hash
    assert len(published_parts(long, settings("ucf101"), every=True)["train"]) == 2600
    assert len(published_parts(both, settings("ucf101"))["train"]) == 20


def test_load_manifest_gives_what_is_drawn_from(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("".join(f"{i}.mp4 {i % 8}\n" for i in range(10)))
    parts = published_parts({"train": load_manifest(path)}, settings("motion8"))
    assert [len(parts[p]) for p in ("train", "test")] == [8, 2]
