"""Which process of a run is gone or stuck, said by all others in one line, in place of silence or of gloo's traceback.

Each process says once a second, in the store of the process group (c10d's TCPStore), what it is doing. The first one
reads what all say and gives the verdict; the others read the verdict, and look after the first one themselves. A
process that learns of one that is gone prints the line and ends with code 2, as nothing interrupts a collective.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

import torch.distributed as dist

from vjepa_fast.errors import TrainingError, UserError
from vjepa_fast.files import first_line
from vjepa_fast.metrics import profile

BEAT = 1.0  # seconds between two signs of life
SHORT = 4.0  # of silence, once some process has lost its connection to another
PATIENCE = 15.0  # for a verdict after that; then the error of the connection is all there is to say
FAREWELL = 10.0  # that the first process, which may have the store, waits for the others to be done
WAITS = ("backward", "log", "save", "start")  # in these a process may wait for the others
GOES_ON = "the run ends; the same command goes on from its last checkpoint"


@dataclass
class Sign:
    """What a process says of itself. ``marks`` counts parts of steps begun, ``beat`` the signs."""

    host: str
    pid: int
    step: int = 0
    doing: str = "start"
    marks: int = 0
    beat: int = 0
    failed: str = ""  # what it ends with
    lost: bool = False  # it lost its connection to another
    left: bool = False  # it has done its part

    def name(self, rank: int) -> str:
        """For the user."""
        return f"rank {rank} (pid {self.pid} on {self.host})"

    @property
    def place(self) -> str:
        """For the user."""
        return f"at step {self.step}, {self.doing}"


@dataclass
class Seen:
    """A sign as the first process saw it, and when it last heard of that process and saw it go on."""

    sign: Sign
    heard: float
    moved: float


def verdict(seen: dict[int, Seen], now: float, timeout: float, lost: bool = False) -> str:
    """Who is gone, failed or stuck, as a line for the user; empty if nobody is.

    Args:
        seen: of each rank; ``heard`` and ``moved`` in seconds of the clock of ``now``.
        now: seconds.
        timeout: seconds of ``runtime.timeout``.
        lost: the process that asks lost its connection to another.
    """
    working = {rank: s for rank, s in seen.items() if not s.sign.left}
    for rank, s in working.items():
        if s.sign.failed and now - s.moved > SHORT:  # where all fail alike each says so itself
            return f"{s.sign.name(rank)} failed {s.sign.place}: {s.sign.failed}"
    silence = min(SHORT, timeout) if lost or any(s.sign.lost for s in working.values()) else timeout
    if silent := [(s.heard, rank) for rank, s in working.items() if now - s.heard > silence]:
        heard, rank = min(silent)  # others may be slow
        last = seen[rank].sign
        return f"{last.name(rank)} is gone: no sign of it for {now - heard:.0f} s, last {last.place}; {GOES_ON}"
    if not working or min(now - s.moved for s in working.values()) <= timeout:
        return ""
    rank, s = min(working.items(), key=lambda x: (x[1].sign.step, x[1].sign.doing in WAITS, x[1].sign.marks, x[0]))
    return f"{s.sign.name(rank)} is stuck: {now - s.moved:.0f} s {s.sign.place}, the others wait for it; {GOES_ON}"


class Watch:
    """The signs of this process, and its judgement of the others; two threads from `start` to `stop`.

    Args:
        rank, world: of this process, and their number.
        timeout: seconds of silence, or without a step while others wait, after which a process counts as gone.
        store: of the process group.
        end: called with the line when another process is gone; by default it is printed and the process ends.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        timeout: float,
        store: dist.Store,  # pyright: ignore[reportPrivateImportUsage]
        end: Callable[[str], None] | None = None,
    ):
        self.rank, self.world, self.timeout, self.store = rank, world, timeout, store
        self.own = Sign(socket.gethostname(), os.getpid())
        self.end = end or self._end
        self.seen: dict[int, Seen] = {}
        self.found = ""
        self.answered = time.monotonic()
        self.stopped, self.leaving = threading.Event(), False
        self.period = min(BEAT, timeout / 5)
        self._asked = range(world) if rank == 0 else (0,)

    def start(self) -> None:
        """Begin to give signs, and to look for those of the others."""
        global _current
        _current, profile.mark = self, self.mark
        with suppress(RuntimeError):  # who ends before its first beat has a name; all come here together
            self._say()
            self.store.wait([str(rank) for rank in self._asked], timedelta(seconds=5 * self.period))
            for rank in self._asked:
                self._hear(rank)
        for work in (self._talk, self._judge):
            threading.Thread(target=work, daemon=True).start()

    def stop(self) -> None:
        """This process has done its part; the others need not look for it."""
        global _current
        if _current is self:
            _current, profile.mark = None, profile.unheard
        self.own.left = not (self.own.failed or self.own.lost)
        self.stopped.set()
        with suppress(RuntimeError):
            self._say()
            until = time.monotonic() + FAREWELL
            while self.own.left and self.rank == 0 and time.monotonic() < until:  # the store may end with this process
                for rank in range(self.world):
                    self._hear(rank)
                if all(s.sign.left or s.sign.failed for s in self.seen.values()):
                    break
                time.sleep(self.period / 10)

    def mark(self, doing: str, step: int | None = None) -> None:
        """The main thread begins something else."""
        self.own.doing, self.own.marks = doing, self.own.marks + 1
        if step is not None:
            self.own.step = step

    def _say(self) -> None:
        self.own.beat += 1
        self.store.set(str(self.rank), json.dumps(asdict(self.own)))

    def _talk(self) -> None:
        while not self.stopped.wait(self.period):
            try:
                self._say()
                for rank in self._asked:
                    self._hear(rank)
                if self.store.check(["verdict"]):
                    self.found = self.found or self.store.get("verdict").decode()
            except RuntimeError as error:  # who has the store is gone
                if not (self.stopped.is_set() or self._first_left):
                    self.found = self.found or self._without_store(first_line(error))
                return
            self.answered = time.monotonic()

    @property
    def _first_left(self) -> bool:
        """The process that may have the store has done its part."""
        return 0 in self.seen and self.seen[0].sign.left

    def _without_store(self, why: str) -> str:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        first = self.seen[0].sign.name(0) if 0 in self.seen else "rank 0"
        last = f", last {self.seen[0].sign.place}" if 0 in self.seen else ""
        return f"{first} or the launcher is gone: the store at {where} does not answer ({why}){last}; {GOES_ON}"

    def _hear(self, rank: int) -> None:
        if not self.store.check([str(rank)]):
            now = time.monotonic()
            self.seen.setdefault(rank, Seen(Sign("an unknown host", 0), now, now))
            return
        sign, now = Sign(**json.loads(self.store.get(str(rank)))), time.monotonic()
        before = self.seen.get(rank)
        heard = now if before is None or before.sign.beat != sign.beat else before.heard
        moved = now if before is None or before.sign.marks != sign.marks else before.moved
        self.seen[rank] = Seen(sign, heard, moved)

    def _judge(self) -> None:
        while not self.stopped.wait(self.period):
            now = time.monotonic()
            if now - self.answered > self.timeout and not self.found and not self._first_left:
                self.found = self._without_store(f"no answer for {now - self.answered:.0f} s")
            seen = dict(self.seen)
            if self.rank:  # whether the first one is stuck, or waits for a third, it alone can see
                seen = {rank: replace(s, moved=now) for rank, s in seen.items() if not s.sign.failed}
            if not self.found and (line := verdict(seen, now, self.timeout, self.own.lost)):
                with suppress(RuntimeError):
                    if self.rank == 0:
                        self.store.set("verdict", line)
                self.found = line
            if self.found and not self.leaving:
                self.end(self.found)
                return

    def _end(self, line: str) -> None:
        for last in at_end:
            with suppress(Exception):
                last()
        with suppress(OSError):
            os.write(2, f"\nerror: {line}\n".encode())
        sys.stdout.flush()
        os._exit(2)

    def explain(self, error: Exception) -> TrainingError | None:
        """What to raise in place of an ``error`` of this process: if a connection was lost, who is gone. Tells the
        others.
        """
        if isinstance(error, UserError) or not _of_a_connection(error):
            self.leaving = True
            self.mark(self.own.doing)
            self.own.failed = first_line(error)
            self._tell()
            return None
        self.leaving = self.own.lost = True
        self._tell()
        until = time.monotonic() + PATIENCE
        while not self.found and time.monotonic() < until:
            time.sleep(self.period / 4)
        lost = f"the connection between the processes was lost {self.own.place} ({first_line(error)}); {GOES_ON}"
        return TrainingError(self.found or lost)

    def _tell(self) -> None:
        with suppress(RuntimeError):
            self._say()


