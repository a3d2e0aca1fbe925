"""Ctrl-C while modules are imported: torch and others take seconds, and some of their imports swallow the exception."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType


def leave_imports_at_once() -> None:
    """From now on SIGINT ends the process where it comes during an import (nothing is half-done then that a later start
    would not put right), and raises KeyboardInterrupt elsewhere. A handler that someone else set stays.
    """
    ours = threading.current_thread() is threading.main_thread()
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, b"interrupted\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt
