"""docs/study.md says what the committed cells say."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import study_page  # noqa: E402

from vjepa_fast.study.records import load_study  # noqa: E402


@pytest.fixture(scope="module")
def made():
    """The study, and the blocks of the page, which are made once: all figures of the report are in them."""
    study = load_study(ROOT / "benchmarks" / "results" / "study_synthetic")
    return study, study_page.blocks(study)


@pytest.fixture
def study(made, monkeypatch):
    study, blocks = made

    def known(asked):
        assert asked is study
        return blocks

    monkeypatch.setattr(study_page, "blocks", known)
    return study


def test_page_is_what_the_command_writes(study):
    text = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert study_page.page(text, study) == text


def test_another_figure_would_be_seen(study):
    text = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    figure = next(word for word in text.split("<!-- accuracy -->")[1].split() if word.replace(".", "").isdigit())
    changed = text.replace(f" {figure} ", " 99.9 ", 1)
    assert changed != text and study_page.page(changed, study) == text


def test_missing_marks_and_sections(study):
    with pytest.raises(SystemExit, match="expected <!-- answer -->"):
        study_page.page("no marks", study)
    assert list(study_page.sections("a\n## B\n\nc\n## D\ne\n")) == ["", "B", "D"]


def test_tables_of_differences_keep_the_columns_of_few_shot_suites():
    head = ("| variant | few 1-shot | order knn | few 5-shot |", "| --- | ---: | ---: | ---: |", "| a | 1 | 2 | 3 |")
    other = ("| variant | order knn |", "| --- | ---: |", "| b | 4 |")
    text = "\n".join(["Words | of no table.", "", *head, "", *other])
    assert study_page.few_columns(text, {"few"}).splitlines() == [
        *("Words | of no table.", ""),
        *("| variant | few 1-shot | few 5-shot |", "| --- | ---: | ---: |", "| a | 1 | 3 |", ""),
        *("| variant |", "| --- |", "| b |"),
    ]
