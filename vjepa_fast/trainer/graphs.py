"""CUDA graphs: a sequence of kernels recorded once and launched by a single call, one for each shape of its inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from vjepa_fast.errors import ConfigError
from vjepa_fast.files import first_line
from vjepa_fast.ops import _capture

T = TypeVar("T")
_log = logging.getLogger("vjepa_fast")
MOST_ROOM = 256 << 20  # bytes of the tables of one graph
MOST = 12  # graphs kept of a kind; the one whose last use is longest ago goes first


@dataclass
class Captured(Generic[T]):
    """``replay()`` computes anew what is in the tensors of ``result``, which stay where they are.

    ``tables`` live as long as it (`ops._capture`).
    """

    result: T
    replay: Callable[[], None]
    tables: _capture.Tables


Capture = Callable[[Callable[[], Any], torch.device, Any], tuple[Any, Callable[[], None]]]


class Graphs(Generic[T]):
    """The graphs of functions without arguments, by key: what their launches depend on.

    A function must read only tensors that are changed in place, launch the same work whenever its key is the same, and
    wait for nothing. Its first call is left to the caller, so that kernels are compiled and caches filled.

    Args:
        what: of which these are the graphs, for messages.
        device: where.
        forced: raise where a capture fails; otherwise the reason is logged once and no graph is used from then on.
        shared: all graphs take their memory from one pool: a replay may overwrite the result of any other.
        capture: makes (result, replay) of (function, device, pool); another one in tests.
    """

    def __init__(
        self,
        what: str,
        device: torch.device,
        *,
        forced: bool = False,
        shared: bool = True,
        capture: Capture | None = None,
    ):
        self.what, self.device, self.forced, self.shared = what, device, forced, shared
        self.capture: Capture = capture or _capture_cuda
        self.pool: Any = None
        self.captured: dict[Hashable, Captured[T]] = {}
        self.seen: set[Hashable] = set()
        self.room = _capture.ROOM
        self.replays = 0  # graphs that `find` has given
        self.off = self.told = False

    def find(self, key: Hashable, run: Callable[[], T]) -> Captured[T] | None:
        """The graph of ``run``, to be replayed; None: call ``run`` itself, as for the first time that a key is seen.

        Raises:
            ConfigError: a capture failed and graphs are forced.
        """
        if self.off:
            return None
        found = self.captured.pop(key, None)
        if found is None:
            if key not in self.seen:
                self.seen.add(key)
                return None
            if len(self.captured) >= MOST:
                oldest = next(iter(self.captured))
                self.forget(oldest)
                self._tell_once()
            try:
                found = self._made(run)
            except RuntimeError as error:
                self._give_up(f"{self.what} could not be captured ({first_line(_cause(error))})", error)
                return None
        self.captured[key] = found
        self.replays += 1
        return found

    def _made(self, run: Callable[[], T]) -> Captured[T]:
        if self.shared and self.pool is None and self.device.type == "cuda":
            self.pool = torch.cuda.graph_pool_handle()
        while True:
            try:
                with _capture.collecting(self.device, self.room) as tables:
                    result, replay = self.capture(run, self.device, self.pool)
                break
            except RuntimeError as error:
                if not isinstance(_cause(error), _capture.RoomError) or self.room >= MOST_ROOM:
                    raise
                self.room *= 4
        _capture.fill(tables)
        return Captured(result, replay, tables)

    def _tell_once(self) -> None:
        if not self.told:
            self.told = True
            remedy = "a larger runtime.capacity_quantum gives fewer"
            _log.warning("runtime.cuda_graphs: more than %d shapes of %s come by turns; %s", MOST, self.what, remedy)

    def _give_up(self, reason: str, error: Exception | None = None) -> None:
        if self.forced:
            raise ConfigError(f"runtime.cuda_graphs: true, but {reason}") from error
        self.off = True
        self.captured.clear()
        _log.warning("runtime.cuda_graphs: auto leaves it off: %s", reason)

    def clear(self) -> None:
        """Drop all graphs, as where tensors that they read are no longer the ones in use."""
        self.captured.clear()
        self.seen.clear()

    def forget(self, key: Hashable) -> None:
        """Drop the graph of a key, and that it was seen."""
        self.captured.pop(key, None)
        self.seen.discard(key)

    def make_room(self) -> bool:
        """Give up all graphs where memory ran out beside them; False where there is none.

        Raises:
            ConfigError: graphs are forced.
        """
        if not self.captured:
            return False
        self._give_up(f"{self.what} needs more memory than is left beside its graphs; try a smaller batch")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return True


def _cause(error: BaseException) -> BaseException:
    """What went wrong first: the end of a capture that failed raises an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _capture_cuda(run: Callable[[], T], device: torch.device, pool: Any) -> tuple[T, Callable[[], None]]:
    with torch.cuda.device(device):
        current, side = torch.cuda.current_stream(), _side_stream(device)
        side.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: what other threads do meanwhile (reading data, NCCL's watchdog) is no part of it
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                result = run()
        except BaseException:
            torch.cuda.set_stream(current)  # a capture that ends with an error leaves its own stream current
            raise
        current.wait_stream(side)
    return result, graph.replay


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures. Workspaces of libraries belong to a stream: made here, they are no part of a pool."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
        with torch.cuda.stream(_streams[device]):
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.zeros(16, 16, dtype=dtype, device=device)
                torch.addmm(x[0], x, x)
    return _streams[device]
