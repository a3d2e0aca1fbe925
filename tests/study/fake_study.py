"""Study folders with planted effects, for the tests and for looking at the report.

python -m tests.study.fake_study FOLDER [SEEDS [all]]     8 variants x 2 regimes, for a look at the report
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from vjepa_fast.evaluation.intervals import wilson
from vjepa_fast.study.records import RANDOM, Study, cell_key, expected_keys, load_study
from vjepa_fast.study.run.variants import COUNTED

VARIANTS = ("baseline", "motion_guided", "hw", "fwm", "ld", "fwm_hw", "fwm_hw_ld", "kinematic")
OUTCOMES = (
    ("motion8", "linear"),
    ("motion8", "knn"),
    ("order", "linear"),
    ("order", "knn"),
    ("objects", "linear"),
    ("objects", "knn"),
    ("fewshot", "1-shot"),
    ("fewshot", "5-shot"),
)
LEVEL = {"motion8": 0.45, "order": 0.35, "objects": 0.6, "fewshot": 0.5}


def effect_of(effects: dict, variant: str, regime: str, suite: str) -> float:
    """``effects`` has keys variant, (variant, suite), (variant, regime, suite) or regime; all that fit add up."""
    return sum(effects.get(k, 0.0) for k in (variant, regime, (variant, suite), (variant, regime, suite)))


def make_study(
    folder,
    *,
    variants=VARIANTS,
    regimes=("single", "mixed"),
    modes=("intended",),
    seeds=(0, 1, 2),
    outcomes=OUTCOMES,
    samples=240,
    effects=None,
    seed_spread=0.01,
    published=(),
    rng=0,
) -> Path:
    """Write a study: accuracy = level + effect + a normal draw per run (std ``seed_spread``), hits by clip difficulty.

    ``published`` variants also have cells of that mode, of the same effects.
    """
    folder, rng, effects = Path(folder), np.random.default_rng(rng), effects or {}
    plan = {
        "format": 1,
        "suite": "synthetic",
        "settings": {"suite": "synthetic"},
        "variants": list(variants),
        "regimes": list(regimes),
        "seeds": list(seeds),
        "modes": {m: list(variants) for m in modes},
        "sizes": {"motion8": {"train": 800, "test": samples}},
        "device": "cpu",
        "commit": "0123456789" * 4,
        "versions": {"torch": "2.11.0", "vjepa_fast": "0.1"},
    }
    keys = [*expected_keys(plan), *(cell_key(v, r, "published", s) for v in published for r in regimes for s in seeds)]
    plan["keys"] = list(dict.fromkeys(keys))
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(plan))
    difficulty = {o: rng.normal(0, 0.2, samples) for o in outcomes}
    runs = [(RANDOM, "none", "intended", s) for s in seeds]
    runs += [(v, r, c, s) for v in variants for r in regimes for c in modes for s in seeds]
    runs += [(v, r, "published", s) for v in published for r in regimes for s in seeds]
    for variant, regime, compat, seed in runs:
        rows = [
            row(
                o,
                variant,
                LEVEL.get(o[0], 0.5) + effect_of(effects, variant, regime, o[0]),
                difficulty[o],
                seed_spread,
                rng,
            )
            for o in outcomes
        ]
        cell = {
            "format": 1,
            "key": cell_key(variant, regime, compat, seed),
            "variant": variant,
            "regime": regime,
            "compat": compat,
            "seed": seed,
            "kind": "random" if variant == RANDOM else "pretrained",
            "encoder": "target_encoder",
            "rows": rows,
            "geometry": geometry(rng),
            "cost": cost(variant, regime, rng),
            "curve": curve(variant, rng),
            "config_hash": f"{abs(hash(variant)) % 10**8:08d}",
            "versions": plan["versions"],
            "student_rows": rows if compat == "published" and variant == "kinematic" else [],
            "settings": {"objectives": f"pred; {variant}", "learning rate": "0.001", "steps": "400"},
        }
        (folder / "cells" / f"{cell['key']}.json").write_text(json.dumps(cell))
    return folder


def row(outcome, label, level, difficulty, spread, rng) -> dict:
    """One row; for episodes hits are per-sample accuracies, and every tenth sample never was a query."""
    p = np.clip(level + rng.normal(0, spread) + difficulty, 0, 1)
    if outcome[1].endswith("-shot"):
        hits = [None if i % 10 == 0 else round(float(x), 4) for i, x in enumerate(rng.binomial(20, p) / 20)]
        accuracy = float(np.mean([h for h in hits if h is not None]))
        low, high, n = accuracy - 0.01, accuracy + 0.01, 1000
    else:
        hits = [int(x) for x in rng.random(len(p)) < p]
        accuracy, n = float(np.mean(hits)), len(p)
        low, high = wilson(sum(hits), n)
    return {
        "label": label,
        "kind": "pretrained",
        "suite": outcome[0],
        "probe": outcome[1],
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "n": n,
        "chance": 0.2,
        "chosen": {},
        "hits": hits,
        "difference": None,
    }


def geometry(rng) -> list[dict]:
    out = []
    for level in (0, 1, 2, 3, "all"):
        for subspace in ("all", "appearance", "dynamics") if level == "all" else ("all",):
            base = 20 + 8 * (3 if level == "all" else level)
            out.append(
                {
                    "encoder": "target_encoder",
                    "level": level,
                    "subspace": subspace,
                    "rankme": base + rng.normal(0, 3),
                    "lidar": base / 2 + rng.normal(0, 2),
                    "alpha_req": 1.2 + rng.normal(0, 0.1),
                    "feature_std": 0.8 + rng.normal(0, 0.04),
                    "mean_cosine": 0.3 + rng.normal(0, 0.03),
                }
            )
    return out


def cost(variant, regime, rng) -> dict:
    extra = 2.0 * (len(variant) % 5)
    step_ms = 90 + extra + rng.normal(0, 1)
    flops = 400 * (0.03 + 0.002 * extra) * 1e12
    return {"step_ms": step_ms, "peak_mb": 800 + 10 * extra, "steps": 400, "minutes": step_ms / 150, "flops": flops}


def curve(variant, rng) -> dict:
    step = np.arange(10, 410, 10)
    loss = (1 + 0.1 * len(variant)) * np.exp(-step / 150) + 0.3 + rng.normal(0, 0.02, len(step))
    return {"step": step.tolist(), "loss": [round(float(x), 4) for x in loss]}


EFFECTS = {
    ("ld", "motion8"): 0.10,
    ("fwm_hw_ld", "motion8"): 0.13,
    ("fwm_hw_ld", "order"): 0.07,
    ("fwm_hw_ld", "objects"): -0.10,
    ("fwm", "objects"): -0.06,
    ("kinematic", "order"): -0.08,
    ("hw", "objects"): 0.03,
    **{(v, "mixed", "fewshot"): 0.04 for v in VARIANTS},
    ("baseline", "mixed", "objects"): 0.05,
}


CONTROLS = {"supervised": 0.84, "half": 0.66, "random": 0.38, "pixels": 0.3, "shuffled": 0.37}


def add_instrument(folder, outcomes=OUTCOMES, failed=()) -> dict:
    """Write an instrument check beside a study: all suites pass but those ``failed``, where labels give no ceiling."""
    rows, suites = [], {}
    for suite, outcome in outcomes:
        bad = suite in failed
        for encoder, level in CONTROLS.items():
            value = 0.4 if bad and encoder in ("supervised", "half") else level
            numbers = {"accuracy": value, "low": value - 0.01, "high": value + 0.01, "chance": 0.2, "n": 1000}
            rows.append({"suite": suite, "encoder": encoder, "outcome": outcome, **numbers})
        reason = f"{outcome}: an encoder trained with labels reaches 40.0 %, under 80.0 %"
        suites[suite] = {"parameters": {}, "passed": not bad, "reasons": [reason] if bad else []}
    found = {"format": 1, "package": "0", "suites": suites, "rows": rows}
    (Path(folder) / "instrument.json").write_text(json.dumps(found))
    return found


def study_of(folder, **kwargs) -> Study:
    return load_study(make_study(folder, **kwargs))


if __name__ == "__main__":
    import sys

    seeds = tuple(range(int(sys.argv[2]) if len(sys.argv) > 2 else 3))
    variants = ("baseline", *COUNTED, "fwm_hw") if sys.argv[3:] == ["all"] else VARIANTS
    both = ("baseline", "fwm_hw_ld", "kinematic")
    made = make_study(sys.argv[1], variants=variants, seeds=seeds, effects=EFFECTS, published=both)
    add_instrument(made, failed=("order",))
    print(made)
