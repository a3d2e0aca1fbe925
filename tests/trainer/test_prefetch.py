"""Batches one step ahead: the same steps, in the same order, with the same errors, as without."""

import contextlib
import dataclasses
import functools
import json
from types import SimpleNamespace

import pytest
import torch

from vjepa_fast.config import schema
from vjepa_fast.data.synthetic import render_suite
from vjepa_fast.errors import DataError
from vjepa_fast.trainer import checkpoint, prefetch, streams, train, trainer
from vjepa_fast.trainer.prefetch import Prefetcher, Staged, to_device
from vjepa_fast.trainer.step import TrainStep

from .conftest import batch, config

CPU = torch.device("cpu")

VOLATILE = ("clips_per_s", "tokens_per_s", "step_flops", "mfu", "peak_memory_mb", "data_wait")


@pytest.fixture
def manifest(half_manifest):
    return half_manifest


def rows(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in VOLATILE} for row in found]


def ahead(monkeypatch, yes=True):
    monkeypatch.setattr(trainer, "Prefetcher", functools.partial(Prefetcher, ahead=yes))


SPEC = schema.MaskConfig
GUIDED = {"specs": (SPEC(2, (0.3, 0.3), motion_guided=True), SPEC(1, (0.5, 0.5)))}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"masks": GUIDED},
        {"optimization": {"epochs": 2, "ipe": 3, "accumulate": 2}},
        {"masks": {"specs": GUIDED["specs"], "truncate": "random"}},
        {"masks": {"specs": GUIDED["specs"], "truncate": "none"}},
    ],
)
def test_a_run_is_the_same_run_and_resumes_exactly(manifest, tmp_path, monkeypatch, change):
    cfg = config(data={"datasets": (manifest,)}, **{"optimization": {"epochs": 2, "ipe": 3}, **change})
    plain, whole, parts = (dataclasses.replace(cfg, folder=str(tmp_path / n)) for n in ("plain", "whole", "parts"))
    ahead(monkeypatch, False)
    train(plain)
    ahead(monkeypatch)
    train(whole)
    train(parts, max_steps=4)
    train(parts)
    want = rows(tmp_path / "plain")
    assert len(want) == 6 and rows(tmp_path / "whole") == want and rows(tmp_path / "parts") == want
    weights = [checkpoint.load(tmp_path / n)["encoder"] for n in ("plain", "whole", "parts")]
    assert all(torch.equal(v, other[k]) for other in weights[1:] for k, v in weights[0].items())


def test_images_beside_videos(manifest, tmp_path, monkeypatch):
    images = render_suite("objects", tmp_path / "objects", splits={"train": 8}, size=32, seed=0)["train"]
    cfg = config(data={"datasets": (manifest,)}, optimization={"epochs": 1, "ipe": 3})
    cfg = dataclasses.replace(
        cfg,
        img_data=dataclasses.replace(cfg.data, datasets=(images,), dataset_fpcs=(1,), batch_size=2),
        img_masks=schema.MasksConfig(specs=(SPEC(num_blocks=1, spatial_scale=(0.5, 0.5)),)),
    )
    found = []
    for yes in (False, True):
        ahead(monkeypatch, yes)
        found.append(rows(train(dataclasses.replace(cfg, folder=str(tmp_path / str(yes)))).folder))
    assert found[0] == found[1] and len(found[0]) == 3


def test_a_staged_batch_has_the_masks_of_its_step():
    step = TrainStep(config(masks=GUIDED, data={"dataset_fpcs": (4, 8)}))
    data = batch(3, frames=(4, 8), first=40)
    drawn = step.stage(data, 3)
    for number, group in enumerate(data.groups):
        want = step.sampler(group.clip, step=3, first_sample=group.first_sample, group=number)
        for mine, other in zip(drawn.masks[number].wait(), want):
            assert all(torch.equal(a, b) for a, b in zip(mine, other))
    assert [g.paths for g in drawn.groups] == [g.paths for g in data.groups]
    assert torch.equal(step(drawn, 3).loss, TrainStep(step.cfg)(data, 3).loss)


def stream(log, name="v", bad=None):
    for i in range(100):
        if i == bad:
            raise DataError("no sample can be read")
        log.append(f"read {name}{i}")
        yield SimpleNamespace(groups=[], step=i)


def stage(log):
    def run(data, index):
        log.append(f"stage {index}")
        return Staged(data.groups, data.step, [])

    return run


