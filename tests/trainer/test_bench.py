"""The benchmark command at a tiny size: its rows, and that it refuses to compare different losses."""
import json

import pytest

from vjepa_fast.cli import bench, main

TINY = [x for value in ("model.embed_dim=48", "model.depth=4", "model.num_heads=2", "model.pred_embed_dim=24",
                        "model.pred_depth=2", "model.pred_num_heads=2", "data.crop_size=48", "data.dataset_fpcs=[4]",
                        "data.batch_size=2", "objectives.ld.hidden_dim=8") for x in ("--set", value)]
COMMAND = ["bench", "step", "--threads", "1", "--warmup", "1", "--repeats", "2", *TINY]


def test_rows_and_table(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert main([*COMMAND, "--no-memory", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [r["provider"] for r in rows] == ["vjepa_fast", "reference"]
    assert {"op", "shape", "dtype", "provider", "mode", "median_ms", "peak_bytes", "device", "commit"} <= set(rows[0])
    assert rows[0]["first_loss"] == pytest.approx(rows[1]["first_loss"], rel=1e-5)
    assert all(0 < r["min_ms"] <= r["median_ms"] <= r["max_ms"] for r in rows)
    told = capsys.readouterr().out
    assert "x reference" in told and f"{rows[1]['median_ms']:.1f}" in told


def test_peak_memory_is_measured_in_a_process_of_its_own():
    import argparse

    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    cfg = bench.config_of(parser.parse_args(COMMAND[1:]))
    peak = bench.peak_bytes(cfg, "vjepa_fast")
    assert peak is None or peak > 1 << 20


def test_different_losses_are_refused(monkeypatch, capsys):
    honest = bench._reference

    def other(cfg, ours):
        step = honest(cfg, ours)
        step.encoder.norms_block[0].weight.data.mul_(1.1)
        return step

    monkeypatch.setattr(bench, "_reference", other)
    assert main([*COMMAND, "--no-memory"]) == 2
    assert "not comparable" in capsys.readouterr().err


@pytest.mark.parametrize("extra, words", [
    (["--providers", "ours"], "accepted: vjepa_fast, reference, compiled"), (["--repeats", "0"], "at least one"),
    (["--json", "/dev/null/x.json"], "cannot be written"),
])
def test_wrong_arguments(extra, words, capsys):
    assert main([*COMMAND, *extra]) == 2
    assert words in capsys.readouterr().err
