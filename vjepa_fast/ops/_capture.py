"""Tables that the host makes for kernels, under a CUDA graph being captured too.

A copy from the host that is captured would be made again at every replay, from memory that is gone by then. So a table
gets its place on the device at once, and its content when the capture has ended.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator
from contextvars import ContextVar

import torch
from torch import Tensor

Tables = list[tuple[Tensor, Tensor]]  # on the device, and what it is to hold

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
        with _outside_of_the_pool(device):
            tables.append((torch.empty_like(table, device=device), table))
        return tables[-1][0]
    if capturing(device):
        raise RuntimeError("a table from the host cannot be part of this CUDA graph")
    # from pinned memory, so that nobody waits; the pinned block is reused only after the copy
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _outside_of_the_pool(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Where memory is not that of the graph, in which what another graph computes in between may come to lie."""
    return torch.cuda.stream(_aside(device)) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def collecting() -> Generator[Tables]:
    """A capture: `constant` puts off what it copies, into the list that this gives. It has to outlive the graph."""
    token = _collected.set([])
    try:
        tables = _collected.get()
        assert tables is not None
        yield tables
    finally:
        _collected.reset(token)


def fill(tables: Tables) -> None:
    """Make the copies that a capture has put off."""
    for on_device, table in tables:
        on_device.copy_(table.pin_memory() if on_device.is_cuda else table, non_blocking=True)
