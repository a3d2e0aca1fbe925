"""Work in a process of its own that is ended when its time is over."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from vjepa_fast.bench.errors import error_text


class TimeLimitError(Exception):
    """The work was not done in time; its process is gone."""


def isolated(work: Callable[..., Any], args: tuple, limit_s: float = float("inf")) -> Any:
    """``work(*args)``, computed in a new process. What that process starts (a compiler's workers) ends with it.

    Args:
        work: a function that the new process can import; its arguments and its result are pickled.
        args: its arguments.
        limit_s: seconds, the start of the process and its imports included.

    Raises:
        TimeLimitError: ``limit_s`` seconds were over.
        RuntimeError: the work raised, or its process died; the text says what.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit a CUDA context that it cannot use
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, work, args))
    process.start()
    theirs.close()
    try:
        if not ours.poll(None if limit_s == float("inf") else max(0.0, limit_s)):
            raise TimeLimitError(f"not done after {limit_s:g} s")
        try:
            done, result = ours.recv()
        except EOFError:
            process.join()
            raise RuntimeError(f"its process ended with exit code {process.exitcode}") from None
    finally:
        _end(process)
        ours.close()
    if not done:
        raise RuntimeError(result)
    return result


def _run(pipe: Connection, work: Callable[..., Any], args: tuple) -> None:
    os.setpgrp()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer = True, work(*args)
    except Exception as error:
        answer = False, error_text(error)
    pipe.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _end(process: BaseProcess) -> None:
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError, PermissionError):  # its group, once it has one
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
