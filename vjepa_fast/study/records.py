"""Reading a study folder: its plan and its evaluated runs, checked before any number is made of them.

    STUDY/study.json              the plan: suite, variants, regimes, modes, seeds, sizes, versions, commit, device, and
                                  "keys", the runs that make up the study
    STUDY/cells/<key>.json        one evaluated run, key = <variant>-<regime>-<compat>-s<seed>, compat intended or
                                  published; the random-init control is random_init-none-intended-s<seed>
    STUDY/cells/<key>.error.txt   why a run has no cell

A cell that is missing, foreign to the plan, there twice, trained with other settings than its other seeds, measured on
other test clips or holds a number that is none stops the report with a DataError that names it. Only missing ones can
be allowed (``partial``), and are then listed.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from vjepa_fast.errors import DataError, UserError
from vjepa_fast.evaluation import Row
from vjepa_fast.files import atomic_file, parse_json, read_rows

FORMAT = 1
BASELINE, RANDOM = "baseline", "random_init"
COMPATS = ("intended", "published")
CELL_KEYS = ("format", "key", "variant", "regime", "compat", "seed", "kind", "rows")
ROW_KEYS = ("suite", "probe", "accuracy", "low", "high", "n", "chance")
LIMITS = 8  # keys named in one message


@dataclass(frozen=True)
class Cell:
    """One evaluated run. ``rows[suite, probe]`` is a Row; the rest is as the file has it. ``student_rows``: of the
    encoder that was trained, where the published code evaluates a target that never was.
    """

    key: str
    variant: str
    regime: str  # single | mixed | none (random init)
    compat: str  # intended | published
    seed: int
    kind: str  # pretrained | random
    rows: dict[tuple[str, str], Row]
    student_rows: dict[tuple[str, str], Row] = field(default_factory=dict)
    encoder: str = ""
    geometry: list[dict] = field(default_factory=list)
    cost: dict = field(default_factory=dict)
    curve: dict = field(default_factory=dict)
    config_hash: str = ""
    versions: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A study as far as it ran: ``cells`` by key, ``missing`` keys of the plan, ``failed`` ones with their reason."""

    folder: Path
    plan: dict
    cells: dict[str, Cell]
    expected: tuple[str, ...]
    missing: tuple[str, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def variants(self) -> list[str]:
        """Variants that have a cell, in the order of the plan, baseline first, without random init."""
        found = {c.variant for c in self.cells.values()} - {RANDOM}
        order = [BASELINE, *self.plan.get("variants", ()), *sorted(found)]
        return [v for v in dict.fromkeys(order) if v in found]

    def planned(self, *places: tuple[str, str]) -> list[str]:
        """Variants that the plan has in all ``places`` (regime, compat), whether or not they ran, without random init;
        without places all variants of the plan.
        """
        runs = {split_key(k)[:3] for k in self.expected}
        order = [*self.variants, *(split_key(k)[0] for k in self.expected)]
        return [v for v in dict.fromkeys(order) if v != RANDOM and all((v, *place) in runs for place in places)]

    @property
    def regimes(self) -> list[str]:
        """Regimes that have a cell: single, mixed, then any other."""
        found = [c.regime for c in self.cells.values()]
        return [r for r in dict.fromkeys(["single", "mixed", *sorted(found)]) if r in found and r != "none"]

    @property
    def compats(self) -> list[str]:
        """Modes that have a cell of a trained run, intended first."""
        found = {c.compat for c in self.cells.values() if c.variant != RANDOM}
        return [c for c in COMPATS if c in found]

    @property
    def compat(self) -> str:
        """The mode that the main tables show: ``intended`` where there is one."""
        return self.compats[0] if self.compats else COMPATS[0]

    @property
    def seeds(self) -> list[int]:
        """Seeds that have a cell."""
        return sorted({c.seed for c in self.cells.values()})

    @property
    def outcomes(self) -> list[tuple[str, str]]:
        """(suite, probe) of all rows, few-shot first, in the order met."""
        found = dict.fromkeys(o for c in self.cells.values() for o in c.rows)
        return sorted(found, key=lambda o: not is_fewshot(o))

    def runs(self, variant: str, regime: str, compat: str) -> dict[int, Cell]:
        """Cells of one variant by seed; random init has no regime and one mode, so it is found from any."""
        if variant == RANDOM:
            regime, compat = "none", "intended"
        return {
            c.seed: c
            for c in sorted(self.cells.values(), key=lambda c: c.seed)
            if (c.variant, c.regime, c.compat) == (variant, regime, compat)
        }


def read_metrics(folder: str | os.PathLike) -> list[dict]:
    """The rows of a run's ``metrics.jsonl`` by step, each as it came out last; a torn last line is left out.

    Raises:
        UserError: a line is damaged; names it.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        return []
    found, damaged = read_rows(path)
    if damaged:
        raise UserError(f"{path}: line {damaged[0]} is damaged; remove it, or train the last steps again")
    rows: dict[int, dict] = {}
    for _, row in found:
        try:
            rows[int(row["step"])] = row
        except (ValueError, KeyError, TypeError):
            continue
    return [rows[step] for step in sorted(rows)]


def is_fewshot(outcome: tuple[str, str]) -> bool:
    """Whether an outcome is of few-shot episodes."""
    return outcome[1].endswith("-shot")


def cell_key(variant: str, regime: str, compat: str, seed: int) -> str:
    """The key of a run: ``<variant>-<regime>-<compat>-s<seed>``."""
    return f"{variant}-{regime}-{compat}-s{seed}"


def split_key(key: str) -> tuple[str, str, str, int]:
    """(variant, regime, compat, seed) of a key. Raises DataError for any other text."""
    parts = key.rsplit("-", 3)
    if len(parts) != 4 or not parts[3].startswith("s") or not parts[3][1:].isdigit():
        raise DataError(f"{key}: not a cell's key; expected <variant>-<regime>-<compat>-s<seed>")
    return parts[0], parts[1], parts[2], int(parts[3][1:])


def expected_keys(plan: dict) -> tuple[str, ...]:
    """The cells that make up a plan: its ``keys``; without them random init per seed and, for the variants of each mode
    (``modes``: {compat: variants}), all regimes and seeds.
    """
    if plan.get("keys"):
        return tuple(plan["keys"])
    modes = plan.get("modes") or {"intended": plan["variants"]}
    keys = [cell_key(v, r, c, s) for c in modes for v in modes[c] for r in plan["regimes"] for s in plan["seeds"]]
    return (*(cell_key(RANDOM, "none", "intended", s) for s in plan["seeds"]), *keys)


def load_study(folder: str | os.PathLike, partial: bool = False) -> Study:
    """Read and check ``folder``. ``partial`` lets cells be missing (baseline included); nothing else is let through.

    Raises DataError that names the file and what is missing, got and expected.
    """
    folder = Path(folder)
    plan = _read(folder / "study.json")
    lacking = [k for k in ("variants", "regimes", "seeds") if not plan.get(k)]
    if lacking and not plan.get("keys"):
        raise DataError(f"{folder / 'study.json'}: not a study's plan, {', '.join(lacking)} missing")
    expected = expected_keys(plan)
    cells: dict[str, Cell] = {}
    for path in sorted((folder / "cells").glob("*.json")):
        cell = _cell(path)
        if cell.key != path.stem:
            raise DataError(f"{path}: holds cell {cell.key}; a cell lies in the file of its key (a copy?)")
        if cell.key not in expected:
            raise DataError(f"{path}: cell {cell.key} is not part of the plan in study.json (of another study?)")
        cells[cell.key] = cell
    missing = tuple(k for k in expected if k not in cells)
    if not cells:
        raise DataError(f"{folder}: no cell is evaluated yet, {len(expected)} expected in {folder / 'cells'}")
    if missing and not partial:
        raise DataError(
            f"{folder}: {len(missing)} of {len(expected)} cells are missing: {some(missing)}; "
            "`vjepa-fast study run` runs them, --partial reports without them"
        )
    _same_settings(folder, cells)
    _same_tests(folder, cells)
    failed = {k: reason for k in missing if (reason := _reason(folder / "cells" / f"{k}.error.txt"))}
    return Study(folder, plan, cells, expected, missing, failed)


def some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:LIMITS]) + (f" and {len(names) - LIMITS} more" if len(names) > LIMITS else "")


def _reason(path: Path) -> str:
    """The last line that a failed run left; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1].strip()
    except (OSError, IndexError):
        return ""