def test_what_is_read_when():
    log = []
    feed = Prefetcher([stream(log), stream(log, "i")], stage(log), CPU, accumulate=2, ahead=True)
    assert [b.step for b in feed.take(5)] == [0, 1, 0, 1]
    log.clear()
    feed.advance(6)
    assert log == ["read v2", "read v3", "read i2", "read i3"] + ["stage 6"] * 4
    assert [b.step for b in feed.take(6)] == [2, 3, 2, 3] and len(log) == 8 and feed.waited > 0
    feed.advance(7)
    with pytest.raises(ValueError, match="step 9 was asked for, step 7 comes next"):
        feed.take(9)


def test_on_a_cpu_batches_pass_through():
    log = []
    feed = Prefetcher([stream(log)], stage(log), CPU)
    assert not isinstance(feed.take(0)[0], Staged)
    feed.advance(1)
    assert log == ["read v0"]


def test_an_error_in_reading_ahead_does_not_disturb_the_step_before():
    feed = Prefetcher([stream([], bad=1)], stage([]), CPU, ahead=True)
    feed.take(0)
    feed.advance(1)
    with pytest.raises(DataError, match="no sample"):
        feed.take(1)


def test_a_run_reads_no_batch_that_it_does_not_need(manifest, tmp_path, monkeypatch):
    ahead(monkeypatch)
    counts = []
    loader = streams.ClipLoader

    class Counted(loader):
        def __next__(self):
            counts.append(self.step)
            return super().__next__()

    monkeypatch.setattr(streams, "ClipLoader", Counted)
    train(config(tmp_path / "run", data={"datasets": (manifest,)}), max_steps=2)
    assert counts == [0, 1]


class Cuda:
    """Writes down what would be asked of CUDA, in order."""

    def __init__(self, log, idle):
        self.log, self.idle, self.running, self.events = log, idle, "main", 0

    def Stream(self, device, priority):  # noqa: N802
        assert priority < 0
        return self._named("side")

    def current_stream(self, device):
        return self._named(self.running)

    def _named(self, name):
        return SimpleNamespace(
            name=name,
            wait_event=lambda e: self.log.append(f"{name} waits for {e.of}"),
            wait_stream=lambda s: self.log.append(f"{name} waits for {s.name}"),
        )

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.running = self.running, stream.name
        yield
        self.running = before

    def Event(self):  # noqa: N802
        event = SimpleNamespace(of=None, query=lambda: self.idle)

        def record(stream):
            event.of = stream.name
            self.log.append(f"event on {stream.name}")

        event.record = record
        event.synchronize = lambda: self.log.append(f"host waits for {event.of} {event.number}")
        event.number, self.events = self.events, self.events + 1
        return event


@pytest.mark.parametrize("idle", [False, True])
def test_streams_and_events_on_cuda(monkeypatch, idle):
    """Copies and draws on their own stream; the step's stream waits for their event, the host for nothing."""
    log = []
    cuda = Cuda(log, idle)
    monkeypatch.setattr(prefetch.torch, "cuda", cuda)

    def on(index, what):
        return SimpleNamespace(record_stream=lambda s: log.append(f"{what} of step {index} used on {s.name}"))

    def run(data, index):
        log.append(f"stage {index} on {cuda.running}")
        groups = [SimpleNamespace(clip=on(index, "clip"), local=None)]
        groups += [SimpleNamespace(clip=on(index, "global views"), local=on(index, "local views"))]
        return Staged(groups, data.step, [on(index, "masks")])

    def clips():
        for i in range(3):
            yield SimpleNamespace(groups=[SimpleNamespace(clip=SimpleNamespace(is_cuda=i == 2))], step=i)

    feed = Prefetcher([clips()], run, torch.device("cuda", 0))
    clips_used = [f"{what} of step {{}} used on main" for what in ("clip", "global views", "local views", "masks")]
    used = ["main waits for side", *clips_used]
    feed.take(0)
    assert log == ["stage 0 on side", "event on side", *(u.format(0) for u in used)]
    log.clear()
    first = feed.waited
    feed.advance(1)
    assert log == ["event on main", "stage 1 on side", "event on side"]
    assert (feed.waited > first) == idle  # while the device is busy, waiting for data costs nothing
    log.clear()
    feed.take(1)
    assert log == [u.format(1) for u in used]
    log.clear()
    feed.advance(2)  # clips that are on the device already: what made them comes first
    waited = log.pop()  # for the first step's event, when the next step is ready: the second has still to be done
    assert log == ["event on main", "side waits for main", "stage 2 on side", "event on side"]
    assert waited == "host waits for main 1"


def test_only_pinned_memory_is_copied_without_waiting():
    calls = []

    class Host:
        device = CPU

        def __init__(self, pinned):
            self.is_pinned = lambda: pinned

        def to(self, device, non_blocking):
            calls.append(non_blocking)

    for pinned in (True, False):
        to_device(Host(pinned), torch.device("cuda", 0))
    assert calls == [True, False]
    x = torch.ones(1)
    assert to_device(x, CPU) is x
