"""The tables of docs/scaling.md are what the committed results, and the arithmetic of the plan, give."""

import json

from benchmarks import bench_scaling, scaling_plan

from .pages import ROOT

TEXT = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_measured():
    found = json.loads(bench_scaling.RESULTS.read_text(encoding="utf-8"))
    assert bench_scaling.page(TEXT, found) == TEXT
    assert f"a global batch of {found['global_batch']} clips" in TEXT


def test_the_plan():
    assert scaling_plan.page(TEXT) == TEXT
    (b,) = (m for m in (scaling_plan.count("ViT-B"),))
    assert f"512 of them read {512 * b.batch:,} clips a step with ViT-B" in TEXT


def test_arithmetic_of_the_plan():
    """By hand, of ViT-B on 64 GPUs."""
    model = scaling_plan.Model("x", 64, "ddp", 90_000_000, 10_000_000, 1e12)
    sent, seconds = scaling_plan.travel(model, 64)
    assert sent == 0.4 and abs(seconds - 2 * 63 / 64 * 0.4e9 / (8 * 50e9 * 0.7)) < 1e-9
    assert scaling_plan.held(model, 64) == (4 * (4 * 0.1 + 0.09) + 2 * 0.09)
    cut = scaling_plan.Model("x", 64, "fsdp", 90_000_000, 10_000_000, 1e12)
    sent, seconds = scaling_plan.travel(cut, 8)
    assert abs(sent - (2 * (2 * 0.1 + 0.09) + 4 * 0.1)) < 1e-9
    assert abs(seconds - 7 / 8 * sent * 1e9 / (450e9 * 0.7)) < 1e-9
    assert abs(scaling_plan.held(cut, 8) - 4 * (4 * 0.1 + 0.09) / 8) < 1e-9
