"""Rows, the ring of sample paths, the check for non-finite values, and resumption in the middle of an interval."""

import json

import pytest
import torch

from vjepa_fast.errors import TrainingError
from vjepa_fast.trainer.distributed import Distributed
from vjepa_fast.trainer.metrics import Metrics, truncate_rows
from vjepa_fast.trainer.step import StepOutput


def output(loss, ld=1.0, paths=("a.mp4",), **kw):
    return StepOutput(
        loss=torch.tensor(loss),
        terms={"pred": torch.tensor(loss), "ld": torch.tensor(ld)},
        weights={"pred": 1.0, "ld": torch.tensor(0.5)},
        grad_norm=torch.tensor(2.0),
        lr=1e-3,
        weight_decay=0.04,
        momentum=0.99,
        clips=4,
        paths=list(paths),
        **kw,
    )


def metrics(folder, **kw):
    return Metrics(folder, world=Distributed(), ipe=3, **kw)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_row_is_the_mean_of_its_interval(tmp_path):
    m = metrics(tmp_path)
    for step, loss in ((1, 1.0), (2, 2.0), (3, 6.0)):
        out = output(loss, monitors={"rankme": torch.tensor(7.0)} if step == 2 else {})
        m.record(step, out)
    row = m.flush(out)
    assert rows(tmp_path) == [row]
    assert (row["step"], row["epoch"], row["loss"], row["terms"]) == (3, 0, 3.0, {"pred": 3.0, "ld": 1.0})
    assert row["weights"] == {"pred": 1.0, "ld": 0.5} and row["monitors"] == {"rankme": 7.0}
    assert (row["lr"], row["wd"], row["ema"], row["grad_norm"]) == (1e-3, 0.04, 0.99, 2.0)
    m.record(4, output(1.0))
    row = m.flush(output(1.0))
    assert row["epoch"] == 1 and row["monitors"] == {} and len(rows(tmp_path)) == 2


def test_first_bad_step_is_named_with_its_terms_and_samples(tmp_path):
    m = metrics(tmp_path)
    m.record(11, output(1.0, paths=["fine.mp4"]))
    m.record(12, output(1.0, ld=float("inf"), paths=["x.mp4", "y.mp4"]))
    m.record(13, output(float("nan"), paths=["later.mp4"]))
    with pytest.raises(TrainingError) as caught:
        m.flush(output(1.0))
    text = str(caught.value)
    assert "step 12" in text and "ld=inf" in text and "x.mp4, y.mp4" in text and "\n" not in text
    assert "pred" not in text and "fine.mp4" not in text and "later.mp4" not in text
    report = json.loads((tmp_path / "failure.json").read_text())
    assert report == {"step": 12, "values": {"ld": "inf"}, "samples": ["x.mp4", "y.mp4"]}
    assert not (tmp_path / "metrics.jsonl").exists()
    with pytest.raises(TrainingError):  # nor is there anything to put into a checkpoint
        m.state_dict()


def test_interval_goes_on_after_a_resume(tmp_path):
    whole, first, second = (tmp_path / n for n in ("whole", "first", "second"))
    for folder in (whole, first, second):
        folder.mkdir()
    losses = torch.randn(5).tolist()
    m, a, b = metrics(whole), metrics(first), metrics(second)
    for step, loss in enumerate(losses, 1):
        m.record(step, output(loss))
    for step, loss in enumerate(losses[:3], 1):
        a.record(step, output(loss))
    b.load_state_dict(a.state_dict(), torch.device("cpu"))
    for step, loss in enumerate(losses[3:], 4):
        b.record(step, output(loss))
    want, got = m.flush(output(0.0)), b.flush(output(0.0))
    assert {k: got[k] for k in ("step", "loss", "terms")} == {k: want[k] for k in ("step", "loss", "terms")}


def test_rows_beyond_the_checkpoint_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "loss": s / 2}) + "\n" for s in (2, 4, 6)]
    path.write_text("".join(lines) + '{"step": 8, "lo')
    assert truncate_rows(path, 4) == {"step": 4, "loss": 2.0}
    assert path.read_text() == "".join(lines[:2])
    assert truncate_rows(path, 0) == {} and path.read_text() == ""
    assert truncate_rows(tmp_path / "none.jsonl", 3) == {}
