"""The tables of a study's report as plain data; ``latex`` and the templates lay them out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vjepa_fast.study.records import BASELINE, RANDOM, Cell, Study, is_fewshot, split_key
from vjepa_fast.study.stats import KINDS, MEAN, STUDENT, Comparison

TEMPORAL = ("motion8", "order", "dive", "diving48", "ssv2")
APPEARANCE = ("objects", "imagenet100")
GEOMETRY_COLUMNS = {  # key in a cell's geometry -> name, digits
    "rankme": ("RankMe", 1),
    "lidar": ("LiDAR", 1),
    "alpha_req": ("alpha-ReQ", 2),
    "feature_std": ("feature std", 3),
    "mean_cosine": ("mean cosine", 3),
}
VERSIONS = ("package", "vjepa_fast", "torch", "python", "commit", "device", "dtype", "system")  # must not differ


@dataclass(frozen=True)
class DeltaTable:
    """Differences of one kind, regime and mode: a line per variant, a column per outcome (suite, probe)."""

    kind: str
    regime: str
    compat: str
    columns: list[tuple[str, str]]
    lines: list[tuple[str, list[Comparison | None]]]

    @property
    def title(self) -> str:
        """What is subtracted from what, regime and mode."""
        both = (self.regime, self.compat)
        where = {"control": (), "mode": both[:1], "regime": both[1:]}.get(self.kind, both)
        return ", ".join((KINDS[self.kind], *where))

    @property
    def families(self) -> list[int]:
        """Sizes of the families that the tests of this table are corrected in."""
        return sorted({c.family for _, cells in self.lines for c in cells if c is not None and c.variant != MEAN})


def line_order(study: Study) -> list[str]:
    """Names of lines in the order of the plan: each variant, its student where that has a line, last the mean."""
    return [*(name for v in study.variants for name in (v, v + STUDENT)), MEAN]


def delta_tables(comparisons: Sequence[Comparison], study: Study, kind: str) -> list[DeltaTable]:
    """The comparisons of one kind, a table per regime and mode; of the control one, with a line per regime and mode."""
    places: dict[tuple[str, str], dict] = {}
    for c in comparisons:
        place, name = (c.regime, c.compat), c.variant
        if kind == "control":
            place, name = ("all", "all"), f"{c.regime}, {c.compat}"
        if c.kind == kind:
            places.setdefault(place, {})[name, c.outcome] = c
    order, out = line_order(study), []
    for place, cells in places.items():
        met = dict.fromkeys(name for name, _ in cells)
        names = met if kind == "control" else [name for name in order if name in met]
        lines = [(name, [cells.get((name, o)) for o in study.outcomes]) for name in names]
        out.append(DeltaTable(kind, *place, study.outcomes, lines))
    return out


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def accuracy_lines(study: Study, regime: str, compat: str) -> list[tuple[str, int, list[tuple | None]]]:
    """(variant, seeds, [(mean, std over seeds or None) per outcome]) of a regime, random init first."""
    out = []
    for variant in (RANDOM, *study.variants):
        cells = list(study.runs(variant, regime, compat).values())
        if cells:
            values = [[c.rows[o].accuracy for c in cells if o in c.rows] for o in study.outcomes]
            line = [(_mean(v), float(np.std(v, ddof=1)) if len(v) > 1 else None) if v else None for v in values]
            out.append((variant, len(cells), line))
    return out


def chances(study: Study) -> dict[tuple[str, str], float]:
    """What guessing gives, per outcome (``load_study`` holds all cells to one value)."""
    return {o: row.chance for cell in study.cells.values() for o, row in cell.rows.items()}


def comparison_rows(comparisons: Sequence[Comparison]) -> list[dict]:
    """Flat dicts for CSV and JSON, differences in percentage points."""

    def pp(x):
        return None if x is None else round(100 * x, 4)

    return [
        {
            "comparison": KINDS[c.kind],
            "variant": c.variant,
            "regime": c.regime,
            "compat": c.compat,
            "suite": c.suite,
            "probe": c.probe,
            "minus": c.against,
            "seeds": len(c.seeds),
            "accuracy": pp(c.levels[0]),
            "accuracy_subtracted": pp(c.levels[1]),
            "delta_points": pp(c.value),
            "t_low": pp(c.low),
            "t_high": pp(c.high),
            "bootstrap_low": pp(c.boot_low),
            "bootstrap_high": pp(c.boot_high),
            "p": None if c.p is None else float(f"{c.p:.4g}"),
            "p_holm": None if c.p_holm is None else float(f"{c.p_holm:.4g}"),
            "family": c.family,
            "detectable_points": pp(c.detectable),
            "margin_points": pp(c.margin),
            "p_equivalent": None if c.p_equal is None else float(f"{c.p_equal:.4g}"),
            "verdict": c.verdict,
            "not_judged_because": c.barred,
            "note": c.note,
            "deltas_by_seed": " ".join(f"{s}:{100 * d:.4f}" for s, d in zip(c.seeds, c.deltas)),
        }
        for c in comparisons
    ]


def tradeoff_axes(outcomes: Sequence[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The (temporal, appearance) outcomes among those of a study, by linear probe where there is one."""
    probes = [p for _, p in outcomes]
    probe = "linear" if "linear" in probes else next((p for p in probes if not p.endswith("-shot")), None)
    first, second = ([o for o in outcomes if o[0] in group and o[1] == probe] for group in (TEMPORAL, APPEARANCE))
    return first, second


