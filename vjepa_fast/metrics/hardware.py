"""Peak arithmetic of the device, which MFU is a share of, and peak memory of the process."""

from __future__ import annotations

import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

# Dense peaks in TFLOP/s (no sparsity): bfloat16 with float32 sums, TF32, float32; from NVIDIA's data sheets. The first
# name that the device's name contains counts, so more special ones come first.
GPU_PEAKS = (
    ("B300", 2250, 1125, 75),
    ("GB200", 2500, 1250, 80),
    ("B200", 2250, 1125, 75),
    ("GH200", 989, 494, 67),
    ("H200 NVL", 835, 417, 60),
    ("H200", 989, 494, 67),
    ("H100 NVL", 835, 417, 60),
    ("H100 PCIe", 756, 378, 51),
    ("H100", 989, 494, 67),
    ("H800", 989, 494, 67),
    ("H20", 148, 74, 44),
    ("A100", 312, 156, 19.5),
    ("A800", 312, 156, 19.5),
    ("A30", 165, 82, 10.3),
    ("A40", 149.7, 74.8, 37.4),
    ("RTX A6000", 154.8, 77.4, 38.7),
    ("L40S", 362, 183, 91.6),
    ("L40", 181, 90.5, 90.5),
    ("RTX 6000 Ada", 364, 182, 91.1),
    ("L4", 121, 60, 30.3),
    ("RTX 5090", 209.5, 104.8, 104.8),
    ("RTX 4090", 165.2, 82.6, 82.6),
    ("RTX 3090", 71, 35.6, 35.6),
)
SECONDS = 1.0  # of the measurement on a CPU


@dataclass(frozen=True)
class Peak:
    """``flops`` per second of one device, None where not known; ``label`` says where the number is from."""

    flops: float | None
    label: str


def peak(device: torch.device, dtype: torch.dtype, tflops: float | None = None) -> Peak:
    """The peak that MFU is a share of, for matrix products of ``dtype``: ``tflops`` if given.

    On CUDA the data sheet's dense peak (float32 counts as TF32 where torch may use it); on a CPU the fastest matrix
    product of one second, measured once per process and number of threads; None elsewhere and for unknown GPUs.
    """
    name = str(dtype).removeprefix("torch.")
    if tflops is not None:
        return Peak(1e12 * tflops, f"{tflops:g} TFLOP/s, runtime.peak_tflops")
    if device.type == "cuda":
        model = torch.cuda.get_device_name(device)
        row = next((row for row in GPU_PEAKS if row[0].lower() in model.lower()), None)
        if row is None or dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return Peak(None, f"not known for {model} in {name}; set runtime.peak_tflops")
        _, half, tf32, single = row
        found = half if dtype != torch.float32 else single
        if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            found, name = tf32, "TF32"
        return Peak(1e12 * found, f"{found:g} TFLOP/s {name} dense, data sheet")
    if device.type == "cpu":
        flops = _measured(dtype, torch.get_num_threads())
        return Peak(flops, f"{flops / 1e12:.3f} TFLOP/s {name}, measured by a matrix product on this CPU")
    return Peak(None, f"not known for {device.type}; set runtime.peak_tflops")


@functools.lru_cache(8)
def _measured(dtype: torch.dtype, threads: int) -> float:
    """FLOP/s of the best of some matrix products; stops before the second is over if none gets better."""
    n, best, stale = 1024, 0.0, 0
    x = torch.ones(n, n, dtype=dtype)  # constant: random numbers of the run are counted
    began = time.perf_counter()
    with torch.inference_mode():
        while time.perf_counter() - began < SECONDS and stale < 8:
            start = time.perf_counter()
            torch.mm(x, x)
            rate = 2 * n**3 / (time.perf_counter() - start)
            best, stale = max(best, rate), 0 if rate > 1.01 * best else stale + 1
    return best


def resident(field: str) -> int | None:
    """Bytes of a field of /proc/self/status (VmRSS: resident now, VmHWM: at most); None where there is no such file."""
    return _field("/proc/self/status", field)


def free_memory() -> int | None:
    """Bytes that this process can still have without swapping, by the machine and by its control group; None where
    neither says.
    """
    found = [_field("/proc/meminfo", "MemAvailable:"), _limit(Path("/sys/fs/cgroup"))]
    return min((x for x in found if x is not None), default=None)


def _limit(group: Path) -> int | None:
    """What a control group (version 2) has left; files that can be dropped from memory count as free."""
    try:
        limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
    except (OSError, ValueError):  # "max"
        return None
    return max(0, limit - used + (_field(str(group / "memory.stat"), "inactive_file", 1) or 0))


def _field(path: str, name: str, unit: int = 1024) -> int | None:
    try:
        with open(path, encoding="ascii", errors="ignore") as f:
            return next(unit * int(line.split()[1]) for line in f if line.startswith(name))
    except (OSError, StopIteration):
        return None


def peak_memory(device: torch.device) -> int | None:
    """Bytes at most so far: on CUDA what torch has allocated there, else what is resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = resident("VmHWM")
    if found is None and sys.platform == "darwin":
        import resource

        found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found
