"""What `study run` asks of the instrument check before it runs anything."""

import json

import pytest

from tests.study.run.tiny import ENCODER, GRID, TINY, events_of, study
from vjepa_fast import config
from vjepa_fast.cli import main
from vjepa_fast.data.synthetic import suite_values
from vjepa_fast.errors import UserError
from vjepa_fast.study.instrument import check, gate
from vjepa_fast.study.run.plan import StudyPlan, read_plan
from vjepa_fast.study.run.runner import run_study
from vjepa_fast.study.run.suites import Settings, Synthetic

SETTING = check.Setting(
    32, {"num_frames": 8, "crop_size": 32, "frame_step": 2}, config.load("demo_baseline_single", list(ENCODER))
)


def made(*names, passed=True, reason="5-shot: no ceiling"):
    suites = {
        name: {
            "kind": "probe",
            "parameters": suite_values(name),
            "passed": passed,
            "reasons": [] if passed else [reason],
        }
        for name in names
    }
    rows = [{"suite": name, "encoder": "random", "outcome": "linear", "accuracy": 0.2} for name in names]
    return {"format": 1, "package": "x", "seed": 0, **SETTING.values(), "suites": suites, "rows": rows}


@pytest.fixture
def measured(monkeypatch):
    """`run_check` as a list of what was asked for; suites named in ``failing`` fail."""
    asked, failing = [], set()

    def fake(folder, names, setting, say):
        asked.extend(names)
        return made(*names, passed=not failing & set(names))

    monkeypatch.setattr(gate, "run_check", fake)
    return asked, failing


def test_a_suite_without_a_check_is_checked_once(tmp_path, measured):
    asked, _ = measured
    said = []
    assert gate.gate(tmp_path, ["order", "dive"], SETTING, False, said.append) == [] and asked == ["order", "dive"]
    assert "order, dive" in said[0]
    assert gate.gate(tmp_path, ["dive", "order"], SETTING, False, said.append) == [] and asked == ["order", "dive"]
    assert gate.gate(tmp_path, ["dive", "objects"], SETTING, False, said.append) == [] and asked[2:] == ["objects"]
    found = json.loads((tmp_path / "instrument.json").read_text())
    assert set(found["suites"]) == {"dive", "objects"} == {row["suite"] for row in found["rows"]}


def test_a_suite_that_failed_is_refused_with_its_reason_unless_forced(tmp_path, measured):
    measured[1].add("order")
    with pytest.raises(UserError, match="order: 5-shot: no ceiling.*--force"):
        gate.gate(tmp_path, ["order"], SETTING, False, lambda text: None)
    assert gate.gate(tmp_path, ["order"], SETTING, True, lambda text: None) == ["order"]
    assert gate.gate(tmp_path / "new", ["dive"], SETTING, True, lambda text: None) == ["dive"]  # no check at all
    assert measured[0] == ["order"] and not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", ["parameters", "size", "view", "encoder"])
def test_a_check_of_another_instrument_does_not_count(tmp_path, change):
    found = made("order")
    if change == "parameters":
        found["suites"]["order"]["parameters"]["hop"] = 1.0
    else:
        found[change] = 1
    (tmp_path / "instrument.json").write_text(json.dumps(found))
    assert gate.known(tmp_path, ["order"], SETTING)["suites"] == {}
    (tmp_path / "instrument.json").write_text(json.dumps(made("order")))
    assert list(gate.known(tmp_path, ["order"], SETTING)["suites"]) == ["order"]


def test_a_study_is_refused_before_it_renders_and_marked_where_it_is_forced(tmp_path, measured, monkeypatch):
    measured[1].add("fewshot")
    monkeypatch.setattr("vjepa_fast.study.run.cells.run", lambda job: None)
    plan = StudyPlan(tmp_path / "s", TINY, GRID, threads=1)
    with pytest.raises(UserError, match="fewshot: 5-shot"):
        run_study(plan, launcher="inline")
    assert not (plan.folder / "suites").exists()
    forced = study(tmp_path / "s")
    monkeypatch.setattr(type(forced.suite), "tasks", lambda self, regimes: [])
    events_of(forced)
    assert "fewshot" in read_plan(forced.folder)["instrument"]["forced"]


def test_the_packaged_check_is_of_the_suites_and_the_encoder_of_a_study(tmp_path):
    """Whoever changes a suite or the study's encoder validates again: `vjepa-fast study validate`, then copy."""
    suite = Synthetic(Settings(), tmp_path)
    found = gate.known(tmp_path, suite.names, suite.setting())
    assert suite.names == Synthetic.default and set(found["suites"]) == set(suite.names)
    assert not {name: entry["reasons"] for name, entry in found["suites"].items() if not entry["passed"]}


def test_a_damaged_check_and_unknown_suites_are_one_line(tmp_path, capsys):
    (tmp_path / "instrument.json").write_text("{")
    with pytest.raises(UserError, match="validate again"):
        gate.known(tmp_path, ["order"], SETTING)
    assert main(["study", "validate", str(tmp_path), "--suite", "ordre"]) == 2
    assert "--suite ordre: not known" in capsys.readouterr().err
