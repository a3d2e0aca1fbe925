"""The instrument check of a study as its report shows it, and which suites it bars from findings.

``STUDY/instrument.json`` is what `vjepa-fast study validate` wrote (docs/instrument.md has its format).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vjepa_fast.errors import DataError
from vjepa_fast.files import parse_json
from vjepa_fast.study.instrument.check import FILE, FORMAT
from vjepa_fast.study.records import Study

NAMES = {  # of the controls, in the order of the table
    "supervised": "trained with labels",
    "half": "half-trained with labels",
    "random": "random weights",
    "pixels": "raw pixels",
    "shuffled": "trained with shuffled labels",
}
UNCHECKED = "no instrument check: it is not known whether this suite can tell a good encoder from a bad one"


@dataclass(frozen=True)
class Line:
    """One outcome of the check: ``cells`` has the row of each control of NAMES, None where there is none."""

    suite: str
    outcome: str
    cells: list[Mapping[str, Any] | None]
    chance: float | None
    passed: bool
    reasons: list[str]


def read(study: Study) -> dict[str, Any] | None:
    """The content of the study's instrument.json, None where there is none. DataError where it is of another form."""
    path = study.folder / FILE if study.folder is not None else None
    if path is None or not path.is_file():
        return None
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}")
        for verdict in found["suites"].values():
            _ = (bool(verdict["passed"]), [str(r) for r in verdict["reasons"]])
        for row in found["rows"]:
            _ = (row["suite"], row["encoder"], row["outcome"])
            if not all(math.isfinite(row[k]) for k in ("accuracy", "low", "high", "chance")):
                raise ValueError(f"a row of {row['suite']} with a number that is none")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not an instrument check of format {FORMAT} ({type(error).__name__}: {error}); "
            "write it again with `vjepa-fast study validate`"
        ) from None
    return found


def barred(study: Study, instrument: Mapping[str, Any] | None) -> dict[str, str]:
    """By suite of the study, why nothing on it counts as a finding: its check failed, or it has none.

    Public data sets (``--suite paper``) have no check of their own; there only a failed one bars.
    """
    checked, out = (instrument or {}).get("suites", {}), {}
    for suite in dict.fromkeys(s for s, _ in study.outcomes):
        verdict = checked.get(suite)
        if verdict is None and study.plan.get("suite") != "paper":
            out[suite] = UNCHECKED
        elif verdict is not None and not verdict["passed"]:
            reasons = "; ".join(map(str, verdict["reasons"])) or "no reason was recorded"
            out[suite] = f"its instrument check failed ({reasons})"
    return out


def summary(instrument: Mapping[str, Any] | None, barred: Mapping[str, str]) -> str:
    """What the check says of the study as a whole; empty where ``barred`` says it by suite."""
    if barred:
        return ""
    if instrument is None:
        return "Public data sets have no such check; random init stands beside every result."
    return "Every suite of this study has passed."


def lines(study: Study, instrument: Mapping[str, Any] | None) -> list[Line]:
    """The table of the check: a line per suite and outcome that was checked, suites of the study first."""
    if instrument is None:
        return []
    measured = dict.fromkeys(s for s, _ in study.outcomes)
    rows: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in instrument["rows"]:
        rows.setdefault((row["suite"], row["outcome"]), {})[row["encoder"]] = row
    suites: Sequence[str] = sorted(instrument["suites"], key=lambda s: s not in measured)
    out = []
    for suite in suites:
        verdict = instrument["suites"][suite]
        for place, cells in ((p, c) for p, c in rows.items() if p[0] == suite):
            reasons = [str(r) for r in verdict["reasons"]]
            chance = next((r["chance"] for r in cells.values()), None)
            found = [cells.get(name) for name in NAMES]
            out.append(Line(suite, place[1], found, chance, bool(verdict["passed"]), reasons))
    return out
