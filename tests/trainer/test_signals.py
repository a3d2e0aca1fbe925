"""SIGUSR1, which SLURM sends before a job's time is over: a checkpoint, and the job is queued again."""

import os
import signal

import pytest

from vjepa_fast.trainer import checkpoint, train

from .conftest import config


@pytest.fixture
def stopped(tmp_path, tiny_suites, monkeypatch, capsys):
    """Trains until the signal that step 2 sends to this process; returns the exit code and what was said."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    cfg = config(tmp_path / "run", data={"datasets": (str(tiny_suites["motion8"]["train"]),), "batch_size": 2})

    def send(row):
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    def run():
        with pytest.raises(SystemExit) as exit:
            train(cfg, on_log=send)
        saved = checkpoint.latest(cfg.folder)
        assert saved is not None and checkpoint.step_of(saved) in (2, 3)
        return exit.value.code or 0, capsys.readouterr().err

    return run


def fake_scontrol(folder, monkeypatch, code):
    """A ``scontrol`` that notes its arguments."""
    program = folder / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" > {folder}/asked\necho "no such job" >&2\nexit {code}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    return folder / "asked"


def test_without_a_scheduler_it_saves_and_ends(stopped):
    code, said = stopped()
    assert code == 0 and "the same command resumes" in said and "SLURM" not in said
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL  # as it was


def test_a_job_is_requeued(stopped, tmp_path, monkeypatch):
    asked = fake_scontrol(tmp_path, monkeypatch, 0)
    code, said = stopped()
    assert code == 0 and asked.read_text() == "requeue 4711\n" and "SLURM job 4711 is requeued" in said


def test_a_job_that_cannot_be_requeued_is_saved_all_the_same(stopped, tmp_path, monkeypatch):
    fake_scontrol(tmp_path, monkeypatch, 1)
    code, said = stopped()
    assert code == 0 and "SLURM job 4711 is not requeued (no such job); submit it again" in said


def test_a_handler_that_was_there_decides(stopped, tmp_path, monkeypatch):
    """As submitit's, which submits the job again and ends the process."""
    asked, called = fake_scontrol(tmp_path, monkeypatch, 0), []

    def handler(number, frame):
        called.append((number, checkpoint.latest(tmp_path / "run")))
        raise SystemExit(255)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        code, _ = stopped()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert code == 255 and not asked.exists()
    ((number, saved),) = called
    assert number == signal.SIGUSR1 and saved is not None  # after the checkpoint
