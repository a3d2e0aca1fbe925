"""Peaks that MFU is a share of, and what the rows report about work and memory."""

import pytest
import torch

from vjepa_fast import config as configs
from vjepa_fast.errors import ConfigError
from vjepa_fast.metrics import hardware
from vjepa_fast.metrics.flops import Work
from vjepa_fast.trainer.distributed import Distributed
from vjepa_fast.trainer.metrics import Metrics, flatten

from ..trainer.test_metrics import output

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "dtype", "want"),
    [
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H100 NVL", torch.float32, 60e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2e12),
        ("Another GPU", torch.bfloat16, None),
        ("NVIDIA H200", torch.float64, None),
    ],
)
def test_known_gpus(monkeypatch, name, dtype, want):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = hardware.peak(CUDA, dtype)
    assert found.flops == want
    assert ("data sheet" in found.label) if want else ("set runtime.peak_tflops" in found.label and name in found.label)


def test_tf32_counts_where_torch_may_use_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert hardware.peak(CUDA, torch.float32).flops == 494e12


def test_cpu_is_measured_once_and_told(monkeypatch):
    monkeypatch.setattr(hardware, "SECONDS", 0.05)
    hardware._measured.cache_clear()
    before = torch.get_rng_state()
    first = hardware.peak(CPU, torch.float32)
    assert first.flops > 1e8 and "measured" in first.label and "float32" in first.label
    assert hardware.peak(CPU, torch.float32) == first and hardware._measured.cache_info().misses == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert hardware.peak(CPU, torch.float32, 2.5).flops == 2.5e12
    hardware._measured.cache_clear()
    with pytest.raises(ConfigError, match="runtime.peak_tflops: must be greater than 0, got 0"):
        configs.load("mixed_4gpu_baseline", ["runtime.peak_tflops=0"])


@pytest.mark.parametrize("peak", [None, 1e12])
def test_rows(tmp_path, monkeypatch, peak):
    clock = iter([10.0, 14.0, 14.0, 16.0, 16.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    world = Distributed()
    m = Metrics(tmp_path, world=world, ipe=3, peak=peak)
    for step in (1, 2):
        m.record(step, output(1.0, work=Work(tokens=600, flops=10**12)))
    row = m.flush(output(1.0))
    assert (row["clips_per_s"], row["tokens_per_s"]) == (2.0, 300.0)
    assert row["mfu"] == (0.5 if peak else None)
    assert row["peak_memory_mb"] == pytest.approx(hardware.peak_memory(CPU) / 1e6, rel=0.2)
    assert ("mfu" in flatten(row)) == bool(peak)
    m.record(3, output(1.0, work=Work(tokens=60, flops=10**11)))
    assert m.flush(output(1.0))["tokens_per_s"] == 30.0  # counted anew for each row
