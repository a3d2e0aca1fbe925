"""The committed result of the long run, made of files of ``vjepa-fast probe --json``."""

import json

from benchmarks.synthetic_small import collect
from vjepa_fast.study.demo import records


def row(kind, accuracy, **more):
    low, high = accuracy - 0.05, accuracy + 0.05
    same = {"label": kind, "kind": kind, "suite": "motion8", "probe": "linear", "n": 80, "chance": 0.25}
    return {**same, "accuracy": accuracy, "low": low, "high": high, "difference": None, **more}


def test_collect_turns_probe_files_into_the_committed_form(tmp_path):
    difference = {"value": 0.2, "low": 0.1, "high": 0.3, "p": 0.01}
    rows = [row("random", 0.3), row("pretrained", 0.5, difference=difference), row("pretrained", 0.5)]
    (tmp_path / "probe.json").write_text(json.dumps({"rows": rows}))
    (tmp_path / "run").mkdir()
    lines = [json.dumps({"step": s, "loss": 1.0 / s}) for s in range(1, 9)]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9, "lo']))
    about = {"recipe": "r", "command": "c", "device": "d", "minutes": 1.0, "commit": "x", "versions": {}}
    found = collect({3: [tmp_path / "probe.json"]}, {3: tmp_path / "run"}, **about)
    (tmp_path / "c.json").write_text(json.dumps(found))
    loaded = records.load_committed(tmp_path / "c.json")
    assert [(r["seed"], r["pretrained"], r["random"]) for r in loaded["rows"]] == [(3, 0.5, 0.3)]
    assert loaded["rows"][0]["random_ci95"] == [0.25, 0.35] and loaded["rows"][0]["difference_ci95"] == [0.1, 0.3]
    assert loaded["curves"][0]["step"] == list(range(1, 9))
