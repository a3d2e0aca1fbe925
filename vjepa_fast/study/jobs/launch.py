"""How the jobs of a study are run: processes on this machine (and others that share the folder), or a SLURM array.

Several commands may work on one folder: each takes a run by creating ``locks/<key>.lock``, which only one can, and
touches the file while it works. A lock that was not touched for ``STALE`` seconds, or whose process on this machine is
gone, is taken over; the run then goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from vjepa_fast.errors import UserError
from vjepa_fast.study.jobs.pool import _THREAD_VARIABLES, _environment, _leave_with_parent
from vjepa_fast.study.run import cells

BEAT = 15.0  # seconds between touches of a lock
STALE = 180.0  # seconds without a touch after which a lock is taken over


# ---------------------------------------------------------------- locks


class Lock:
    """``path``, held by at most one process; :meth:`take` tells whether it is this one."""

    def __init__(self, path: str | os.PathLike, stale: float = STALE):
        self.path, self.stale = Path(path), stale
        self.token = uuid.uuid4().hex
        self.lost = False  # taken over by another process, after this one was held up for long
        self._done = threading.Event()

    def take(self) -> bool:
        """Create the lock, or take over a stale one; False where another process holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._create(self.path):
            if not self._abandoned(self.path):
                return False
            # of several that see it abandoned one may remove it, and looks again first
            steal = self.path.with_suffix(".steal")
            if not self._create(steal):
                if self._abandoned(steal):
                    steal.unlink(missing_ok=True)
                return False
            try:
                if self._abandoned(self.path):
                    self.path.unlink(missing_ok=True)
                if not self._create(self.path):
                    return False
            finally:
                steal.unlink(missing_ok=True)
        self._done.clear()
        self.lost = False
        threading.Thread(target=self._beat, daemon=True).start()
        return True

    def release(self) -> None:
        self._done.set()
        if self._mine():
            self.path.unlink(missing_ok=True)

    def _create(self, path: Path) -> bool:
        try:
            with open(path, "x") as file:
                json.dump({"token": self.token, "pid": os.getpid(), **_place()}, file)
        except FileExistsError:
            return False
        return True

    def _read(self, path: Path) -> dict:
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            return {}

    def _mine(self) -> bool:
        return self._read(self.path).get("token") == self.token

    def _abandoned(self, path: Path) -> bool:
        held = self._read(path)
        if held and all(held.get(k) == v for k, v in _place().items()) and not _alive(held.get("pid")):
            return True
        try:
            return self._now() - path.stat().st_mtime > self.stale
        except FileNotFoundError:
            return False  # released meanwhile: the next look takes it

    def _now(self) -> float:
        """The file server's time, since clocks of machines differ."""
        probe = self.path.with_name(f".{self.token}.now")
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
        return now

    def _beat(self) -> None:
        while not self._done.wait(min(BEAT, self.stale / 4)):
            if not self._mine():
                self.lost = not self._done.is_set()
                return
            try:
                os.utime(self.path)
            except OSError:
                continue


def _place() -> dict:
    """This machine, and the process namespace in which process numbers mean something."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return {"host": socket.gethostname(), "namespace": space}


def _alive(pid) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except PermissionError:
        return True
    return True


# ---------------------------------------------------------------- one job


def attempt(job: dict) -> str:
    """Run a job in this process and record how it went: ``done`` or ``failed``. A stop (SystemExit, Ctrl-C) passes."""
    try:
        cells.run(job)
        return "done"
    except Exception as error:
        cells.fail(job, error)
        return "failed"


def locked(job: dict) -> str:
    """:func:`attempt` under the job's lock; ``kept`` where it is done, ``elsewhere`` where another process has it."""
    lock = job_lock(job)
    if cells.read_cell(job["folder"], job["key"]) is not None:
        return "kept"
    if not lock.take():
        return "elsewhere"
    try:
        return attempt(job)
    finally:
        lock.release()


def job_lock(job: dict) -> Lock:
    return Lock(Path(job["folder"]) / "locks" / f"{job['key']}.lock")


def _child(job: dict) -> None:
    """The body of a worker process: what it says goes to ``logs/<key>.log``."""
    log = Path(job["folder"]) / "logs" / f"{job['key']}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    out = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a trainer at work has its own way to stop
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    sys.exit(0 if attempt(job) == "done" else 1)


# ---------------------------------------------------------------- processes


