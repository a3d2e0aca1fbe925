"""What reading a study lets through, and what it stops at."""

import csv
import json
import shutil

import pytest

from tests.study.fake_study import make_study
from vjepa_fast.errors import DataError
from vjepa_fast.study import records

SMALL = {
    "variants": ("baseline", "ld"),
    "seeds": (0, 1),
    "samples": 20,
    "outcomes": (("motion8", "linear"), ("fewshot", "1-shot")),
}
KEY = "ld-mixed-intended-s1"


@pytest.fixture
def folder(tmp_path):
    return make_study(tmp_path / "study", **SMALL)


def edit(folder, change, key=KEY):
    path = folder / "cells" / f"{key}.json"
    cell = json.loads(path.read_text())
    change(cell)
    path.write_text(json.dumps(cell))


def refused(folder, *words, **kwargs):
    with pytest.raises(DataError) as error:
        records.load_study(folder, **kwargs)
    for word in words:
        assert word in str(error.value)


def test_reads_everything(folder):
    study = records.load_study(folder)
    assert len(study.cells) == 2 * 2 * 2 + 2 and study.missing == ()
    assert study.variants == ["baseline", "ld"] and study.regimes == ["single", "mixed"] and study.seeds == [0, 1]
    assert study.outcomes == [("fewshot", "1-shot"), ("motion8", "linear")]  # the question's first
    assert study.compat == "intended" and sorted(study.runs("ld", "mixed", "intended")) == [0, 1]
    assert sorted(study.runs("random_init", "mixed", "published")) == [0, 1]


def test_keys_follow_from_the_plan_where_it_has_none():
    plan = {
        "variants": ["baseline", "ld"],
        "regimes": ["single"],
        "seeds": [0],
        "modes": {"intended": ["baseline"], "published": ["ld"]},
    }
    assert records.expected_keys(plan) == (
        "random_init-none-intended-s0",
        "baseline-single-intended-s0",
        "ld-single-published-s0",
    )
    assert records.split_key("fwm_hw_ld-mixed-published-s12") == ("fwm_hw_ld", "mixed", "published", 12)
    with pytest.raises(DataError, match="not a cell's key"):
        records.split_key("ld-mixed-s0")


def test_missing_cells_are_named_and_can_be_allowed(folder):
    (folder / "cells" / f"{KEY}.json").unlink()
    refused(folder, "1 of 10 cells are missing", KEY, "--partial")
    (folder / "cells" / f"{KEY}.error.txt").write_text("Traceback ...\nTrainingError: loss is nan at step 7\n\n")
    study = records.load_study(folder, partial=True)
    assert study.missing == (KEY,) and study.failed == {KEY: "TrainingError: loss is nan at step 7"}
    shutil.rmtree(folder / "cells")
    refused(folder, "no cell is evaluated", partial=True)


def test_foreign_and_duplicate_cells(folder):
    cells = folder / "cells"
    shutil.copy(cells / f"{KEY}.json", cells / "copy.json")
    refused(folder, "copy.json", KEY, "lies in the file of its key")
    (cells / "copy.json").unlink()

    def rename(cell):
        cell.update(key="hw-mixed-intended-s1", variant="hw")

    shutil.copy(cells / f"{KEY}.json", cells / "hw-mixed-intended-s1.json")
    edit(folder, rename, "hw-mixed-intended-s1")
    refused(folder, "hw-mixed-intended-s1", "not part of the plan", partial=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["rows"][0].update(accuracy=float("nan")), ("rows[0].accuracy", "not a finite number")),
        (lambda c: c["geometry"][1].update(rankme=float("inf")), ("geometry[1].rankme", "not a finite number")),
        (lambda c: c["rows"][0].update(accuracy=None), ("motion8, linear", "lacks accuracy")),
        (lambda c: c["rows"][0].update(accuracy=61.0), ("61.0 is not an accuracy",)),
        (lambda c: c["rows"][0]["hits"].__setitem__(0, 1 - c["rows"][0]["hits"][0]), ("accuracy", "hits of mean")),
        (lambda c: c["rows"][1]["hits"].pop(), ("fewshot 1-shot has 19 test samples", "and 20 in")),
        (lambda c: c["rows"][0].update(chance=0.1), ("motion8 linear has a chance of", "0.1", "0.2")),
        (lambda c: c["settings"].update(steps="800"), ("trained with steps", "800", "400")),
        (lambda c: c["rows"].pop(), ("no row of fewshot 1-shot",)),
        (lambda c: c["rows"].clear(), ("no accuracy row",)),
        (lambda c: c["rows"].append(c["rows"][0]), ("two rows of motion8, linear",)),
        (lambda c: c.update(seed=7), ("ld-mixed-intended-s7", "disagree")),
        (lambda c: c.update(format=2), ("not a cell of format 1",)),
        (lambda c: c.pop("regime"), ("missing: regime",)),
    ],
)
def test_a_wrong_cell_is_an_error_that_names_it(folder, change, words):
    edit(folder, change)
    refused(folder, KEY, *words, partial=True)


def test_a_folder_that_is_no_study(folder, tmp_path):
    refused(tmp_path / "nowhere", "study.json", "not found")
    (folder / "study.json").write_text("[1]")
    refused(folder, "expected an object")
    (folder / "study.json").write_text('{"variants": ["baseline"]}')
    refused(folder, "regimes, seeds missing")


def test_flat_rows_and_csv(folder):
    study = records.load_study(folder)
    rows = records.table_rows(study)
    assert len(rows) == 10 * 2
    path = records.write_csv(folder / "results.csv", rows)
    with open(path, newline="") as file:
        read = list(csv.DictReader(file))
    (mine,) = [r for r in read if r["key"] == KEY and r["suite"] == "motion8"]
    assert float(mine["accuracy"]) == pytest.approx(study.cells[KEY].rows["motion8", "linear"].accuracy, abs=1e-6)
    assert mine["peak_mb"] == str(study.cells[KEY].cost["peak_mb"]) and mine["max_over_heads_on_test"] == ""