_current: Watch | None = None


at_end: list[Callable[[], object]] = []


@contextmanager
def together(release: Callable[[], object]) -> Generator[None]:
    """What fails in here, fails in all processes of the run, in a line that says which of them it was.

    ``release`` is called before a process ends without coming back here.
    """
    at_end[:] = [release]
    try:
        yield
    except Exception as error:
        if _current is None or (other := _current.explain(error)) is None:
            raise
        raise other from None


def mark(doing: str, step: int | None = None) -> None:
    """Tell the watch, if there is one, what the main thread does from now on."""
    if _current is not None:
        _current.mark(doing, step)


def _of_a_connection(error: Exception) -> bool:
    """Whether it is gloo's, NCCL's or the store's word that another process does not answer."""
    kinds = (dist.DistError, dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
    words = ("gloo", "connection closed by peer", "connection reset", "nccl", "broken pipe", "timed out waiting")
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words))


def begin(rank: int, world: int, timeout: float, store: dist.Store | None = None) -> Watch | None:  # pyright: ignore[reportPrivateImportUsage]
    """A watch that is started, over ``store``, else the one that the environment names; None where it names none."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if store is None:
        if not host or not port.isdigit():
            return None
        wait = timedelta(seconds=timeout)
        store = dist.TCPStore(host, int(port), is_master=False, timeout=wait, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]
    watch = Watch(rank, world, timeout, dist.PrefixStore("vjepa_fast/peers", store))  # pyright: ignore[reportPrivateImportUsage]
    watch.start()
    return watch
