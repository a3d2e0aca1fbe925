"""benchmarks/bench_data.py: the page shows the recorded figures, and a reader of other frames is found out."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np

from benchmarks import bench_data
from vjepa_fast.data.decoders import choose_decoder
from vjepa_fast.data.sampling import Sampling


def test_the_page_shows_what_is_recorded():
    text = (Path(__file__).parents[2] / "docs" / "decoders.md").read_text(encoding="utf-8")
    recorded = json.loads(bench_data.RESULTS.read_text(encoding="utf-8"))
    assert bench_data.page(text, recorded) == text
    ours = {row["decoder"] for row in recorded["rows"] if row["what"] == "batches"}
    assert {"pyav", "torchcodec", "dali"} <= ours


def test_rates_and_wrong_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_data, "FRAMES", 40)
    options = {"g": "12", "preset": "ultrafast"}
    path = bench_data.write(
        tmp_path / "a.mp4", bench_data.draw(0, (64, 48)), Fraction(25), "libx264", options, "yuv420p"
    )
    decoder = choose_decoder("pyav")

    def read(path, numbers):
        return decoder.read_clip(path, 16, Sampling(2), int(numbers[0]))

    row = bench_data.frames_row([path], 2, 1, read, 0.05)
    assert row["right"] == 1 and row["clips_per_s"] > 0 and row["cpu_ms"] > 0
    beside = bench_data.frames_row([path], 2, 1, lambda path, n: np.roll(read(path, n), 1, axis=0), 0.05)
    assert beside["right"] == 0
    batches = bench_data.batches_row([path], 2, 1, "pyav", 0.05)
    row = {"film": "a", "step": 2, "decoder": "pyav", "threads": 1}
    result = {
        "machine": bench_data.machine(),
        "rows": [{"what": "frames", **row, **beside}, {"what": "batches", **row, **batches}],
    }
    assert "100 % of clips wrong" in bench_data.tables(result)
