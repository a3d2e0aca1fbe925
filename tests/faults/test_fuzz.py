"""A seeded part of ``make fuzz``: mutated recipes, manifests and caches are used or refused in one line."""

import json
from pathlib import Path

import pytest

from vjepa_fast.errors import UserError
from vjepa_fast.evaluation.extract import features
from vjepa_fast.files import parse_json

from . import fuzz


@pytest.mark.parametrize(("kind", "numbers"), [("configs", range(40)), ("manifests", range(40)), ("caches", range(50))])
def test_a_seeded_part(tmp_path, kind, numbers):
    counts, bad = fuzz.run(kind, numbers, tmp_path)
    assert not bad
    assert counts["refused"] and counts["read"]


def test_what_should_not_be_is_noticed(tmp_path, monkeypatch):
    """The harness tells a traceback, a hang, a long refusal and a changed cache that is taken."""

    def endless(_):
        while True:
            pass

    def fails(_):
        raise IndexError("no such thing")

    def long(_):
        raise UserError("a\nb")

    monkeypatch.setattr(fuzz, "SECONDS", 0.5)
    for load, outcome in ((endless, "hang"), (fails, "traceback"), (long, "unclear")):
        monkeypatch.setattr(fuzz.config, "load", load)
        assert fuzz.attempt("configs", 0, tmp_path)[0] == outcome
    monkeypatch.undo()
    monkeypatch.setattr(features, "parse_json", lambda text: {**parse_json(text), "sha256": "x"})
    monkeypatch.setattr(features.hashlib, "sha256", lambda _: type("Sum", (), {"hexdigest": lambda self: "x"})())
    outcomes = set()
    for number in range(60):
        place = tmp_path / str(number)
        place.mkdir()
        outcomes.add(fuzz.attempt("caches", number, place)[0])
    assert "changed" in outcomes


def test_the_committed_figures_are_of_the_whole():
    found = json.loads(Path(fuzz.__file__).with_name("fuzz.json").read_text())
    assert found["command"] == "python tests/faults/fuzz.py --configs 700 --manifests 250 --caches 50"
    for kind, number in (("configs", 700), ("manifests", 250), ("caches", 50)):
        counts = found[kind]
        assert sum(counts.values()) == counts["read"] + counts["refused"] == number