def _read(path: Path) -> dict:
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: not found; is this the folder of `vjepa-fast study run`?") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected an object, got {type(found).__name__}")
    return found


def _not_finite(value) -> str | None:
    """The place of the first number that is NaN or infinite."""
    if isinstance(value, float):
        return None if math.isfinite(value) else ""
    named = isinstance(value, dict)
    for key, item in value.items() if named else enumerate(value):
        place = _not_finite(item) if isinstance(item, (float, dict, list)) else None
        if place is not None:
            return f".{key}{place}" if named else f"[{key}]{place}"
    return None


def _cell(path: Path) -> Cell:
    found = _read(path)
    lacking = [k for k in CELL_KEYS if k not in found]
    if lacking or found["format"] != FORMAT:
        raise DataError(f"{path}: not a cell of format {FORMAT}; missing: {', '.join(lacking) or 'that format'}")
    place = _not_finite(found)
    if place:
        raise DataError(f"{path}: {place.lstrip('.')} is not a finite number; evaluate the run again")
    identity = (found["variant"], found["regime"], found["compat"], found["seed"])
    if cell_key(*identity) != found["key"]:
        raise DataError(f"{path}: key {found['key']} and its parts {cell_key(*identity)} disagree")
    if not found["rows"]:
        raise DataError(f"{path}: no accuracy row")
    rows, students = _rows(path, found["rows"]), _rows(path, found.get("student_rows") or [])
    names = {f.name for f in fields(Cell)} - {"rows", "student_rows"}
    return Cell(**{k: v for k, v in found.items() if k in names and v is not None}, rows=rows, student_rows=students)


