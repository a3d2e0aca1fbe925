import json

import pytest

from tests.study.run.tiny import ENCODER
from vjepa_fast import config
from vjepa_fast.cli import main
from vjepa_fast.errors import UserError
from vjepa_fast.study.demo.graph import Demo, run_demo
from vjepa_fast.study.demo.plan import DemoPlan, DemoRun, plan_for, run_config
from vjepa_fast.study.run.clips import WEIGHTS

TINY = DemoPlan(
    suites={
        "motion8": {"train": 24, "val": 16, "test": 16},
        "objects": {"train": 48, "val": 48, "test": 48},
        "fewshot": {"train": 216, "val": 216, "test": 432},
    },
    probed=("motion8", "objects"),
    size=32,
    runs=(
        DemoRun("baseline single", "baseline", "single", "demo_baseline_single", {"motion8": 1.0}),
        DemoRun("fwm_hw_ld mixed", "fwm_hw_ld", "mixed", "demo_fwm_hw_ld_mixed", {"motion8": 0.8, "objects": 0.2}),
    ),
    overrides=(*ENCODER, "runtime.log_every=2", "runtime.monitor_every=2"),
    supervised_steps=2,
    supervised_batch=4,
    episodes=20,
    queries=1,
)


def test_demo_end_to_end_and_again(tmp_path):
    rows, report = run_demo(tmp_path / "demo", TINY, workers=2)
    html = report.read_text()
    for text in ("random init", "raw pixels", "supervised (small)", "baseline single, student", "fwm_hw_ld mixed"):
        assert text in html
    expected = 2 * (2 * 2 + 2)  # target and student, each: two suites by two probes, and 1- and 5-shot
    pretrained = [r for r in rows if r.kind == "pretrained"]
    assert len(pretrained) == 2 * expected and all(r.difference is not None for r in pretrained)
    assert {r.kind for r in rows if r.suite == "motion8"} == {"random", "pixels", "supervised", "pretrained"}
    assert sum(r.kind == "supervised" for r in rows) == 2 + 2
    for section in ("loss", "collapse", "masks", "pca", "tradeoff"):
        assert f'<section id="{section}">' in html
    assert "No metrics were recorded" not in html and "No monitors were recorded" not in html
    stored = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert [r["accuracy"] for r in stored["rows"]] == [r.accuracy for r in rows]

    events = []
    again, _ = run_demo(tmp_path / "demo", TINY, workers=2, on_event=lambda kind, name: events.append((kind, name)))
    assert {kind for kind, _ in events} == {"kept"} and [r.to_dict() for r in again] == [r.to_dict() for r in rows]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run_demo(tmp_path / "file" / "demo", TINY)


def test_the_plan_is_the_studys():
    names = [run.name for run in DemoPlan().runs]
    assert names == ["baseline single", "fwm_hw_ld single", "baseline mixed", "fwm_hw_ld mixed"]
    assert WEIGHTS["single"] == {"motion8": 1.0} and sum(WEIGHTS["mixed"].values()) == pytest.approx(1.0)
    assert WEIGHTS["mixed"]["motion8"] == WEIGHTS["mixed"]["objects"] == 0.2  # the rest is other videos


def test_minutes_stretch_the_steps_and_the_ema_together():
    plan, run = plan_for(9.5), DemoPlan().runs[0]
    manifests = {n: {"train": f"{n}.csv"} for n in run.weights}
    plain, long = (run_config(p, run, manifests, "out", 1) for p in (DemoPlan(), plan))
    assert plan.train_scale == 2.0 and long.optimization.ipe == 2 * plain.optimization.ipe
    assert 1 - long.target.ema[0] == pytest.approx((1 - plain.target.ema[0]) / 2)
    assert plain.optimization == config.load(run.recipe).optimization and plan_for(None).train_scale == 1.0
    assert plain.data.datasets == ("motion8.csv",) and plain.folder == "out"


def test_every_task_that_is_needed_exists_and_controls_share_the_runs_weights():
    demo = Demo("somewhere", DemoPlan())
    by_name = {t.name: t for t in demo.tasks()}
    assert all(n in by_name for t in by_name.values() for n in t.needs)
    shapes = {json.dumps([c["model"], c["seed"]], sort_keys=True) for c in map(demo.plain, demo.configs)}
    assert len(shapes) == 1


@pytest.mark.parametrize("more", [["--minutes", "0"], ["--workers", "0"], ["--device", "cuda:77"], ["--minutes", "x"]])
def test_wrong_arguments_are_one_line_and_nothing_is_written(tmp_path, capsys, more):
    assert main(["demo", "--folder", str(tmp_path / "demo"), *more]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and more[0] in errors[0]
    assert not (tmp_path / "demo").exists()
