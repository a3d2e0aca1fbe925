"""Batches one step ahead: while the device works on a step, the next clips travel and the next masks are drawn.

A batch and its masks are functions of the step, so drawing them early changes nothing but the time. On CUDA both happen
on a stream of their own, and the lengths of the masks, the one thing that the host must know before it can launch a
step, are in pinned memory before it asks. On a CPU nothing would be gained: batches pass through as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vjepa_fast.metrics.profile import phase
from vjepa_fast.trainer import peers

if TYPE_CHECKING:
    from vjepa_fast.data.loader import Batch, ClipGroup
    from vjepa_fast.masks.drawn import DrawnMasks


@dataclass
class Staged:
    """A `data.Batch` whose clips are on the device (or on the way) and whose masks, if it has any, are drawn, one entry
    per group.
    """

    groups: list[ClipGroup]
    step: int
    masks: list[DrawnMasks]
    ready: torch.cuda.Event | None = None  # recorded behind the copies and draws, where they have their own stream

    def arrive(self, device: torch.device) -> None:
        """Work launched on the current stream from now on runs after the copies and draws. The host does not wait."""
        if self.ready is None:
            return
        stream = torch.cuda.current_stream(device)
        stream.wait_event(self.ready)
        for group in self.groups:
            for clip in (group.clip, group.local):
                if clip is not None:
                    clip.record_stream(stream)
        for masks in self.masks:
            masks.record_stream(stream)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``. From pinned memory the host does not wait; from other memory it has to."""
    if x.device == device:
        return x
    return x.to(device, non_blocking=device.type == "cuda" and x.device.type == "cpu" and x.is_pinned())


class Prefetcher:
    """Gives the batches of a step, and gets those of the next one ready while the device is busy.

    Args:
        streams: iterators over `data.Batch`.
        stage: makes a `Staged` of (batch, step); the method's ``stage``.
        accumulate: how often a step reads a stream, of all or of each.
        ahead: None: on CUDA only. Elsewhere True stages on the spot (for tests).

    Attributes:
        waited: seconds that the host spent in ``streams``, but for waits that ended before the device ran dry.
    """

    def __init__(
        self,
        streams: Sequence[Iterator[Batch]],
        stage: Callable[[Batch, int], Staged],
        device: torch.device,
        *,
        accumulate: int | Sequence[int] = 1,
        ahead: bool | None = None,
    ):
        self.streams, self.stage, self.device = streams, stage, device
        self.times = [accumulate] * len(streams) if isinstance(accumulate, int) else accumulate
        self.ahead = device.type == "cuda" if ahead is None else ahead
        self.stream = None
        if self.ahead and device.type == "cuda":
            self.stream = torch.cuda.Stream(device, priority=-1)  # small work that the next launch will wait for
        self.next: tuple[int, list[Batch] | list[Staged] | Exception] | None = None
        self.waited = 0.0
        self.launched: torch.cuda.Event | None = None  # recorded behind the last step but one

    def take(self, index: int) -> list[Batch] | list[Staged]:
        """The batches of step ``index``; steps are taken in order.

        Raises:
            What reading or drawing them raised, if early then now: the steps before are not disturbed.
        """
        peers.mark("data", index)
        if self.next is None:
            return self._arrived(self._load(index))
        (expected, batches), self.next = self.next, None
        if isinstance(batches, Exception):
            raise batches
        if expected != index:
            raise ValueError(f"prefetch: step {index} was asked for, step {expected} comes next")
        return self._arrived(batches)

    def advance(self, index: int) -> None:
        """Get step ``index`` ready; called when the step before it was launched. `take` raises what goes wrong."""
        if not self.ahead:
            return
        launched = None
        if self.stream is not None:
            launched = torch.cuda.Event()
            launched.record(torch.cuda.current_stream(self.device))
        before = self.waited
        try:
            self.next = index, self._load(index)
        except Exception as error:
            self.next = index, error
        if launched is not None and not launched.query():
            self.waited = before  # the device is still busy: nothing was lost
        if self.launched is not None:
            # A step that is one launch leaves the host idle. It would run ahead up to the next log line, with clips of
            # all those steps on the device: it waits for the step before the last one, which leaves that to be done.
            self.launched.synchronize()
        self.launched = launched

    def _load(self, index: int) -> list[Batch] | list[Staged]:
        began = time.perf_counter()
        with phase("data"):
            batches = [next(s) for s, times in zip(self.streams, self.times, strict=True) for _ in range(times)]
        self.waited += time.perf_counter() - began
        if not self.ahead:
            return batches
        if self.stream is None:
            return [self.stage(batch, index) for batch in batches]
        if any(group.clip.is_cuda for batch in batches for group in batch.groups):  # made on the device: wait for it
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            staged = [self.stage(batch, index) for batch in batches]
            for each in staged:
                each.ready = torch.cuda.Event()
                each.ready.record(self.stream)
        return staged

    def _arrived(self, batches: list[Batch] | list[Staged]) -> list[Batch] | list[Staged]:
        for batch in batches:
            if isinstance(batch, Staged):
                batch.arrive(self.device)
        return batches
