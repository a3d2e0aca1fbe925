"""What a run says before and between its steps, and how it ends on Ctrl-C."""

import os
import signal
import threading
import time

import pytest
import torch

from vjepa_fast import trainer
from vjepa_fast.trainer import banner, checkpoint, signals
from vjepa_fast.trainer.progress import DAY, Progress
from vjepa_fast.trainer.step import TrainStep

from .conftest import batch, config


# -- banner ------------------------------------------------------------------------------------------------------------
class Run:
    """What the banner looks at of a Trainer."""

    def __init__(self, cfg, peak=1e12, done=0):
        self.cfg, self.step, self.done, self.folder = cfg, TrainStep(cfg), done, "runs/x"
        self.metrics = type("Metrics", (), {"peak": peak})


def test_the_banner_has_what_one_wants_to_know_before_it_starts():
    run = Run(config())
    where, what, estimate = banner.lines(Run(config(), peak=1e8), 12)
    trained = sum(p.numel() for p in run.step.params) / 1e6
    assert where.startswith("cpu (") and "float32" in where and f"{trained:.1f} M parameters" in where
    assert "4 frames of 32 px, 32 tokens per clip; 12 steps of 3 clips; runs/x" in what
    assert estimate.startswith("estimated: ") and "clips/s, ETA 0:0" in estimate
    assert "2 steps of" in banner.lines(Run(config(), done=10), 12)[1]
    assert len(banner.lines(run, 12)) == len(banner.lines(Run(config(), peak=None), 12)) == 2


def test_the_estimate_is_the_arithmetic_of_a_step():
    run = Run(config())
    seconds = banner.estimated_seconds(run.cfg, run.step, 1e12)
    work = run.step(batch(), 0).work
    assert seconds == pytest.approx(work.flops / (banner.SHARE * 1e12), rel=0.5)


def test_an_estimate_of_more_than_a_day_is_a_warning():
    assert any("this run takes about" in line for line in banner.lines(Run(config(), peak=100.0), 12))


@pytest.mark.parametrize(
    ("warmup", "words"),
    [
        ([15000, 30000], ["objectives.context.warmup: begins at step 15,000", "never counts", "=[0.5,1.0]"]),
        ([6, 18], ["ends at step 18", "comes to 50% of its weight"]),
        ([12, 12], ["begins at step 12"]),
        ([0, 12], []),
        ([0.5, 1.0], []),
    ],
)
def test_a_warm_up_that_a_run_never_comes_to_is_said(warmup, words):
    found = banner.warnings(config(objectives={"pred": {}, "context": {"coeff": 0.5, "warmup": warmup}}))
    assert len(found) == bool(words) and all(word in found[0] for word in words)


def test_the_published_warm_up_of_the_loss_section_and_of_the_rate_too():
    cfg = config(loss={"context_warmup": (15000, 30000)}, optimization={"warmup": 4.0})
    rate, context = banner.warnings(cfg)
    assert "optimization.warmup" in rate and "loss.context_warmup=[0.5,1.0]" in context


# -- progress ----------------------------------------------------------------------------------------------------------
def test_without_a_terminal_a_line_comes_in_the_middle_of_a_long_step(capsys):
    with Progress(100, every=0.1) as progress:
        time.sleep(0.5)
        progress.advance(1)
        time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("step 0/100 made") and "ETA" not in lines[0]
    assert any(line.startswith("step 1/100 made") and "ETA" in line for line in lines)
    assert sum(line.startswith("measured: ") for line in lines) == 1
    before = len(lines)
    time.sleep(0.3)
    assert len(capsys.readouterr().err.splitlines()) == 0 and before > 2


def test_a_run_of_days_is_warned_of_once_it_is_measured(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("vjepa_fast.trainer.progress.time.perf_counter", lambda: clock[0])
    with Progress(30000) as progress:
        for step in range(1, 6):
            clock[0] += 85.0
            progress.advance(step)
    err = capsys.readouterr().err
    assert (
        err.count("measured: 85 s a step, ETA 708:") == 1 and err.count("warning: this run takes about 29.5 days") == 1
    )
    assert DAY < 30000 * 85


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------
def slow(monkeypatch, at, seconds, where):
    """Step ``at`` sends SIGINT and then takes ``seconds``, before or after its weights change."""
    real = TrainStep.__call__

    def step(self, batches, index, **more):
        out = real(self, batches, index, **more) if where == "after" or index != at else None
        if index == at:
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                time.sleep(0.01)
        return out or real(self, batches, index, **more)

    monkeypatch.setattr(TrainStep, "__call__", step)


def run_config(folder, tiny_suites):
    data = {"datasets": (tiny_suites["motion8"]["train"],), "num_workers": 1}
    return config(folder, data=data, optimization={"epochs": 1, "ipe": 4})


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="timers are POSIX")
@pytest.mark.parametrize("where", ["before", "after"])
def test_one_ctrl_c_ends_a_run_whose_steps_are_long(where, tmp_path, tiny_suites, monkeypatch, capsys):
    whole = trainer.train(run_config(tmp_path / "whole", tiny_suites))
    monkeypatch.setattr(signals.StopRequest.__init__, "__kwdefaults__", {"impatient": False, "grace": 0.3})
    cfg = run_config(tmp_path / "run", tiny_suites)
    with monkeypatch.context() as patch:
        slow(patch, 2, 20.0 if where == "before" else 1.0, where)
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            trainer.train(cfg)
        assert time.monotonic() - begin < 10
    done = 2 if where == "before" else 3  # a step whose weights have changed is finished
    assert checkpoint.latest(tmp_path / "run").name == f"step-{done:08d}.pt"
    err = capsys.readouterr().err
    assert f"stopped at step {done}, saved " in err
    resumed = trainer.train(cfg)
    a, b = (checkpoint.load(r.checkpoint) for r in (whole, resumed))
    assert all(torch.equal(x, b["encoder"][k]) for k, x in a["encoder"].items())


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="timers are POSIX")
@pytest.mark.parametrize("asked", [False, True])
def test_the_timer_of_others_stays(asked, monkeypatch):
    came = []
    monkeypatch.setattr(signals.os, "write", lambda *_: None)
    before = signal.signal(signal.SIGALRM, lambda *_: came.append(True))
    old = signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with signals.StopRequest(impatient=True, grace=0.1) as stop:
            if asked:
                signal.raise_signal(signal.SIGINT)
                with pytest.raises(signals.StepGivenUp), stop.step():
                    time.sleep(5)
            else:
                time.sleep(0.8)
                assert came
        until = time.monotonic() + 10
        while not came and time.monotonic() < until:
            time.sleep(0.01)
        assert came
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *old)


def test_a_first_step_that_is_given_up_leaves_no_folder(tmp_path, tiny_suites, monkeypatch, capsys):
    monkeypatch.setattr(signals.StopRequest.__init__, "__kwdefaults__", {"impatient": False, "grace": 0.3})
    slow(monkeypatch, 0, 20.0, "before")
    with pytest.raises(KeyboardInterrupt):
        trainer.train(run_config(tmp_path / "run", tiny_suites))
    assert "stopped at step 0, before there was anything to save" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_fails_leaves_no_folder(tmp_path, tiny_suites, monkeypatch):
    cfg = run_config(tmp_path / "run", tiny_suites)

    def fails(self, *args, **more):
        raise ValueError("the first step")

    monkeypatch.setattr(TrainStep, "__call__", fails)
    with pytest.raises(ValueError, match="the first step"):
        trainer.train(cfg)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="the first step"):
        trainer.train(cfg)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
