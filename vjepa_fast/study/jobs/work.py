"""A job, and what a launcher does with it: run it under its lock, and record how it went.

A job is a plain dict, so that it can be sent to another process or machine. The launchers read two of its keys:
``folder`` and ``key``, a name that is unique in the folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vjepa_fast.study.jobs.locks import Lock

Event = Callable[[str, dict], None]  # what happened (start, done, failed, kept, elsewhere), and to which job


@dataclass(frozen=True)
class Work:
    """The functions that make jobs of one kind; importable by name, since workers get them by pickle.

    Attributes:
        run: does the job and leaves its result on disk; raises where it cannot.
        done: whether the job's result is there.
        fail: records why there is none: an exception, or a sentence.
    """

    run: Callable[[dict], object]
    done: Callable[[dict], bool]
    fail: Callable[[dict, BaseException | str], None]

    def attempt(self, job: dict) -> str:
        """Run a job in this process: ``done`` or ``failed``. A stop (SystemExit, Ctrl-C) passes."""
        try:
            self.run(job)
            return "done"
        except Exception as error:
            self.fail(job, error)
            return "failed"

    def locked(self, job: dict) -> str:
        """`attempt` under the job's lock; ``kept`` where it is done, ``elsewhere`` where another process has it."""
        lock = self.lock(job)
        if self.done(job):
            return "kept"
        if not lock.take():
            return "elsewhere"
        try:
            return self.attempt(job)
        finally:
            lock.release()

    def lock(self, job: dict) -> Lock:
        """The lock of a job, ``locks/<key>.lock`` in its folder."""
        return Lock(Path(job["folder"]) / "locks" / f"{job['key']}.lock")
