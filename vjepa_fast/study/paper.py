"""The table of the paper from a study of the suite ``paper``: accuracies beside the published ones, as Markdown."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from vjepa_fast.files import write_text
from vjepa_fast.study.claims.published import BASELINES, Published, load_published
from vjepa_fast.study.pages import plain_markdown
from vjepa_fast.study.records import BASELINE, RANDOM, Cell, Study, is_fewshot, load_study
from vjepa_fast.study.run.paper import PLACES

FILE = "paper.md"
REGIMES = {"single": "ucf101", "mixed": "mixed"}  # as the published runs name them
DATASETS = {"motion8": "synth"}  # likewise, where the name differs
# 5-way accuracies in % at 1 and 5 shots, as their papers report them: video alone, no text. None is a frozen V-JEPA.
ELSEWHERE = (
    ("OTAM", "arXiv:1906.11415", "Kinetics-100 (CMN)", "73.0", "85.8"),
    ("TRX", "arXiv:2101.06184", "Kinetics-100 (CMN)", "63.6", "85.9"),
    ("HyRSM", "arXiv:2204.13423", "Kinetics-100 (HyRSM)", "73.7", "86.1"),
    ("TRX", "arXiv:2101.06184", "SSv2-Full", "42.0", "64.6"),
    ("MoLo", "arXiv:2304.00946", "SSv2-Full", "56.6", "70.6"),
    ("Classifier-Baseline", "arXiv:2003.04390", "mini-ImageNet (images)", "58.91", "77.76"),
    ("Meta-Baseline", "arXiv:2003.04390", "mini-ImageNet (images)", "63.17", "79.26"),
)


def write_paper_table(folder: str | os.PathLike, partial: bool = False) -> Path:
    """Write ``paper.md`` into a study's folder; its path. DataError as `load_study`."""
    path = Path(folder) / FILE
    write_text(path, "\n".join(paper_table(load_study(folder, partial), load_published())) + "\n")
    return path


def paper_table(study: Study, published: Published) -> list[str]:
    """The lines of the page: frozen evaluation by both protocols, few-shot recognition, and what others report."""
    rows = _runs(study)
    suites = [name for name in PLACES if any(o[0] == name for o in study.outcomes)]
    probes = [name for name in suites if PLACES[name].task]
    out = [
        "# The table of the paper",
        "",
        "Accuracies in %, mean over seeds (number of seeds in brackets) of encoders that were trained and measured "
        f"here; published figures from the {published.source.partition(';')[0]}. Intervals and differences: report.md.",
    ]
    if probes:
        head = ["run"]
        for name in probes:
            head += [f"{PLACES[name].title}: published probe", "published figure", "our linear probe"]
        out += ["", "## Frozen evaluation", "", *_grid(head, [_frozen(r, probes, published) for r in rows])]
    few = [o for o in study.outcomes if is_fewshot(o)]
    if few:
        head = ["run", *(f"{PLACES[s].title if s in PLACES else s}: {_few_text(probe)}" for s, probe in few)]
        cells = [[name, *(_mean(found, o) for o in few)] for name, _, found in rows]
        out += ["", "## Few-shot recognition", "", *_grid(head, cells)]
    out += ["", "## For scale", "", "Few-shot accuracies that others report, trained on the base classes:", ""]
    out += _grid(["method", "source", "data", "1-shot", "5-shot"], [list(row) for row in ELSEWHERE])
    return out


def _runs(study: Study) -> list[tuple[str, str | None, list[Cell]]]:
    """(name, published run, cells by seed) of every line: random init first."""
    out: list[tuple[str, str | None, list[Cell]]] = []
    if control := study.runs(RANDOM, "none", "intended"):
        out.append(("random init", None, list(control.values())))
    for compat in study.compats:
        for regime in study.regimes:
            for variant in study.variants:
                if found := study.runs(variant, regime, compat):
                    prefix = REGIMES.get(regime, regime)
                    run = BASELINES.get(prefix) if variant == BASELINE else f"{prefix}_4gpu_{variant}"
                    out.append((f"{variant}, {regime}, {compat}", run, list(found.values())))
    return out


def _frozen(row: tuple[str, str | None, list[Cell]], probes: Sequence[str], published: Published) -> list[str]:
    name, run, found = row
    out = [name]
    for suite in probes:
        dataset = DATASETS.get(suite, suite)
        figure = f"{published.top1(run, dataset):.2f}" if run and published.has(run, dataset) else "-"
        out += [_mean(found, (suite, "published")), figure, _mean(found, (suite, "linear"))]
    return out


def _few_text(probe: str) -> str:
    """``frozen 1-shot`` of "1-shot", ``sun 5-shot`` of "sun meta 5-shot"."""
    words = probe.split()
    return f"{words[0]} {words[-1]}" if len(words) > 1 else f"frozen {probe}"


def _mean(cells: Sequence[Cell], outcome: tuple[str, str]) -> str:
    found = [100 * cell.rows[outcome].accuracy for cell in cells if outcome in cell.rows]
    return f"{statistics.mean(found):.2f} ({len(found)})" if found else "-"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [[plain_markdown(cell) for cell in line] for line in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return [f"| {' | '.join(line)} |" for line in lines]
