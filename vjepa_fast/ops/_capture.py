"""Tables that the host makes for kernels, under a CUDA graph being captured too.

A copy from the host that is captured would be made again at every replay, from memory that is gone by then. So a table
gets its place on the device at once, and its content when the capture has ended. All places are parts of one tensor,
made before the capture. Memory asked for meanwhile would be the graph's own, in which what another graph computes may
come to lie, and memory from elsewhere cannot be had, since CUDA allows no plain allocation then.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

ROOM = 1 << 20  # bytes of the tables of one graph, at first: a step of ViT-B takes 0.8 MB, one of ViT-H over 4
_ALIGNED = 256  # as memory from the allocator is


class RoomError(RuntimeError):
    """The tables of a capture take more memory than was set aside for them."""


@dataclass
class Tables:
    """The tables of a capture. It has to outlive the graph.

    Attributes:
        room: uint8, of which they are parts.
        made: each on the device, and what it is to hold.
    """

    room: Tensor
    made: list[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])
    taken: int = 0

    def place(self, table: Tensor) -> Tensor:
        """Where on the device ``table`` will be.

        Raises:
            RoomError: there is no room left.
        """
        size, begin = table.numel() * table.element_size(), self.taken
        if begin + size > self.room.numel():
            raise RoomError(f"its tables from the host are over {self.room.numel() >> 20} MiB")
        self.taken += math.ceil(size / _ALIGNED) * _ALIGNED
        return self.room[begin : begin + size].view(table.dtype).view(table.shape)


_collected: ContextVar[Tables | None] = ContextVar("tables of the capture", default=None)


def capturing(device: torch.device) -> bool:
    """Whether work on this device is being captured (`collecting`) rather than run."""
    return _collected.get() is not None or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def constant(table: Tensor, device: torch.device) -> Tensor:
    """``table``, made on the host, on ``device``; nobody waits. In a capture its content comes with `fill`.

    Raises:
        RuntimeError: a capture that collects no tables.
    """
    tables = _collected.get()
    if tables is not None:
        tables.made.append((tables.place(table), table))
        return tables.made[-1][0]
    if capturing(device):
        raise RuntimeError("a table from the host cannot be part of this CUDA graph")
    # from pinned memory, so that nobody waits; the pinned block is reused only after the copy
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@contextlib.contextmanager
def collecting(device: torch.device, room_bytes: int = ROOM) -> Generator[Tables]:
    """A capture on this device: `constant` puts off what it copies, into what this gives. Entered before it begins."""
    token = _collected.set(tables := Tables(torch.empty(room_bytes, dtype=torch.uint8, device=device)))
    try:
        yield tables
    finally:
        _collected.reset(token)


def fill(tables: Tables) -> None:
    """Make the copies that a capture has put off."""
    for on_device, table in tables.made:
        on_device.copy_(table.pin_memory() if on_device.is_cuda else table, non_blocking=True)
