"""Which of several ways to compute one thing is the fastest on this GPU: measured once per shape and kept on disk."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjepa_fast import files
from vjepa_fast.errors import UserError
from vjepa_fast.files import parse_json
from vjepa_fast.ops import _capture

_log = logging.getLogger("vjepa_fast")
_PACKAGES = ("torch", "triton", "quack-kernels")
_RUNS = 5
_AHEAD = 10_000_000  # cycles that the device spins while the host launches, which is not to be timed
_table: dict[str, str] | None = None


def path() -> Path:
    """Where the choices of this user lie; a file that can be deleted."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "vjepa_fast" / "fastest.json"


def choose(op: str, x: Tensor, columns: int, candidates: Mapping[str, Callable[[], Any]]) -> str:
    """The name of the fastest candidate for ``op`` on x [n,K], whose result has ``columns``.

    Sizes count to the next power of 2 of n. Without a GPU, of one candidate, and while a CUDA graph is captured where
    nothing is known yet, it is the first.
    """
    first = next(iter(candidates))
    if len(candidates) == 1 or not x.is_cuda:
        return first
    key = _key(op, x, columns)
    known = _known()
    if known.get(key) in candidates:
        return known[key]
    if _capture.capturing(x.device):
        return first
    try:
        seconds = {name: _time(run) for name, run in candidates.items()}
    except torch.OutOfMemoryError:  # says nothing of a candidate: nothing is kept
        return first
    best = min(seconds, key=lambda name: seconds[name])
    if seconds[best] < float("inf"):
        _keep(key, best)
    return best


def _key(op: str, x: Tensor, columns: int) -> str:
    rows = 1 << max(0, len(x) - 1).bit_length()
    dtype = str(x.dtype).removeprefix("torch.")
    return f"{op} {rows}x{x.shape[1]}x{columns} {dtype} {_machine(x.device)}"


@functools.cache
def _machine(device: torch.device) -> str:
    found = [torch.cuda.get_device_name(device)]
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


def _known() -> dict[str, str]:
    global _table
    if _table is None:
        _table = _read()
    return _table


def _read() -> dict[str, str]:
    try:
        table = parse_json(path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in table.items()} if isinstance(table, dict) else {}


def _keep(key: str, best: str) -> None:
    """Adds a choice; what other processes wrote meanwhile stays. Without a folder to write to it holds for this one."""
    table = _known()
    table[key] = best
    with suppress(UserError):
        files.write_json(path(), {**_read(), **table})


def _time(run: Callable[[], Any]) -> float:
    """Seconds of the quickest of a few runs; infinite for one that fails."""
    best = float("inf")
    try:
        for number in range(_RUNS + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(_AHEAD)  # pyright: ignore[reportPrivateUsage]  # torch has no public name for it
            start.record()
            run()
            end.record()
            end.synchronize()
            if number:  # the first compiles
                best = min(best, start.elapsed_time(end) / 1e3)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever another library raises: it is not the fastest
        _log.warning("a way to compute is left out, it fails: %s", str(error).partition("\n")[0])
        return float("inf")
    return best
