"""What the benchmarks of the step make of their results: floor, tables, plot, and the comparison of training curves."""

import json
import pathlib
import sys

import pytest

from benchmarks import plot_step, training_curves
from vjepa_fast import config

gpu_page, step_floor = plot_step.gpu_page, plot_step.step_floor
ROOT = pathlib.Path(__file__).parents[2]


def row(provider, ms, memory, recipe="mixed_4gpu_ld"):
    return {
        "recipe": recipe,
        "provider": provider,
        "batch": 8,
        "dtype": "float32",
        "device": "A device",
        "threads": 2,
        "torch": "2",
        "shape": "vit_tiny B8 F16 112px p16 pred+ld",
        "median_ms": ms,
        "clips_per_s": 8e3 / ms,
        "mfu": 0.25,
        "peak_after_imports": memory,
        "launches_per_step": 100.0,
        "syncs_per_step": None,
        "error": None,
    }


@pytest.fixture
def page(tmp_path):
    text = (ROOT / "docs" / "performance.md").read_text()
    for name in ("floor", "step", "linear", "curves", "h100"):  # as if nothing were measured yet
        text = plot_step.put(text, name, "old")
    (tmp_path / "page.md").write_text(text)
    return tmp_path / "page.md"


def test_page_is_filled(page, tmp_path, monkeypatch):
    failed = {
        "recipe": "mixed_4gpu_ld",
        "provider": "reference_compiled",
        "batch": 8,
        "dtype": "float32",
        "error": "RuntimeError: a | b",
        **dict.fromkeys(("median_ms", "clips_per_s", "peak_after_imports")),
    }
    rows = [row("vjepa_fast", 100.0, 300e6), row("reference", 250.0, 600e6), failed]
    (tmp_path / "bench_step.json").write_text(json.dumps(rows))
    curves = {
        "steps": 9,
        "window": 2,
        "steps_outside_the_spread": [],
        "largest_distance": 1e-6,
        "largest_spread": 1e-3,
        "largest_share_of_the_spread": 0.25,
        "steps_beyond_the_spread_of_that_step": [7],
    }
    (tmp_path / "training_curves.json").write_text(json.dumps(curves))
    command = ["plot_step.py", "--results", tmp_path, "--page", page, "--png", tmp_path / "step.png"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    plot_step.main()
    text = page.read_text()
    assert "| mixed_4gpu_ld | 8 | vjepa_fast | 100.0 | 80.00 | 2.50 | 25.0 | 300 | 0.50 | 100 | - |" in text
    assert "reference_compiled | RuntimeError: a / b" in text
    assert "takes up 25 % of it" in " ".join(text.split()) and "1.0e-06 apart" in " ".join(text.split())
    assert text.count("\nold\n") == 1  # linear.json is missing: that part stays
    assert (tmp_path / "step.png").stat().st_size > 5000
    plot_step.main()
    assert page.read_text() == text  # a second time changes nothing
    with pytest.raises(SystemExit, match="expected <!-- nothing -->"):
        plot_step.put(text, "nothing", "")


def test_rows_of_a_gpu_of_repeated_shapes_and_of_others():
    """Each in a line of its own; the figures of others beside the case that they are of."""
    gpu = {"host_ms": 12.5, "device_busy": 0.97, "plan_builds_per_step": 0.5}
    public = {**row("public", 1714.3, None), "case": "vit_g_256", "device": "NVIDIA H200", "mfu": None}
    del public["shape"]
    rows = [
        public,
        {**row("vjepa_fast", 900.0, 300e6), "case": "vit_g_256", "shapes": "new", **gpu},
        {**row("vjepa_fast", 800.0, 300e6), "case": None, "shapes": "repeated", **gpu},
        {**row("vjepa_fast", 850.0, 300e6), "case": None, "shapes": "new"},
    ]
    lines = plot_step.step_table(rows).splitlines()
    assert lines[2].endswith("| syncs | host ms | busy % | plans |") and lines[3] == "|---" * 14 + "|"
    assert lines[4].startswith("| vit_g_256 | 8 | public, NVIDIA H200 | 1714.3 |")
    assert lines[5].startswith("| vit_g_256 | 8 | vjepa_fast | 900.0 |") and lines[5].endswith("| 12.5 | 97 | 0.5 |")
    assert lines[6].startswith("| mixed_4gpu_ld, shapes repeated | 8 | vjepa_fast | 800.0 |")
    assert lines[7].startswith("| mixed_4gpu_ld | 8 | vjepa_fast | 850.0 |") and lines[7].endswith("| - | - | - |")
    assert [key[0] for key in plot_step.cases(rows)] == ["A device"] * 3


def test_linear_table():
    products = [
        ("forward", 2.0, 1.0),
        ("gelu", 3.0, 1.0),
        ("gradient_x", 1.0, 1.0),
        ("gradient_w", 1.0, 2.0),
        ("gradient_wb", 5.0, 4.0),
    ]
    rows = [
        {"model": "m", "layer": "qkv", "product": p, "tokens": 5, "inputs": 2, "outputs": 6, "mkl_ms": a, "other_ms": b}
        for p, a, b in products
    ]
    text = plot_step.linear_table({"device": "d", "threads": 1, "torch": "2", "rows": rows})
    assert text.splitlines()[-1] == "| m | qkv 2 to 6 | 2.00 | 3.00 | 1.00 | 0.50 | 1.25 |"


def test_floor():
    small = ["model.model_name=vit_tiny", "data.crop_size=32", "data.dataset_fpcs=[4]", "data.batch_size=2"]
    lines = step_floor.table(config.load("mixed_4gpu_motion_guided", [*step_floor.FIXED, *small]), 1, 1).splitlines()
    parts = {
        cells[1].strip(): [float(c) for c in cells[2:6]]
        for line in lines
        if len(cells := line.split("|")) == 7 and cells[2].strip().replace(".", "").isdigit()
    }
    assert list(parts) == ["target", "context", "predictor", "losses", "backward", "optimiser", "ema", "step"]
    for column in (0, 3):
        assert parts["step"][column] == pytest.approx(sum(v[column] for k, v in parts.items() if k != "step"), abs=0.5)


def curves_of(steps, folder, monkeypatch):
    """The main function of training_curves.py, on 8 clips, with its results in ``folder``."""
    places = {"--folder": folder / "videos", "--json": folder / "curves.json", "--png": folder / "curves.png"}
    words = ["--steps", steps, "--clips", 8, *(word for pair in places.items() for word in pair)]
    monkeypatch.setattr(sys, "argv", ["training_curves.py", *map(str, words)])
    return training_curves.main


def test_curves_of_a_few_steps(tmp_path, monkeypatch):
    run_curves = curves_of(3, tmp_path, monkeypatch)
    assert run_curves() == 0
    found = json.loads((tmp_path / "curves.json").read_text())
    losses = found["losses"]
    assert {len(v) for v in losses.values()} == {3} and losses["reference"][0] != losses["reference"][2]
    assert found["largest_distance"] < 1e-5 and found["steps_outside_the_spread"] == []
    assert 0 < found["largest_spread"] < 0.1 and found["largest_share_of_the_spread"] < 1
    assert (tmp_path / "curves.png").stat().st_size > 5000

    honest = training_curves.curves  # a fast step that goes elsewhere is found out

    def astray(cfg, steps):
        losses = honest(cfg, steps)
        return {**losses, "vjepa_fast": [1.5 * x for x in losses["vjepa_fast"]]}

    monkeypatch.setattr(training_curves, "curves", astray)
    assert run_curves() == 1
    assert json.loads((tmp_path / "curves.json").read_text())["steps_outside_the_spread"] == [1, 2, 3]


def test_held_to_the_largest_spread_so_far(tmp_path, monkeypatch):
    losses = {"reference": [0.0] * 4, "reference_bfloat16": [1.0, 5.0, 2.0, 2.0], "vjepa_fast": [0.5, 1.0, 4.0, 6.0]}
    monkeypatch.setattr(training_curves, "curves", lambda cfg, steps: losses)
    monkeypatch.setattr(training_curves, "WINDOW", 1)
    assert curves_of(4, tmp_path, monkeypatch)() == 1
    found = json.loads((tmp_path / "curves.json").read_text())
    assert found["steps_outside_the_spread"] == [4] and found["steps_beyond_the_spread_of_that_step"] == [3, 4]
    assert found["largest_share_of_the_spread"] == 1.2


def test_smoothed_is_the_mean_of_the_last_steps(monkeypatch):
    monkeypatch.setattr(training_curves, "WINDOW", 2)
    assert training_curves.smoothed([1.0, 2.0, 5.0], [0.0, 0.0, 9.0]) == [1.0, 1.5, 3.0]


def test_the_page_has_what_the_committed_files_say():
    page = (ROOT / "docs" / "performance.md").read_text()
    assert plot_step.put(page, "h100", gpu_page.section()) == page


def test_kernels_by_kind_and_the_least_of_the_libraries():
    kernels = [
        ["nvjet_x", 3, 5.0],
        ["cudnn_generated_fort_native_sdpa", 1, 2.0],
        ["_rope3d", 1, 1.0],
        ["void add", 1, 0.5],
    ]
    names = ["products in bfloat16", "attention", "rotary positions, as a pass", gpu_page.REST]
    assert gpu_page.by_kind(kernels) == dict(zip(names, (5.0, 2.0, 1.0, 0.5)))
    both = {"fwd_ms": 1.0, "dx_ms": 1.0, "dw_ms": 1.0}
    parts = [f"{side} {x}" for side in ("target", "context", "predictor") for x in ("qkv", "proj", "fc1", "fc2")]
    found = {f"b8 {x}": both for x in (*parts, "pred_embed1", "pred_embed2", "pred_out", "ctx_out")}
    for name in ("target attn", "context1 attn", "context2 attn", "predictor1 attn hd32"):
        for backend, ms in (("A", 2.0), ("B", 1.0)):
            found[f"b8 {name} {backend}"] = {"fwd_ms": ms, "bwd_ms": ms}
    target, context, predictor = 12 * (4 + 1), 12 * (4 * 3 + 2 * 2), 8 * 4 * 3 + 8 * 2 * 2
    assert gpu_page.least(found, 8) == target + context + predictor + 4 * 3
