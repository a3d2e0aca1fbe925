"""The published probe: its settings by task, and what it sees."""

import numpy as np
import pytest

from vjepa_fast.errors import UserError
from vjepa_fast.evaluation import AttentiveHeads, Features, get_task, published_probe
from vjepa_fast.evaluation.probes.published import published_settings
from vjepa_fast.evaluation.run.probe import ProbeProtocol


def planted(n, seed):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 4
    x = rng.standard_normal((n, 8)).astype(np.float32)
    x[np.arange(n), y] += 6
    return Features(x, y)


def test_settings_are_those_of_the_result_files():
    found = {name: published_settings(get_task(name)) for name in ("ssv2", "diving48", "imagenet100", "ucf101")}
    assert [p.epochs for p in found.values()] == [100, 100, 50, 100]
    assert [p.head for p in found.values()] == ["attention", "linear", "linear", "linear"]
    assert {(p.lr, p.weight_decay, p.pooling, p.level, p.spread) for p in found.values()} == {
        (1e-3, 0.01, "mean", "last", "whole")
    }
    p = ProbeProtocol(name="published", task="ssv2", level="all", pooling="time", probes=("linear",)).settled()
    assert (p.level, p.pooling, p.probes, p.epochs, p.num_frames, p.spread) == (
        "last",
        "mean",
        ("published",),
        100,
        16,
        "whole",
    )
    assert ProbeProtocol(name="published", epochs=7).settled().epochs == 7
    for protocol, message in (
        (ProbeProtocol(name="other"), "unknown protocol 'other'; choose from vjepa_fast, published"),
        (ProbeProtocol(probes=("lineer",)), "probes: unknown probe 'lineer'.*did you mean linear?"),
        (ProbeProtocol(probes=("published",)), "give --protocol published"),
        (ProbeProtocol(task="motion9"), "task: unknown evaluation task 'motion9'.*did you mean motion8?"),
    ):
        with pytest.raises(UserError, match=message):
            protocol.settled()


@pytest.mark.parametrize("task", ["ssv2", "diving48"])
def test_the_probe_sees_one_token_and_reads_a_planted_signal(task, monkeypatch):
    shapes, forward = set(), AttentiveHeads.forward
    monkeypatch.setattr(AttentiveHeads, "forward", lambda self, x: shapes.add(x.shape[1:]) or forward(self, x))
    settings = published_settings(get_task(task))
    r = published_probe(planted(200, 1), planted(200, 2), settings, epochs=40, batch_size=20)
    assert shapes == {(1, 8)} and r.accuracy > 0.95
    assert r.chosen["tokens"] == 1 and r.chosen["selection"] == "none" and r.chosen["head"] == settings.head
