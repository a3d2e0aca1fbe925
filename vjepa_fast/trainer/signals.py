"""Signals that ask a run to stop, and what else a run sets in its process."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

_LAUNCHER = os.getppid()  # where torchrun started this process
LOOK = 1.0  # seconds between looks whether it is there
GRACE = 120.0  # seconds that a process without launcher has for its last step and checkpoint


class StopRequest:
    """SIGTERM and SIGINT ask for a stop after the step in hand; a second SIGINT interrupts at once.

    A process of torchrun whose launcher is gone asks itself to stop, and ends after ``GRACE`` seconds in any case.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.previous: dict[int, Any] = {}  # handlers to put back
        self.left = threading.Event()

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self.previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
            if "TORCHELASTIC_RUN_ID" in os.environ:
                threading.Thread(target=self._follow_launcher, daemon=True).start()
        return self

    def _follow_launcher(self) -> None:
        while os.getppid() == _LAUNCHER:
            if self.left.wait(LOOK):
                return
        print("the launcher of this process is gone: stopping", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        if not self.left.wait(GRACE):  # the others may be gone, and their part of the step with them
            os._exit(1)

    def __exit__(self, *_: object) -> None:
        self.left.set()
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


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
