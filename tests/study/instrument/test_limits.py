"""Verdicts of the instrument check: each limit fails alone, and says what it found."""

import pytest

from vjepa_fast.study.instrument.limits import LIMITS, verdict

FEW = {  # a suite with range
    "supervised": {"1-shot": 0.7, "5-shot": 0.82},
    "half": {"1-shot": 0.5, "5-shot": 0.6},
    "shuffled": {"1-shot": 0.33, "5-shot": 0.4},
    "random": {"1-shot": 0.33, "5-shot": 0.41},
    "pixels": {"1-shot": 0.23, "5-shot": 0.28},
}
PROBED = {name: {"linear": value} for name, value in dict(zip(FEW, (0.9, 0.6, 0.3, 0.31, 0.1))).items()}


def rows(table, **changes):
    found = {(encoder, outcome): value for encoder, values in table.items() for outcome, value in values.items()}
    for name, value in changes.items():
        encoder, shot = name.split("_")
        found[encoder, f"{shot}-shot" if shot.isdigit() else shot] = value
    return [
        {"encoder": encoder, "outcome": outcome, "accuracy": value}
        for (encoder, outcome), value in found.items()
        if value is not None
    ]


def test_suites_with_range_pass():
    assert verdict("fewshot", rows(FEW)).passed and verdict("probe", rows(PROBED)).passed
    assert verdict("fewshot", rows(FEW)).reasons == () and set(LIMITS) == {"fewshot", "probe"}


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("fewshot", {"supervised_5": 0.799}, ["5-shot", "79.9 %", "under 80.0 %"]),
        ("fewshot", {"supervised_1": 0.599, "half_1": 0.55}, ["1-shot", "59.9 %", "under 60.0 %"]),
        ("fewshot", {"random_5": 0.46}, ["5-shot", "random weights reach 46.0 %", "over 45.0 %"]),
        ("fewshot", {"pixels_5": 0.63}, ["raw pixels reach 63.0 %", "less than 20 points under", "82.0 %"]),
        ("fewshot", {"shuffled_5": 0.52}, ["shuffled labels reaches 52.0 %", "10 points over", "41.0 %"]),
        ("fewshot", {"half_5": None}, ["5-shot", "no row of half"]),
        ("probe", {"supervised_linear": 0.79}, ["linear", "79.0 %", "under 80.0 %"]),
        ("probe", {"random_linear": 0.71, "half_linear": 0.8}, ["random weights reach 71.0 %", "less than 20 points"]),
    ],
)
def test_each_limit_fails_alone_and_says_why(kind, changes, words):
    judged = verdict(kind, rows(FEW if kind == "fewshot" else PROBED, **changes))
    assert not judged.passed and len(judged.reasons) == 1 and all(word in judged.reasons[0] for word in words)


def test_an_order_that_is_not_expected_is_noted_and_fails_nothing():
    judged = verdict("probe", rows(PROBED, half_linear=0.2))
    assert judged.passed and "supervised 90.0 %, half 20.0 %, random 31.0 %" in judged.notes[0]