def slots(device: str, jobs: int | None, per_gpu: int, runs: int) -> tuple[list[str | None], int]:
    """(per slot the GPU it works on, or None; CPU threads of each)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device == "cpu":
        count = jobs or min(cores, max(1, runs))
        return [None] * count, max(1, cores // count)
    gpus = visible_gpus()
    found = [gpu for _ in range(per_gpu) for gpu in gpus][: jobs or None]
    return found, max(1, cores // len(found))


def visible_gpus() -> list[str]:
    """What to put into CUDA_VISIBLE_DEVICES, one entry per GPU that this process may use."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu")
    named = [n.strip() for n in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if n.strip()]
    return named[:count] if named else [str(i) for i in range(count)]


def run_processes(
    jobs: list[dict],
    places: list[str | None],
    threads: int,
    on_event: Callable[[str, dict], None],
    poll: float = 0.2,
) -> None:
    """Run the jobs in processes of their own, one per place at a time.

    Jobs that another command has in hand are waited for, and taken over if it dies. ``on_event(what, job)``: start,
    done, failed, kept, elsewhere. KeyboardInterrupt stops the workers (a trainer saves first) and passes on.
    """
    context = multiprocessing.get_context("spawn")
    waiting, running, told = list(jobs), {}, set()
    try:
        while waiting or running:
            for place in range(len(places)):
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
                    on_event("elsewhere" if job in waiting else _outcome(process, job), job)
                started = _next(waiting, told, on_event)
                if started is None:
                    continue
                job, lock = started
                values = {name: str(threads) for name in _THREAD_VARIABLES}
                if places[place] is not None:
                    values["CUDA_VISIBLE_DEVICES"] = places[place]
                with _environment(values):
                    process = context.Process(target=_child, args=(job,))
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


def _next(waiting: list[dict], told: set[str], on_event) -> tuple[dict, Lock] | None:
    """The first job that is neither done nor in another process's hands, and its lock; what is done leaves the list."""
    for job in list(waiting):
        if cells.read_cell(job["folder"], job["key"]) is not None:
            waiting.remove(job)
            on_event("kept", job)
            continue
        lock = job_lock(job)
        if lock.take():
            waiting.remove(job)
            if cells.read_cell(job["folder"], job["key"]) is None:
                return job, lock
            lock.release()  # finished between the two looks
            on_event("kept", job)
        elif job["key"] not in told:
            told.add(job["key"])
            on_event("elsewhere", job)
    return None


def _outcome(process, job: dict) -> str:
    if cells.read_cell(job["folder"], job["key"]) is not None:
        return "done"
    if process.exitcode and process.exitcode < 0:
        name = signal.Signals(-process.exitcode).name
        cells.fail(job, f"the worker process was killed by {name}, perhaps for want of memory")
    elif not cells.error_path(job["folder"], job["key"]).is_file():
        cells.fail(job, f"the worker process left with exit code {process.exitcode} and no cell")
    return "failed"


@contextmanager
def terminable():
    """SIGTERM stops as Ctrl-C does, so that workers save."""

    def stop(*_):
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---------------------------------------------------------------- SLURM


def run_slurm(
    jobs: list[dict],
    folder: str | os.PathLike,
    options: dict[str, object],
    at_once: int | None,
    on_event: Callable[[str, dict], None],
    poll: float = 10.0,
) -> None:
    """Submit the jobs as one SLURM array through submitit and wait for them; Ctrl-C leaves them running.

    ``options`` go to submitit's ``update_parameters`` (slurm_partition, timeout_min, gpus_per_node, cpus_per_task...).
    Raises UserError where submitit is not installed.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("--launcher slurm needs submitit: pip install submitit") from None
    executor = submitit.AutoExecutor(folder=str(Path(folder) / "slurm"))
    if at_once:
        options = {**options, "slurm_array_parallelism": at_once}
    try:
        executor.update_parameters(name="vjepa-study", **options)
    except (NameError, TypeError, ValueError) as error:
        raise UserError(f"--slurm: submitit does not take these ({error})") from None
    handles = list(zip(executor.map_array(locked, jobs), jobs))
    for _, job in handles:
        on_event("start", job)
    while handles:
        left = []
        for handle, job in handles:
            if not handle.done():
                left.append((handle, job))
                continue
            try:
                what = handle.result()
            except Exception as error:  # the job was cancelled, ran out of time or memory
                what = "failed"
                if cells.read_cell(job["folder"], job["key"]) is None:
                    cells.fail(job, f"the SLURM job ended without a result: {error}")
            on_event("done" if cells.read_cell(job["folder"], job["key"]) is not None else what, job)
        handles = left
        if handles:
            time.sleep(poll)
