"""Jobs in processes of their own, here and on machines that run the same command on the folder, or as a SLURM array.

A job is a plain dict, so that it can be sent to another process or machine; the launchers read its ``folder`` and its
``key``, a name that is unique in the folder. Each command takes a job by its lock, which only one can hold. The job of
a command that died is taken over by another, and goes on from its last checkpoint.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from vjepa_fast.errors import UserError
from vjepa_fast.locks import Lock
from vjepa_fast.study.jobs import workers

_RECORDED = 3  # exit code of a worker that has recorded its failure
Event = Callable[[str, dict], None]  # what happened (start, done, failed, kept, elsewhere, stopped), to which job


@dataclass(frozen=True)
class Work:
    """The functions that make jobs of one kind; importable by name, since workers get them by pickle."""

    run: Callable[[dict], object]  # does the job and leaves its result on disk; raises where it cannot
    done: Callable[[dict], bool]  # whether the job's result is there
    fail: Callable[[dict, BaseException | str], None]  # records why there is none: an exception, or a sentence

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


def slots(device: str, jobs: int | None, per_gpu: int, runs: int) -> tuple[list[str | None], int]:
    """(per slot the GPU that it works on, or None; CPU threads of each)."""
    cores = workers.cores()
    if device == "cpu":
        count = jobs or min(cores, max(1, runs))
        return [None] * count, max(1, cores // count)
    found = (visible_gpus() * per_gpu)[: jobs or None]
    return [*found], max(1, cores // len(found))


def visible_gpus() -> list[str]:
    """What to put into CUDA_VISIBLE_DEVICES, one entry per GPU that this process may use."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu")
    named = [n.strip() for n in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if n.strip()]
    return named[:count] if named else [str(i) for i in range(count)]


def run_processes(
    work: Work,
    jobs: Sequence[dict],
    places: Sequence[str | None],
    threads: int,
    on_event: Event,
    poll: float = 0.2,
    until: float | None = None,
) -> None:
    """Run the jobs in processes of their own, one per place (a GPU, or None) at a time.

    Jobs that another command has in hand are waited for, and taken over if it dies. KeyboardInterrupt stops the workers
    (a trainer saves first) and passes on. At the time ``until`` (of ``time.monotonic``) they are stopped as well, and
    the function returns; what they did ends as ``stopped``, and goes on when the jobs are run again.
    """
    context = multiprocessing.get_context("spawn")
    waiting, reported = list(jobs), set()
    running: dict[int, tuple[BaseProcess, dict, Lock]] = {}
    try:
        while waiting or running:
            if until is not None and time.monotonic() >= until:
                break
            for place, gpu in enumerate(places):
                if place in running:
                    process, job, lock = running[place]
                    if process.is_alive() and not lock.lost:
                        continue
                    if process.is_alive():  # this command was held up, another took the run over
                        process.terminate()
                        waiting.append(job)
                    process.join()
                    del running[place]
                    lock.release()
                    on_event("elsewhere" if job in waiting else _outcome(work, process.exitcode, job), job)
                started = _next(work, waiting, reported, on_event)
                if started is None:
                    continue
                job, lock = started
                with workers.environment(threads, {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}):
                    process = context.Process(target=_child, args=(work, job))
                    process.start()
                running[place] = process, job, lock
                on_event("start", job)
            time.sleep(poll if running or not waiting else max(poll, 2.0))
    finally:
        for process, _, _ in running.values():
            process.terminate()
        for process, _, lock in running.values():
            process.join()
            lock.release()
        for _, job, _ in running.values():  # when all locks are free, whatever the caller does with it
            on_event("done" if work.done(job) else "stopped", job)


def _child(work: Work, job: dict) -> None:
    """The body of a worker process."""
    workers.start(Path(job["folder"]) / "logs" / f"{job['key']}.log")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a trainer at work has its own way to stop
    sys.exit(0 if work.attempt(job) == "done" else _RECORDED)


def _next(work: Work, waiting: list[dict], reported: set[str], on_event: Event) -> tuple[dict, Lock] | None:
    """The first job that is neither done nor held by another process, and its lock; what is done leaves the list."""
    for job in list(waiting):
        lock = work.lock(job)
        if not work.done(job) and not lock.take():
            if job["key"] not in reported:
                reported.add(job["key"])
                on_event("elsewhere", job)
            continue
        waiting.remove(job)
        if not work.done(job):  # looked at again under the lock
            return job, lock
        lock.release()
        on_event("kept", job)
    return None


def _outcome(work: Work, exitcode: int | None, job: dict) -> str:
    if work.done(job):
        return "done"
    if exitcode and exitcode < 0:
        name = signal.Signals(-exitcode).name
        work.fail(job, f"the worker process was killed by {name}, perhaps for want of memory")
    elif exitcode != _RECORDED:
        work.fail(job, f"the worker process left with exit code {exitcode} and no result")
    return "failed"


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM stops as Ctrl-C does, so that workers save."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()  # no other may set a handler
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def run_slurm(
    work: Work,
    jobs: Sequence[dict],
    folder: str | os.PathLike,
    options: Mapping[str, object],
    at_once: int | None,
    on_event: Event,
    poll: float = 10.0,
) -> None:
    """Submit the jobs as a SLURM array and wait for them, looking every ``poll`` seconds; Ctrl-C leaves them running.

    ``options`` go to submitit's ``update_parameters``: slurm_partition, timeout_min, gpus_per_node, cpus_per_task, ...
    ``at_once``: jobs of the array that may run at the same time (None: as many as SLURM allows). Raises UserError where
    submitit is not installed, or refuses the options.
    """
    try:
        import submitit  # pyright: ignore[reportMissingImports]  # optional, and not among the extras
    except ImportError:
        raise UserError("--launcher slurm needs submitit: pip install submitit") from None
    executor = submitit.AutoExecutor(folder=str(Path(folder) / "slurm"))
    if at_once:
        options = {**options, "slurm_array_parallelism": at_once}
    try:
        executor.update_parameters(name="vjepa-study", **options)
    except (NameError, TypeError, ValueError) as error:
        raise UserError(f"--slurm: submitit does not take these ({error})") from None
    handles = list(zip(executor.map_array(work.locked, jobs), jobs))
    for _, job in handles:
        on_event("start", job)
    while handles:
        for handle, job in [h for h in handles if h[0].done()]:
            handles.remove((handle, job))
            try:
                what = handle.result()
            except Exception as error:  # the job was cancelled, ran out of time or memory
                what = "failed"
                if not work.done(job):
                    work.fail(job, f"the SLURM job ended without a result: {error}")
            on_event("done" if work.done(job) else what, job)
        if handles:
            time.sleep(poll)
