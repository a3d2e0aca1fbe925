"""Runs named tasks in worker processes, each as soon as what it needs is done, and remembers what is done.

A finished task leaves ``<folder>/tasks/<name>.json`` with its key and result. The key covers the function, its
arguments and the keys of what it needs, so that a repeated command does only what is new or changed.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from vjepa_fast.errors import UserError
from vjepa_fast.files import parse_json, write_json
from vjepa_fast.study.jobs import workers

FORMAT = 2  # raise it when tasks compute other results from the same arguments


@dataclass
class Task:
    """``function(**arguments)`` once all of ``needs`` are done. Lower ``rank`` goes first."""

    name: str
    function: Callable
    arguments: Mapping | Callable[[dict], Mapping]  # plain values, or a function that makes them of results by name
    needs: tuple[str, ...] = ()
    rank: int = 0
    identity: object = None  # what the key is made of in place of the arguments (paths left out)
    check: Callable[[Any], bool] = field(default=lambda result: True)  # whether a remembered result still stands

    def values(self, results: dict) -> dict:
        """The keyword arguments, given the results of ``needs``."""
        return dict(self.arguments(results) if callable(self.arguments) else self.arguments)


def run_tasks(
    tasks: Sequence[Task],
    folder: Path,
    *,
    at_once: int,
    threads: int,
    on_event: Callable[[str, str], None],
    on_tick: Callable[[set], None] = lambda running: None,
) -> dict[str, object]:
    """Run the tasks in ``at_once`` processes of ``threads`` CPU threads each; returns the results by name.

    ``on_event`` gets ("start" | "done" | "kept", name), ``on_tick`` about twice a second the names of running tasks.
    Raises UserError where a worker process was killed, and what a task raises.
    """
    results: dict[str, object] = {}
    keys: dict[str, str] = {}
    running: dict[Future, Task] = {}
    others, children = _children(), set[BaseProcess]()
    waiting = {t.name: t for t in tasks}
    with workers.environment(threads):
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(at_once, spawn, initializer=_start, initargs=(str(folder / "logs"),))
        try:
            while waiting or running:
                ready = [t for t in waiting.values() if all(n in results for n in t.needs)]
                for task in sorted(ready, key=lambda t: t.rank):
                    if task.name not in keys:
                        keys[task.name] = _key(task, results, keys)
                        if (kept := _kept(folder, task, keys[task.name])) is not None:
                            results[task.name] = kept[0]
                            del waiting[task.name]
                            on_event("kept", task.name)
                            break
                    if len(running) < at_once:
                        running[pool.submit(_call, task.function, task.values(results))] = task
                        children |= _children() - others
                        del waiting[task.name]
                        on_event("start", task.name)
                        break
                else:
                    done, _ = wait(running, timeout=0.4, return_when=FIRST_COMPLETED)
                    # the executor may not watch the worker that it started last until another one has finished
                    if not done and children - _children():
                        raise BrokenProcessPool("a worker process is gone")
                    for future in done:
                        task = running.pop(future)
                        results[task.name], spent = future.result()
                        _leave(folder, task, keys[task.name], results[task.name], spent)
                        on_event("done", task.name)
                    on_tick({t.name for t in running.values()})
        except BaseException as error:
            for child in _children() - others:
                child.terminate()  # a trainer saves and leaves
            if not isinstance(error, BrokenProcessPool):
                raise
            raise UserError(
                f"{folder}: a worker process was killed, perhaps for want of memory; the same command goes on "
                f"where it stopped (the workers' output is in {folder / 'logs'})"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return results


def run_here(tasks: Sequence[Task], folder: Path, *, on_event: Callable[[str, str], None]) -> dict[str, object]:
    """`run_tasks` in this process, one task after the other in the order given, which has what a task needs before it.

    Raises what a task raises.
    """
    results: dict[str, object] = {}
    keys: dict[str, str] = {}
    for task in tasks:
        keys[task.name] = _key(task, results, keys)
        if (kept := _kept(folder, task, keys[task.name])) is not None:
            results[task.name] = kept[0]
            on_event("kept", task.name)
            continue
        on_event("start", task.name)
        results[task.name], spent = _timed(task.function, task.values(results))
        _leave(folder, task, keys[task.name], results[task.name], spent)
        on_event("done", task.name)
    return results


def _children() -> set[BaseProcess]:
    return set(multiprocessing.active_children())


def _timed(function: Callable, arguments: dict) -> tuple[object, dict]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(**arguments)
    spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    return result, {k: round(v, 2) for k, v in spent.items()}


def _call(function: Callable, arguments: dict) -> tuple[object, dict]:
    try:
        return _timed(function, arguments)
    except SystemExit:  # the trainer was stopped and has saved
        parent = multiprocessing.parent_process()
        if parent is None or not parent.is_alive():
            os._exit(0)  # nobody is left to take a result
        raise KeyboardInterrupt from None


def _start(logs: str) -> None:
    """A worker's output goes to a file of its own, so that the terminal stays the command's."""
    workers.start(Path(logs) / f"worker-{os.getpid()}.log")


def _key(task: Task, results: dict, keys: dict) -> str:
    what = task.identity if task.identity is not None else task.values(results)
    value = [FORMAT, task.function.__name__, what, [keys[n] for n in task.needs]]
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _leave(folder: Path, task: Task, key: str, result: object, spent: dict) -> None:
    write_json(folder / "tasks" / f"{task.name}.json", {"key": key, **spent, "result": result}, indent=None)


def _kept(folder: Path, task: Task, key: str) -> tuple | None:
    try:
        stored = parse_json((folder / "tasks" / f"{task.name}.json").read_text())
        return (stored["result"],) if stored["key"] == key and task.check(stored["result"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
