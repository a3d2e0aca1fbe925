"""The tables of a study's report as plain data; ``markdown``, ``latex`` and the HTML template lay them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vjepa_fast.study.records import BASELINE, RANDOM, Study, split_key
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
        where = {"control": (), "mode": (self.regime,), "regime": (self.compat,)}.get(
            self.kind, (self.regime, self.compat)
        )
        return ", ".join((KINDS[self.kind], *where))

    @property
    def families(self) -> list[int]:
        """Sizes of the families that the tests of this table are corrected in."""
        return sorted({c.family for _, cells in self.lines for c in cells if c is not None and c.variant != MEAN})


def delta_tables(comparisons: Sequence[Comparison], study: Study, kind: str) -> list[DeltaTable]:
    """The comparisons of one kind, a table per regime and mode; variants in the order of the plan, their mean last. The
    control has one table with a line per regime and mode.
    """
    out = []
    found = [c for c in comparisons if c.kind == kind]
    if kind == "control" and found:
        by = {(f"{c.regime}, {c.compat}", c.outcome): c for c in found}
        names = dict.fromkeys(name for name, _ in by)
        return [
            DeltaTable(
                kind, "all", "all", study.outcomes, [(n, [by.get((n, o)) for o in study.outcomes]) for n in names]
            )
        ]
    for regime, compat in dict.fromkeys((c.regime, c.compat) for c in found):
        here = {(c.variant, c.outcome): c for c in found if (c.regime, c.compat) == (regime, compat)}
        order = [name for v in study.variants for name in (v, v + STUDENT)] + [MEAN]
        variants = [v for v in order if any(k[0] == v for k in here)]
        lines = [(v, [here.get((v, o)) for o in study.outcomes]) for v in variants]
        out.append(DeltaTable(kind, regime, compat, study.outcomes, lines))
    return out


def accuracy_lines(study: Study, regime: str, compat: str) -> list[tuple[str, int, list[tuple | None]]]:
    """(variant, seeds, [(mean, std over seeds or None) per outcome]) of a regime, random init first."""
    out = []
    for variant in (RANDOM, *study.variants):
        cells = list(study.runs(variant, regime, compat).values())
        if not cells:
            continue
        values = [[c.rows[o].accuracy for c in cells if o in c.rows] for o in study.outcomes]
        line = [(float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else None) if v else None for v in values]
        out.append((variant, len(cells), line))
    return out


def chances(study: Study) -> dict[tuple[str, str], float]:
    """What guessing gives, per outcome (``load_study`` holds all cells to one value)."""
    rows = [cell.rows for cell in study.cells.values()]
    return {o: next(r[o].chance for r in rows if o in r) for o in study.outcomes}


def comparison_rows(comparisons: Sequence[Comparison]) -> list[dict]:
    """Flat dicts for CSV, differences in percentage points."""

    def pp(x):
        return None if x is None else round(100 * x, 4)

    return [
        {
            "comparison": KINDS[c.kind], "variant": c.variant, "regime": c.regime, "compat": c.compat, "suite": c.suite,
            "probe": c.probe, "minus": c.against, "seeds": len(c.seeds), "accuracy": pp(c.levels[0]),
            "accuracy_subtracted": pp(c.levels[1]), "delta_points": pp(c.value),
            "t_low": pp(c.low), "t_high": pp(c.high),
            "bootstrap_low": pp(c.boot_low), "bootstrap_high": pp(c.boot_high),
            "p": None if c.p is None else float(f"{c.p:.4g}"),
            "p_holm": None if c.p_holm is None else float(f"{c.p_holm:.4g}"), "family": c.family, "verdict": c.verdict,
            "note": c.note, "deltas_by_seed": " ".join(f"{s}:{100 * d:.4f}" for s, d in zip(c.seeds, c.deltas)),
        }
        for c in comparisons
    ]  # fmt: skip


def tradeoff_axes(outcomes: Sequence[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The (temporal, appearance) outcomes among those of a study, by linear probe where there is one."""
    probes = [p for _, p in outcomes]
    probe = "linear" if "linear" in probes else next((p for p in probes if not p.endswith("-shot")), None)
    temporal, appearance = (
        [o for o in outcomes if o[0] in group and o[1] == probe] for group in (TEMPORAL, APPEARANCE)
    )
    return temporal, appearance


