"""Memory that a call or a model takes at most."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Callable

import torch

from vjepa_fast.metrics import hardware

_MMAP_THRESHOLD = -3  # of mallopt


def free() -> None:
    """Give back what is no longer referred to, so that it is not in the way of what comes next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def start_peak(device: str) -> int:
    """Bytes in use on a GPU; its peak (`torch.cuda.max_memory_allocated`) counts from now on. 0 on a CPU."""
    if not device.startswith("cuda"):
        return 0
    torch.cuda.init()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_bytes(fn: Callable[[], object], device: torch.device) -> int | None:
    """Memory that a call takes at most, above what is in use before it; what it returns counts.

    On CUDA the allocator's. On Linux resident memory: the kernel's high-water mark is reset before the call, and malloc
    gives every tensor pages of its own, so that memory freed earlier does not hide what this call takes. None where
    neither can be read.
    """
    fn()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = start_peak(str(device))
        fn()
        return torch.cuda.max_memory_allocated(device) - before
    if platform.system() != "Linux":
        return None
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 1 << 16)
    fn()
    libc.malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as f:
            f.write("5")
        before = hardware.resident("VmHWM")
        out = fn()
        after = hardware.resident("VmHWM")
        del out
    except OSError:
        return None
    finally:
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
    return None if before is None or after is None else after - before
