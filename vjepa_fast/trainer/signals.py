"""Signals that ask a run to stop, and what else a run sets in its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from vjepa_fast.files import first_line

_launcher = os.getppid()  # where torchrun started this process
LOOK = 1.0  # seconds between looks whether it is there
GRACE = 120.0  # seconds that a process without launcher has for its last step and checkpoint
GRACE_S = 4.0  # for the step in hand after SIGINT; then it is given up, and the one before is saved


def _forked() -> None:
    """The launcher of a process that is forked after this was imported is the one that forked it."""
    global _launcher
    _launcher = os.getppid()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)

_USR1 = (signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()


class StepGivenUp(Exception):
    """The step in hand takes too long for a user who waits; weights and optimiser are those of the step before."""


class StopRequest:
    """SIGTERM, SIGUSR1 and SIGINT ask for a stop after the step in hand; a second SIGINT interrupts at once.

    SIGUSR1 is what SLURM sends before a job's time is over (``--signal=USR1@180``): after the checkpoint a handler that
    was there before is called (submitit's, which submits the job again), or else the job is requeued by ``scontrol``.

    A process of torchrun whose launcher is gone asks itself to stop, and ends after ``GRACE`` seconds in any case.

    With ``impatient``, SIGINT gives up a step that has not ended after `GRACE_S` by raising `StepGivenUp` in it, where
    it does not change weights yet (`weights_change`). Only what runs alone may be impatient: of several processes each
    would be at another step.
    """

    def __init__(self, *, impatient: bool = False, grace: float = GRACE_S, main: bool = True) -> None:
        self.signal: int | None = None
        self.previous: dict[int, Any] = {}  # handlers to put back
        self.alarm: tuple[float, float] | None = None  # the timer to set again, once ours was set
        self.left = threading.Event()
        self.impatient, self.grace = impatient and hasattr(signal, "SIGALRM"), grace
        self.in_step, self.main = False, main  # of several processes the main one requeues

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self.previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT, *_USR1)}
            if "TORCHELASTIC_RUN_ID" in os.environ:
                threading.Thread(target=self._follow_launcher, daemon=True).start()
        return self

    def _follow_launcher(self) -> None:
        while os.getppid() == _launcher:
            if self.left.wait(LOOK):
                return
        print("the launcher of this process is gone: stopping", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        if not self.left.wait(GRACE):  # the others may be gone, and their part of the step with them
            os._exit(1)

    def __exit__(self, *_: object) -> None:
        self.left.set()
        if self.alarm is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.alarm is not None and self.alarm[0]:
            signal.setitimer(signal.ITIMER_REAL, *self.alarm)

    @contextmanager
    def step(self) -> Generator[None]:
        """Around what makes a step and can be given up."""
        _changed.clear()
        self.in_step = True
        try:
            yield
        finally:
            self.in_step = False

    def leave(self, say: Callable[[str], None], step: int, saved: object) -> NoReturn:
        """Say where the run stopped, and end: with 0 after SIGTERM, by KeyboardInterrupt after SIGINT."""
        kept = f"saved {saved}; the same command resumes" if saved is not None else "before there was anything to save"
        say(f"stopped at step {step}, {kept}")
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal in _USR1:
            self._again(say)
        sys.exit(0)

    def _again(self, say: Callable[[str], None]) -> None:
        """Have the job started again, where a scheduler is there for it."""
        before, job = self.previous.get(signal.SIGUSR1), os.environ.get("SLURM_JOB_ID")
        if callable(before):
            before(int(signal.SIGUSR1), None)
        elif job and self.main:
            try:
                subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60)
                say(f"SLURM job {job} is requeued")
            except (OSError, subprocess.SubprocessError) as error:
                why = (getattr(error, "stderr", "") or "").strip() or first_line(error)
                say(f"SLURM job {job} is not requeued ({why}); submit it again, it goes on from there")

    def _handle(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        if number == signal.SIGINT:
            os.write(
                2, b"\nstopping: the step in hand is finished or given up, then saved; Ctrl-C again to stop at once\n"
            )
            if self.impatient:  # until then the process's timer is that of others
                self.previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._give_up)
                self.alarm = signal.setitimer(signal.ITIMER_REAL, self.grace, 0.2)

    def _give_up(self, _number: int, _frame: object) -> None:
        if self.in_step and not _changed.is_set():  # else the timer comes again
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise StepGivenUp


_changed = threading.Event()  # the step in hand has begun to change weights


def weights_change() -> None:
    """The step in hand cannot be given up any more: weights, moments and averages change in place from here on."""
    _changed.set()


@contextmanager
def process_settings_kept() -> Generator[None]:
    """The number of threads and the state of torch's generators are afterwards what they were."""
    threads = torch.get_num_threads()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        torch.set_num_threads(threads)
