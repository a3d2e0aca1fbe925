"""The claims from a study's cells: differences by seed, directions, what was not measured, unusable folders."""

import json

import pytest

from vjepa_fast import cli
from vjepa_fast.errors import DataError
from vjepa_fast.study.claims.evaluate import load_claims
from vjepa_fast.study.claims.measured import STAND_INS, recompute
from vjepa_fast.study.claims.published import load_published

PUBLISHED = load_published()
CLAIMS = {c.id: c for c in load_claims()}
SYNTHETIC = ("motion8", "order", "objects")

ZERO = "below zero (a stand-in has no points to compare) on average"


def write_study(folder, runs: dict):
    """``runs[variant, regime, compat]`` is a list over seeds of {suite: accuracy in percent}."""
    keys = []
    (folder / "cells").mkdir(parents=True)
    for (variant, regime, compat), seeds in runs.items():
        for seed, accuracies in enumerate(seeds):
            key = f"{variant}-{regime}-{compat}-s{seed}"
            keys.append(key)
            rows = [
                {
                    "label": variant,
                    "kind": "pretrained",
                    "suite": suite,
                    "probe": "linear",
                    "accuracy": value / 100,
                    "low": value / 100,
                    "high": value / 100,
                    "n": 480,
                    "chance": 0.125,
                    "hits": [],
                }
                for suite, value in accuracies.items()
            ]
            cell = {
                "format": 1,
                "key": key,
                "variant": variant,
                "regime": regime,
                "compat": compat,
                "seed": seed,
                "kind": "pretrained",
                "encoder": "target_encoder",
                "rows": rows,
            }
            (folder / "cells" / f"{key}.json").write_text(json.dumps(cell))
    plan = {
        "suite": "synthetic",
        "variants": sorted({v for v, _, _ in runs}),
        "regimes": ["single", "mixed"],
        "seeds": [0, 1, 2],
        "keys": keys,
    }
    (folder / "study.json").write_text(json.dumps(plan))
    return folder


def over_seeds(*deltas, base=50.0, suites=SYNTHETIC):
    """Accuracies of a run whose difference from the baseline is ``deltas`` by seed, on every suite."""
    return [dict.fromkeys(suites, base + seed + d) for seed, d in enumerate(deltas)]


BASE = over_seeds(0, 0, 0)


def status(folder, claim: int) -> str:
    (found,) = recompute(folder, [CLAIMS[claim]], PUBLISHED)[claim]
    return found["status"]


def test_differences_are_paired_by_seed_and_the_arithmetic_is_shown(tmp_path):
    folder = write_study(
        tmp_path / "s",
        {("baseline", "mixed", "intended"): BASE, ("fwm_hw_ld", "mixed", "intended"): over_seeds(5, 6, 7)},
    )
    (found,) = recompute(folder, [CLAIMS[6]], PUBLISHED)[6]
    half = 4.302652729911275 / 3**0.5  # differences 5, 6, 7: mean 6, sd 1, t of 2 degrees of freedom
    (x,) = found["computed"]
    assert (found["compat"], found["status"], x["suite"], x["stand_in"]) == ("intended", "confirmed", "objects", True)
    assert (x["delta"], x["low"], x["high"]) == (6.0, round(6 - half, 4), round(6 + half, 4))
    assert x["seeds"] == [0, 1, 2]
    assert found["arithmetic"].startswith("fwm_hw_ld on objects: seed 0: 55.00 - 50.00 = +5.00; seed 1: 57.00 - 51.00")
    assert found["arithmetic"].endswith("mean +6.00 (+3.52 to +8.48)")


@pytest.mark.parametrize(
    ("deltas", "expected"),
    [
        ((5, 6, 7), "confirmed"),
        ((-5, -6, -7), "contradicted"),
        ((-5, 6, 7), "open"),
        ((5,), "open"),
        ((5, 5, 5), "open"),  # no spread, no interval
    ],
)
@pytest.mark.parametrize("claim", [6, 8])  # one claims up, the other down
def test_direction_and_interval_decide(tmp_path, claim, deltas, expected):
    sign = 1 if claim == 6 else -1
    folder = write_study(
        tmp_path / "s",
        {
            ("baseline", "mixed", "intended"): BASE,
            ("fwm_hw_ld", "mixed", "intended"): over_seeds(*(sign * d for d in deltas)),
        },
    )
    assert status(folder, claim) == expected


