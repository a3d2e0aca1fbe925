"""Figures in the README are those of the committed results."""

import csv
import json

from tests.docs.pages import ROOT

RESULTS = ROOT / "benchmarks" / "results"
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def result(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def verdicts(found):
    """How many pretrained rows stand above random init, below it, neither."""
    gaps = [r["difference"] for r in found["rows"] if r["kind"] == "pretrained" and r["difference"]]
    above, below = sum(g["low"] > 0 for g in gaps), sum(g["high"] < 0 for g in gaps)
    return above, below, len(gaps) - above - below


def test_the_demo():
    found, again = result("demo"), result("demo_again")
    above, below, neither = verdicts(found)
    counts = f"{above} stand above random init, {below or 'none'} below, {neither} neither"
    assert f"Of {above + below + neither} comparisons {counts}." in README
    above, below, neither = verdicts(again)
    (headline,) = [r for r in again["rows"] if (r["label"], r["probe"]) == ("fwm_hw_ld single", "5-shot")]
    counts = f"{above} stand above, {below} below, {neither} neither"
    assert f"{counts}, and the headline at {100 * headline['accuracy']:.1f} (" in README
    five = {r["label"]: r for r in found["rows"] if (r["suite"], r["probe"]) == ("fewshot", "5-shot")}
    single, mixed, random = (five[name] for name in ("fwm_hw_ld single", "fwm_hw_ld mixed", "random init"))
    gap = single["difference"]
    lead = f"({100 * gap['low']:+.1f} to {100 * gap['high']:+.1f})"
    assert f"at {100 * single['accuracy']:.1f} against {100 * random['accuracy']:.1f} of random init {lead}" in README
    assert f"on the mixture at {100 * mixed['accuracy']:.1f}, which cannot be told from it" in README
    assert mixed["difference"]["low"] < 0 < mixed["difference"]["high"]
    minutes, seconds = divmod(round(found["wall_seconds"]), 60)
    assert f"took {minutes} min {seconds} s and {found['peak_memory_gb']:.1f} GB" in README


def test_the_laptop_recipes():
    rows = [r for r in result("laptop_recipes")["rows"] if r["shot"] == 5 and r["seed"] is not None]

    def leads(recipe):
        out = []
        for seed in (0, 1, 2):
            own = {r["encoder"]: r["accuracy"] for r in rows if r["seed"] == seed}
            random = max(x for name, x in own.items() if name.startswith("random"))
            out.append(f"{100 * (own[recipe] - random):.1f}")
        return f"{out[0]}, {out[1]} and {out[2]}"

    text = " ".join(README.split())
    assert f"masked pixels stand {leads('laptop_pixels')} points above random init" in text
    assert f"V-JEPA with a moving average {leads('laptop_vjepa')}, and" in text
    assert f"is the encoder of those masked pixels, frozen, {leads('laptop_frozen')} (" in text


def test_steps_on_an_h100():
    found = result("h100/captured")
    clips = {r["batch"]: r["clips_per_s"] for r in found["rows"]}
    assert f"{clips[8]:.0f} and {clips[64]:.0f} clips/s against" in README
    least = min(r["min_ms"] for r in found["rows"] if r["batch"] == 8)
    assert f"takes {least:.0f} to " in README


def test_kills_and_mutations():
    found = json.loads((ROOT / "tests" / "faults" / "results.json").read_text(encoding="utf-8"))
    page = " ".join((ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").split())
    kills, mutations = found["kills"], found["mutations"]
    for part in (kills, mutations):
        assert f"`{part['command']}`" in page
    assert f"after {kills['kills']} kills" in page and f"none of {kills['runs']} runs differed" in page
    assert kills["runs_that_differ"] == 0
    for name, counts in kills["settings"].items():
        assert (
            f"| {name} | {counts['kills']} | {counts['kills_during_a_save']} | {counts['runs_that_differ']} |" in page
        )
    outcomes = mutations["outcomes"]
    text = f"Of {mutations['mutations']} mutated checkpoints {outcomes['refused']} were refused in one line each"
    other = len(mutations["strange"])
    last = f"and {other} gave something else: " if other else "and none gave anything else."
    assert f"{text}, {outcomes['read']} read, {last}" in page and outcomes.get("other", 0) == other


def test_saving():
    found = result("saving")
    page = " ".join((ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").split())
    assert f"`{found['command']}` wrote `benchmarks/results/saving.json`" in page
    share, every = found["of_a_step"], found["steps_between_saves_for_5_percent"]
    assert f"a checkpoint of {found['checkpoint_mb']:.0f} MB" in page
    took, stood = (found["times"][name]["processor_s"] for name in ("beside", "beside_stands"))
    assert f"{found['checkpoint_mb']} MB in {took:.2f} s, for {stood:.2f} s of it training stood still" in page
    for name, words in (("waiting", "waits for it"), ("beside_stands", "stands still"), ("beside", "all of the save")):
        seconds = found["times"][name]["processor_s"]
        assert f"| {words} | {seconds:.2f} | {100 * share[name]:.0f} % | {every[name]} |" in page


def test_fuzz():
    found = json.loads((ROOT / "tests" / "faults" / "fuzz.json").read_text(encoding="utf-8"))
    page = " ".join((ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").split())
    assert f"`{found['command']}` wrote `tests/faults/fuzz.json`" in page
    for kind, words in (("configs", "recipes"), ("manifests", "manifests"), ("caches", "caches")):
        counts = found[kind]
        assert f"of {sum(counts.values())} {words} {counts['read']} were read and {counts['refused']} refused" in page
        assert not any(counts[what] for what in ("traceback", "hang", "unclear", "changed"))


def study_rows():
    with open(ROOT / "benchmarks" / "results" / "study_synthetic" / "report.csv", encoding="utf-8", newline="") as f:
        return [row for row in csv.DictReader(f) if row["comparison"] == "mixed minus single"]


def test_the_study():
    rows = [r for r in study_rows() if r["compat"] == "intended"]
    of = {(r["variant"], r["suite"], r["probe"]): r for r in rows}
    for suite in ("fewshot", "fewmotion"):
        for shot in ("1-shot", "5-shot"):
            row = of["mean of V-JEPA variants", suite, shot]
            low, high, seen = (float(row[k]) for k in ("t_low", "t_high", "detectable_points"))
            text = f"{float(row['delta_points']):+.1f} ({low:+.1f} to {high:+.1f}; {seen:.1f}), {row['verdict']}"
            assert text in README
    assert of["mean of V-JEPA variants", "fewshot", "1-shot"]["note"] == "20 variants"
    pixels = of["pixels", "fewshot", "5-shot"]
    levels = (float(pixels["accuracy_subtracted"]), float(pixels["accuracy"]))
    assert (
        f"lose {-float(pixels['delta_points']):.1f} points by mixing (5-shot, {levels[0]:.1f} to {levels[1]:.1f})"
        in README
    )
    assert pixels["verdict"] == "below"


def test_levjepa_beside_the_baseline():
    """Leads over random weights, minutes and FLOP of the page are those of the study's cells."""
    cells = {p.stem: json.loads(p.read_text()) for p in (RESULTS / "study_synthetic" / "cells").glob("*-s[012].json")}

    def five(key):
        rows = cells[key]["rows"]
        return next(100 * r["accuracy"] for r in rows if (r["suite"], r["probe"]) == ("fewshot", "5-shot"))

    def lead(variant, regime):
        return (
            sum(five(f"{variant}-{regime}-intended-s{s}") - five(f"random_init-none-intended-s{s}") for s in range(3))
            / 3
        )

    own = {k: c["cost"] for k, c in cells.items() if k.startswith("levjepa-")}
    theirs = next(c["cost"]["flops"] for k, c in cells.items() if k == "baseline-single-intended-s0")
    minutes, fewer = [c["minutes"] for c in own.values()], 1 - own["levjepa-single-intended-s0"]["flops"] / theirs
    text = " ".join((ROOT / "docs" / "levjepa.md").read_text(encoding="utf-8").split())
    assert f"took {min(minutes):.1f} to {max(minutes):.1f} minutes and {100 * fewer:.0f} % fewer FLOP" in text
    below, mixed = -lead("levjepa", "single"), -lead("levjepa", "mixed")
    assert f"{below:.1f} (single) and {mixed:.1f} points (mixed) *below* random weights" in text
    assert f"{lead('baseline', 'single'):.1f} and {lead('baseline', 'mixed'):.1f} above" in text