def cost_table(study: Study) -> list[dict]:
    """Cost per variant and regime: means over seeds of ms and MB per step, and both minus the baseline's; None where
    not measured. {"variant", "regime", "step_ms", "peak_mb", "minutes", "ms_more", "mb_more", "values": ms per seed}.
    """
    out = []
    for regime in study.regimes:
        base = None
        for variant in study.variants:
            cells = study.runs(variant, regime, study.compat).values()
            values = {
                k: [c.cost[k] for c in cells if c.cost.get(k) is not None] for k in ("step_ms", "peak_mb", "minutes")
            }
            mean = {k: float(np.mean(v)) if v else None for k, v in values.items()}
            if not cells:
                continue
            base = mean if variant == BASELINE else base
            more = {
                name: None if base is None else _minus(mean[k], base[k])
                for name, k in (("ms_more", "step_ms"), ("mb_more", "peak_mb"))
            }
            out.append({"variant": variant, "regime": regime, **mean, **more, "values": values})
    return out


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


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
                values = {k: [g[k] for g in rows if g.get(k) is not None] for k in GEOMETRY_COLUMNS}
                mean = {k: float(np.mean(v)) if v else None for k, v in values.items()}
                out.append({"variant": variant, "regime": regime, "level": level, "subspace": subspace, **mean})
    return out


def geometry_lines(table: Sequence[dict]) -> list[tuple[str, str, list[tuple[str, ...]]]]:
    """(variant, regime, [text of (whole, appearance half, dynamics half) per figure]), all levels together."""
    found = {(r["variant"], r["regime"], r["subspace"]): r for r in table if r["level"] == "all"}

    def text(variant, regime, subspace, key, digits) -> str:
        value = found.get((variant, regime, subspace), {}).get(key)
        return "n/a" if value is None else f"{value:.{digits}f}"

    return [
        (v, r, [tuple(text(v, r, s, key, digits) for s in ("all", "appearance", "dynamics"))
                for key, (_, digits) in GEOMETRY_COLUMNS.items()])
        for v, r in dict.fromkeys(k[:2] for k in found)
    ]  # fmt: skip


def settings_table(study: Study) -> tuple[dict, list[str], list[tuple[str, dict]]]:
    """(settings that all runs share, names of those that differ, [("variant, regime, mode", settings)]), one seed."""
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
    return shared, differ, lines


def coverage(study: Study) -> tuple[list[tuple[str, str]], list[tuple[str, list[str]]]]:
    """What ran: columns (regime, mode), and per variant "evaluated of planned" in each, empty where none was."""
    split = {k: split_key(k) for k in study.expected}
    columns = list(dict.fromkeys((r, c) for _, r, c, _ in split.values()))
    lines = []
    for variant in [RANDOM, BASELINE, *study.planned()]:
        texts = []
        for column in columns:
            keys = [k for k, (v, r, c, _) in split.items() if v == variant and (r, c) == column]
            texts.append(f"{sum(k in study.cells for k in keys)} of {len(keys)}" if keys else "")
        if any(texts) and variant not in [name for name, _ in lines]:
            lines.append((variant, texts))
    return columns, lines


def environment_of(study: Study) -> dict[str, str]:
    """Versions, commit, device and sizes of the plan as text; versions that differ between cells are named."""
    plan = study.plan
    out = {k: str(plan[k]) for k in ("suite", "device", "commit") if plan.get(k)}
    for key in ("sizes", "evaluation", "versions"):
        if plan.get(key):
            out[key] = _plain(plan[key])
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