@pytest.mark.parametrize(("dataset", "claim"), [("imagenet100", 6), ("ssv2", 7), ("diving48", 8)])
def test_each_data_set_has_its_stand_in_and_is_preferred_to_it(tmp_path, dataset, claim):
    stand_in = STAND_INS[dataset][0]
    right = -1 if claim == 8 else 1
    runs = {(v, "mixed", "intended"): over_seeds(0, 0, 0) for v in ("baseline", "fwm_hw_ld")}
    for seed, cell in enumerate(runs["fwm_hw_ld", "mixed", "intended"]):
        cell |= {s: 50 + 2 * seed - 9 * right for s in SYNTHETIC if s != stand_in}
        cell[stand_in] = 50 + seed + right * (5 + seed)
    folder = write_study(tmp_path / "s", runs)
    assert status(folder, claim) == "confirmed"
    for accuracies, d in ((runs["baseline", "mixed", "intended"], 0), (runs["fwm_hw_ld", "mixed", "intended"], -right)):
        for seed, cell in enumerate(accuracies):
            cell[dataset] = 20 + seed + d * (5 + seed)
    folder = write_study(tmp_path / "paper", runs)
    assert status(folder, claim) == "contradicted"
    (found,) = recompute(folder, [CLAIMS[claim]], PUBLISHED)[claim]
    assert found["computed"][0]["suite"] == dataset and not found["computed"][0]["stand_in"]


def test_what_was_not_measured_is_said(tmp_path):
    folder = write_study(
        tmp_path / "s",
        {
            ("baseline", "mixed", "intended"): BASE,
            ("ld", "mixed", "intended"): over_seeds(5, 6, 7),
            ("fwm", "single", "intended"): over_seeds(5, 6, 7),
        },
    )
    found = {i: r[0] for i, r in recompute(folder, list(CLAIMS.values()), PUBLISHED).items()}
    assert {i for i, r in found.items() if r["status"] != "not measured"} == {9, 10, 12}
    lacking = "no cells of fwm_hw_ld on objects with the baseline's of the same seed (regime mixed, intended)"
    assert found[6]["arithmetic"] == lacking
    assert "size that its user chose" in found[16]["arithmetic"] and "names nothing" in found[17]["arithmetic"]
    assert found[9]["status"] == "confirmed" and found[12]["status"] == "contradicted"  # objects up, claimed down
    only = write_study(
        tmp_path / "o",
        {
            ("baseline", "mixed", "intended"): over_seeds(0, 0, 0, suites=("order",)),
            ("ld", "mixed", "intended"): over_seeds(5, 6, 7, suites=("order",)),
        },
    )
    assert status(only, 12) == "not measured" and status(only, 9) == "confirmed"


def test_regimes_modes_and_stars(tmp_path):
    runs = {
        ("baseline", "single", "intended"): BASE,
        ("baseline", "mixed", "intended"): BASE,
        ("kinematic", "single", "intended"): over_seeds(-5, -6, -7),
        ("kinematic_0_1", "single", "intended"): over_seeds(-2, -3, -4),
        ("kinematic", "mixed", "intended"): over_seeds(5, 6, 7),
        ("kinematic", "single", "published"): over_seeds(5, 6, 7),
    }
    folder = write_study(tmp_path / "s", runs)
    intended, published = recompute(folder, [CLAIMS[4]], PUBLISHED)[4]
    assert (intended["compat"], intended["status"]) == ("intended", "confirmed") and len(intended["computed"]) == 2
    assert (published["compat"], published["status"]) == ("published", "contradicted")
    assert "kinematic on motion8, against the intended baseline: " in published["arithmetic"]
    runs["kinematic_0_1", "single", "intended"] = over_seeds(2, 3, 4)
    assert recompute(write_study(tmp_path / "t", runs), [CLAIMS[4]], PUBLISHED)[4][0]["status"] == "contradicted"