def cost_table(study: Study) -> list[dict]:
    """Cost per variant and regime: means over seeds of ms and MB per step, and both minus the baseline's; None where
    not measured. {"variant", "regime", "step_ms", "peak_mb", "minutes", "ms_more", "mb_more", "values": per seed}.
    """
    out = []
    for regime in study.regimes:
        base = {}
        for variant in study.variants:
            cells = study.runs(variant, regime, study.compat).values()
            if not cells:
                continue
            keys = ("step_ms", "peak_mb", "minutes")
            values = {k: [c.cost[k] for c in cells if c.cost.get(k) is not None] for k in keys}
            mean = {k: _mean(v) for k, v in values.items()}
            base = mean if variant == BASELINE else base
            pairs = {
                "ms_more": (mean["step_ms"], base.get("step_ms")),
                "mb_more": (mean["peak_mb"], base.get("peak_mb")),
            }
            more = {k: None if a is None or b is None else a - b for k, (a, b) in pairs.items()}
            out.append({"variant": variant, "regime": regime, **mean, **more, "values": values})
    return out


def compute_unit(study: Study) -> str:
    """What training time is counted in: "CPU-minute", or "GPU-hour" where runs were made on a GPU."""
    devices = {str(c.versions.get("device", "cpu")) for c in study.cells.values() if c.variant != RANDOM}
    return "CPU-minute" if all(d.startswith("cpu") for d in devices) else "GPU-hour"


def _time_spent(cell: Cell, unit: str) -> float | None:
    """Training time of a run in ``unit``; on the CPU its minutes times its threads."""
    minutes = cell.cost.get("minutes")
    if minutes is None:
        return None
    threads = str(cell.versions.get("threads", "1"))
    return minutes / 60 if unit == "GPU-hour" else minutes * (int(threads) if threads.isdigit() else 1)


def compute_outcomes(study: Study) -> list[tuple[str, str]]:
    """Of each few-shot suite the outcome with the most shots."""
    few = sorted(filter(is_fewshot, study.outcomes), key=lambda o: int(re.sub(r"\D", "", o[1].split()[-1]) or 0))
    return list({o[0]: o for o in few}.values())


def compute_table(study: Study) -> list[dict]:
    """What training cost and what it brought, per variant and regime, means over seeds:
    {"variant", "regime", "time": in `compute_unit`, "pflop": 1e15 FLOP, "outcomes": {outcome: {"accuracy", "low",
    "high": range over seeds, "gain": over random init of the same seed in points, "per_time", "per_pflop": gain by
    either}}}. None where it was not recorded.
    """
    unit, out = compute_unit(study), []
    random = study.runs(RANDOM, "none", "intended")
    for regime in study.regimes:
        for variant in study.variants:
            cells = study.runs(variant, regime, study.compat)
            if not cells:
                continue
            spent = [t for c in cells.values() if (t := _time_spent(c, unit)) is not None]
            flops = [c.cost["flops"] for c in cells.values() if c.cost.get("flops") is not None]
            time, pflop = _mean(spent), _mean([f / 1e15 for f in flops])
            row: dict[str, Any] = {"variant": variant, "regime": regime, "time": time, "pflop": pflop, "outcomes": {}}
            for o in compute_outcomes(study):
                values = [c.rows[o].accuracy for c in cells.values() if o in c.rows]
                gains = [
                    100 * (c.rows[o].accuracy - random[s].rows[o].accuracy)
                    for s, c in cells.items()
                    if s in random and o in c.rows and o in random[s].rows
                ]
                gain = _mean(gains)
                if values:
                    row["outcomes"][o] = {
                        "accuracy": _mean(values),
                        "low": min(values),
                        "high": max(values),
                        "gain": gain,
                        "per_time": gain / time if gain is not None and time else None,
                        "per_pflop": gain / pflop if gain is not None and pflop else None,
                    }
            out.append(row)
    return out