def _rows(path: Path, found: list[dict]) -> dict[tuple[str, str], Row]:
    rows: dict[tuple[str, str], Row] = {}
    for row in (_row(path, r) for r in found):
        if rows.setdefault((row.suite, row.probe), row) is not row:
            raise DataError(f"{path}: two rows of {row.suite}, {row.probe}")
    return rows


def _row(path: Path, r: dict) -> Row:
    lacking = [k for k in ROW_KEYS if r.get(k) is None]
    if lacking:
        raise DataError(f"{path}: a row of {r.get('suite')}, {r.get('probe')} lacks {', '.join(lacking)}")
    hits = r.get("hits") or ()
    bad = [h for h in (r["accuracy"], *(h for h in hits if h is not None)) if not 0 <= h <= 1]
    if bad:
        raise DataError(f"{path}: {r['suite']}, {r['probe']}: {bad[0]} is not an accuracy in [0, 1]")
    values: dict[str, Any] = {f.name: r[f.name] for f in fields(Row) if f.name in r}
    row = Row(**{**values, "hits": tuple(hits)})
    if not hits or is_fewshot((row.suite, row.probe)):
        return row
    mean = float(np.mean(hits))
    if len(hits) != row.n or abs(mean - row.accuracy) > 1e-6:
        raise DataError(
            f"{path}: {row.suite}, {row.probe}: accuracy {row.accuracy:.6f} of {row.n} samples, "
            f"but {len(hits)} hits of mean {mean:.6f}"
        )
    return row


def _same_settings(folder: Path, cells: dict[str, Cell]) -> None:
    """The seeds of one variant, regime and mode must differ in the seed alone."""
    first: dict[tuple, Cell] = {}
    for cell in cells.values():
        other = first.setdefault((cell.variant, cell.regime, cell.compat), cell)
        for name in sorted({*cell.settings, *other.settings} - {"seed"}):
            mine, there = cell.settings.get(name), other.settings.get(name)
            if mine != there:
                raise DataError(
                    f"{folder}: cell {cell.key} was trained with {name} {mine}, cell {other.key} with {there}; "
                    "they are not seeds of one run, remove one and run it again"
                )


def _same_tests(folder: Path, cells: dict[str, Cell]) -> None:
    """Paired differences need the same test samples everywhere, and the same outcomes."""
    first: dict[tuple, tuple[str, int, float]] = {}
    outcomes = set().union(*(c.rows for c in cells.values()))
    for cell in cells.values():
        lacking = sorted(outcomes - set(cell.rows))
        if lacking:
            names = ", ".join(f"{s} {p}" for s, p in lacking[:LIMITS])
            raise DataError(f"{folder}: cell {cell.key} has no row of {names}, which other cells have")
        for outcome, row in (*cell.rows.items(), *cell.student_rows.items()):
            key, n, chance = first.setdefault(outcome, (cell.key, len(row.hits), row.chance))
            if len(row.hits) != n:
                raise DataError(
                    f"{folder}: {' '.join(outcome)} has {len(row.hits)} test samples in cell {cell.key} and {n} in "
                    f"{key}; they cannot be paired"
                )
            if abs(row.chance - chance) > 1e-6:
                raise DataError(
                    f"{folder}: {' '.join(outcome)} has a chance of {row.chance:.4g} in cell {cell.key} and "
                    f"{chance:.4g} in {key}; it was measured on other test samples, or with another number of classes"
                )


def table_rows(study: Study) -> list[dict]:
    """One flat dict per cell and outcome: identity, accuracy with its interval, cost."""
    identity = ("key", "variant", "regime", "compat", "seed", "kind", "encoder")
    return [
        {
            **{k: getattr(cell, k) for k in identity},
            "suite": row.suite,
            "probe": row.probe,
            **{k: round(getattr(row, k), 6) for k in ("accuracy", "low", "high", "n", "chance")},
            "max_over_heads_on_test": row.chosen.get("max_over_heads_on_test"),
            **{k: cell.cost.get(k) for k in ("step_ms", "peak_mb", "steps", "minutes")},
            "config_hash": cell.config_hash,
            "commit": cell.versions.get("commit"),
        }
        for cell in (study.cells[key] for key in study.expected if key in study.cells)
        for row in cell.rows.values()
    ]


def write_csv(path: str | os.PathLike, rows: Sequence[dict]) -> Path:
    """Write flat dicts of equal keys as CSV (None is empty). Raises UserError where the file cannot be written."""
    path = Path(path)
    with atomic_file(path, newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["empty"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path