@pytest.mark.parametrize(
    ("losing", "methods", "expected"), [(8, 15, "confirmed"), (7, 15, "contradicted"), (13, 13, "open")]
)
def test_a_count_is_about_most_methods(tmp_path, losing, methods, expected):
    runs = {("baseline", "mixed", "intended"): BASE}
    for i, method in enumerate(PUBLISHED.methods("mixed")[:methods]):
        runs[method, "mixed", "intended"] = over_seeds(*((-19, -20, -21) if i < losing else (0.9, 1, 1.1)))
    runs["fwm_hw", "mixed", "intended"] = over_seeds(-19, -20, -21)  # a control, no method of the paper
    folder = write_study(tmp_path / "s", runs)
    (found,) = recompute(folder, [CLAIMS[10]], PUBLISHED)[10]
    assert found["status"] == expected
    assert found["arithmetic"].startswith(f"{losing} of {methods} methods {ZERO}, {losing}")


def test_a_count_needs_whole_intervals(tmp_path):
    runs = {("baseline", "mixed", "intended"): BASE}
    runs |= {(m, "mixed", "intended"): over_seeds(-1, -20, -39) for m in PUBLISHED.methods("mixed")}
    (found,) = recompute(write_study(tmp_path / "s", runs), [CLAIMS[10]], PUBLISHED)[10]
    assert found["status"] == "open" and f"15 of 15 methods {ZERO}, 0 with" in found["arithmetic"]


def test_command_writes_the_study_too(tmp_path, capsys):
    folder = write_study(
        tmp_path / "s",
        {("baseline", "mixed", "intended"): BASE, ("fwm_hw_ld", "mixed", "intended"): over_seeds(5, 6, 7)},
    )
    assert cli.main(["study", "claims", "--study", str(folder), "--json", str(tmp_path / "c.json")]) == 0
    out = capsys.readouterr().out
    assert "from your own study" in out and "SSv2: order (temporal)" in out
    content = json.loads((tmp_path / "c.json").read_text())
    assert content["study"]["folder"] == str(folder)
    assert {c["id"]: c["study"][0]["status"] for c in content["claims"]}[7] == "confirmed"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "study.json").unlink(), "study.json: not found"),
        (lambda f: [p.unlink() for p in (f / "cells").iterdir()], "no cell is evaluated yet"),
        (
            lambda f: (f / "cells/ld-mixed-intended-s0.json").write_text("{"),
            "ld-mixed-intended-s0.json: cannot be read",
        ),
        (lambda f: edit(f, lambda c: c.pop("rows")), "missing: rows"),
        (lambda f: edit(f, lambda c: c["rows"][0].update(accuracy=float("nan"))), "accuracy is not a finite number"),
        (lambda f: edit(f, lambda c: c["rows"][0].update(accuracy=55.0)), "55.0 is not an accuracy in .0, 1."),
        (lambda f: edit(f, lambda c: c["rows"].append(c["rows"][0])), "two rows of motion8, linear"),
    ],
)
def test_folders_that_cannot_serve(tmp_path, damage, message, capsys):
    folder = write_study(
        tmp_path / "s", {("baseline", "mixed", "intended"): BASE, ("ld", "mixed", "intended"): over_seeds(5, 6, 7)}
    )
    damage(folder)
    with pytest.raises(DataError, match=message):
        recompute(folder, list(CLAIMS.values()), PUBLISHED)
    assert cli.main(["study", "claims", "--study", str(folder), "--json", str(tmp_path / "c.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "c.json").exists()


def edit(folder, change) -> None:
    path = folder / "cells" / "ld-mixed-intended-s0.json"
    cell = json.loads(path.read_text())
    change(cell)
    path.write_text(json.dumps(cell))
