"""Runs named tasks in worker processes, each as soon as what it needs is done, and remembers what is done.

A finished task leaves ``<folder>/tasks/<name>.json`` with its key and result. The key covers the function, its
arguments and the keys of what it needs, so that a repeated command takes up where the last one stopped, and a changed
plan does its changed part again.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vjepa_fast.errors import UserError

FORMAT = 2  # raise it when tasks compute other results from the same arguments
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class Task:
    """``function(**arguments(results))`` once all of ``needs`` are done. Lower ``rank`` goes first."""

    name: str
    function: Callable
    arguments: Callable[[dict], dict]  # results by task name -> keyword arguments, of plain values
    needs: tuple[str, ...] = ()
    rank: int = 0
    identity: object = None  # what the key is made of in place of the arguments (paths left out)
    check: Callable[[object], bool] = field(default=lambda result: True)  # whether a remembered result still stands


def workers_and_threads(device: str = "cpu") -> tuple[int, int]:
    """How many processes to run at once, and threads for each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device != "cpu":
        return 1, cores
    workers = min(4, cores)
    return workers, max(1, cores // workers)


def run_tasks(
    tasks: list[Task],
    folder: Path,
    *,
    workers: int,
    threads: int,
    on_event: Callable[[str, str], None],
    on_tick: Callable[[set], None] = lambda running: None,
) -> dict[str, object]:
    """Results by name. ``on_event("start" | "done" | "kept", name)``; ``on_tick(running names)`` about twice a
    second.
    """
    results, keys, running = {}, {}, {}
    others = set(multiprocessing.active_children())
    waiting = {t.name: t for t in tasks}
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    with _environment({name: str(threads) for name in _THREAD_VARIABLES}):
        pool = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(str(folder / "logs"),),
        )
        try:
            while waiting or running:
                ready = sorted(
                    (t for t in waiting.values() if all(n in results for n in t.needs)), key=lambda t: t.rank
                )
                for task in ready:
                    known = task.name in keys
                    if not known:
                        keys[task.name] = _key(task, results, keys)
                    if not known and (kept := _kept(folder, task, keys[task.name])) is not None:
                        results[task.name] = kept[0]
                        del waiting[task.name]
                        on_event("kept", task.name)
                        break
                    if len(running) < workers:
                        running[pool.submit(_call, task.function, task.arguments(results))] = task
                        del waiting[task.name]
                        on_event("start", task.name)
                        break
                else:
                    done, _ = wait(running, timeout=0.4, return_when=FIRST_COMPLETED)
                    for future in done:
                        task = running.pop(future)
                        results[task.name], spent = future.result()
                        _remember(folder, task, keys[task.name], results[task.name], spent)
                        on_event("done", task.name)
                    on_tick({t.name for t in running.values()})
        except BaseException as error:
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()  # a trainer saves and leaves
            if not isinstance(error, BrokenProcessPool):
                raise
            raise UserError(
                f"{folder}: a worker process was killed, perhaps for want of memory; the same command goes on "
                f"where it stopped (what workers said is in {folder / 'logs'})"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return results


def _call(function: Callable, arguments: dict) -> tuple[object, dict]:
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        result = function(**arguments)
        return result, {
            "seconds": round(time.perf_counter() - wall, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
        }
    except SystemExit:  # the trainer was told to stop and has saved
        if not multiprocessing.parent_process().is_alive():
            os._exit(0)  # nobody is left to take a result
        raise KeyboardInterrupt from None


def _start(logs: str) -> None:
    """A worker writes what it has to say to a file of its own, so that the terminal stays the demo's."""
    out = os.open(os.path.join(logs, f"worker-{os.getpid()}.log"), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = (
        os.fdopen(1, "w", buffering=1, closefd=False),
        os.fdopen(2, "w", buffering=1, closefd=False),
    )
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A worker whose parent was killed stops too (a trainer saves first), so that a repeated command finds no rival."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def _key(task: Task, results: dict, keys: dict) -> str:
    what = task.identity if task.identity is not None else task.arguments(results)
    text = json.dumps(
        [FORMAT, task.function.__name__, what, [keys[n] for n in task.needs]], sort_keys=True, default=str
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _kept(folder: Path, task: Task, key: str) -> tuple | None:
    try:
        stored = json.loads((folder / "tasks" / f"{task.name}.json").read_text())
        return (stored["result"],) if stored["key"] == key and task.check(stored["result"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(folder: Path, task: Task, key: str, result, spent: dict) -> None:
    path = folder / "tasks" / f"{task.name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"key": key, **spent, "result": result}))
    temporary.replace(path)


@contextmanager
def _environment(values: dict[str, str]):
    before = {k: os.environ.get(k) for k in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for k, v in before.items():
            os.environ.pop(k, None) if v is None else os.environ.__setitem__(k, v)
