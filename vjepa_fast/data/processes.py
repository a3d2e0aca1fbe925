"""One job over many items in processes of their own, of which one may die without taking the others along."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from vjepa_fast.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def pool_of(workers: int) -> ProcessPoolExecutor:
    """A pool of processes that end when this one is killed.

    They are spawned: forking a process that runs torch's threads may hang, and this way is the same on every system.
    """
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_leave_with_parent)


def each(job: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[tuple[Item, Result | None]]:
    """(item, ``job(item)``) of all items, in the order in which they are done.

    A process that dies (a crash in a library, memory that runs out) gives None for the item it worked on: all that were
    under way are tried again one at a time, to find which one it was. What the job raises is raised here.

    Args:
        job: can be pickled.
        items: that it is called with.
        workers: processes; with one, all is done in this process, and nothing outlives a crash.
    """
    if workers <= 1:
        for item in items:
            yield item, job(item)
        return
    waiting, suspects = deque(items), deque[Item]()
    while waiting or suspects:
        queue, width = (suspects, 1) if suspects else (waiting, workers)
        running: dict[Future[Result], Item] = {}
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(pool_of(width))
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)  # before the pool's own, which waits
            _check_start(pool)
            try:
                while queue or running:
                    while queue and len(running) < (1 if width == 1 else 2 * width):
                        running[pool.submit(job, queue[0])] = queue[0]
                        queue.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        yield running.pop(future), result
            except BrokenProcessPool:
                if width == 1 and running:
                    yield next(iter(running.values())), None
                else:
                    suspects.extend(running.values())


def _check_start(pool: ProcessPoolExecutor) -> None:
    """Raise UserError where no process can be started, so that no item is blamed for it."""
    try:
        pool.submit(int).result()
    except BrokenProcessPool:
        raise UserError(
            "worker processes cannot be started; in a script, call this under `if __name__ == '__main__':`, "
            "or use one worker"
        ) from None


def _leave_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