def geometry_table(study: Study) -> list[dict]:
    """Geometry figures per variant, regime, level and subspace: means over seeds (None where not computed)."""
    out = []
    for variant in (RANDOM, *study.variants):
        for regime in ["none"] if variant == RANDOM else study.regimes:
            by: dict[tuple, list[dict]] = {}
            for cell in study.runs(variant, regime, study.compat).values():
                for g in cell.geometry:
                    if not cell.encoder or g.get("encoder") in (None, cell.encoder):
                        by.setdefault((g["level"], g["subspace"]), []).append(g)
            for (level, subspace), rows in by.items():
                mean = {k: _mean([g[k] for g in rows if g.get(k) is not None]) for k in GEOMETRY_COLUMNS}
                out.append({"variant": variant, "regime": regime, "level": level, "subspace": subspace, **mean})
    return out


def geometry_lines(table: Sequence[dict]) -> list[tuple[str, str, list[tuple[str, ...]]]]:
    """(variant, regime, [text of (whole, appearance half, dynamics half) per figure]), all levels together."""
    found = {(r["variant"], r["regime"], r["subspace"]): r for r in table if r["level"] == "all"}
    out = []
    for place in dict.fromkeys(k[:2] for k in found):
        rows = [found.get((*place, s), {}) for s in ("all", "appearance", "dynamics")]
        cells = [
            tuple("n/a" if r.get(key) is None else f"{r[key]:.{digits}f}" for r in rows)
            for key, (_, digits) in GEOMETRY_COLUMNS.items()
        ]
        out.append((*place, cells))
    return out


def settings_table(study: Study) -> dict:
    """Of one seed: settings that all runs have (``shared``), names of those that ``differ``, and ``setting_lines``:
    [("variant, regime, mode", settings)].
    """
    lines = []
    for variant in study.variants:
        for regime in study.regimes:
            for compat in study.compats:
                cells = list(study.runs(variant, regime, compat).values())
                if cells and cells[0].settings:
                    text = {k: str(v) for k, v in cells[0].settings.items() if k != "seed"}
                    lines.append((f"{variant}, {regime}" + (f", {compat}" if len(study.compats) > 1 else ""), text))
    names = list(dict.fromkeys(k for _, s in lines for k in s))
    differ = [k for k in names if len({s.get(k) for _, s in lines}) > 1]
    shared = {k: lines[0][1][k] for k in names if k not in differ}
    return {"shared": shared, "differ": differ, "setting_lines": lines}


def coverage(study: Study) -> dict:
    """What ran: ``coverage_columns`` (regime, mode), and ``coverage``: per variant "evaluated of planned" in each."""
    places: dict[tuple, list[bool]] = {}
    for key in study.expected:
        places.setdefault(split_key(key)[:3], []).append(key in study.cells)
    columns = list(dict.fromkeys(place[1:] for place in places))
    lines = []
    for variant in dict.fromkeys((RANDOM, BASELINE, *study.planned())):
        found = [places.get((variant, *column)) for column in columns]
        if any(found):
            lines.append((variant, [f"{sum(ran)} of {len(ran)}" if ran else "" for ran in found]))
    return {"coverage_columns": columns, "coverage": lines}


def run_lines(study: Study) -> list[dict]:
    """The list of runs, in the order of the plan: {"key", "state": evaluated | failed | did not run, "minutes",
    "few": [accuracy per few-shot outcome or None], "commit"}.
    """
    few = [o for o in study.outcomes if is_fewshot(o)]
    out = []
    for key in study.expected:
        cell = study.cells.get(key)
        state = "evaluated" if cell else "failed" if key in study.failed else "did not run"
        accuracy = [cell.rows[o].accuracy if cell and o in cell.rows else None for o in few]
        found = (cell.cost.get("minutes"), cell.versions.get("commit")) if cell else (None, None)
        out.append({"key": key, "state": state, "minutes": found[0], "few": accuracy, "commit": found[1]})
    return out


def environment_of(study: Study) -> dict[str, str]:
    """Versions, commit, device and sizes of the plan as text; versions that differ between cells are named."""
    plan = study.plan
    out = {k: str(plan[k]) for k in ("suite", "device", "commit") if plan.get(k)}
    out |= {k: _plain(plan[k]) for k in ("sizes", "evaluation", "versions") if plan.get(k)}
    for key in sorted({k for c in study.cells.values() for k in c.versions if k in VERSIONS}):
        seen = sorted({str(c.versions[key]) for c in study.cells.values() if key in c.versions})
        if key in ("commit", "device"):  # of the runs, not of the last command as in the plan
            out[key] = ", ".join(seen) + (" (+: with changes not committed)" if "+" in "".join(seen) else "")
        if len(seen) > 1:
            out[f"runs differ in {key}"] = ", ".join(seen)
    minutes = [c.cost["minutes"] for c in study.cells.values() if c.cost.get("minutes") is not None]
    if minutes:
        out["training time"] = f"{sum(minutes):.0f} minutes in all"
    return out


def _plain(value: object) -> str:
    """Nested values as one line: "motion8 (train 800, test 480), order (...)"."""
    if not isinstance(value, dict):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return ", ".join(f"{k} ({_plain(v)})" if isinstance(v, dict) else f"{k} {_plain(v)}" for k, v in value.items())
