"""Write the tables of docs/study.md from the cells of the committed study.

    vjepa-fast study run runs/study ...            # the command is on the page
    cp -r runs/study/study.json runs/study/cells benchmarks/results/study_synthetic/
    vjepa-fast study report benchmarks/results/study_synthetic
    python benchmarks/study_page.py                # the page and its plots

Every table is a section of the report's Markdown, so the page says what `vjepa-fast study report` says; of tables of
differences the page has the columns of novel classes only, the report all.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from vjepa_fast.study.records import is_fewshot, load_study
from vjepa_fast.study.report.write import content, markdown, pictures

ROOT = Path(__file__).resolve().parent.parent
# block of the page -> how the headings of its sections begin
BLOCKS = {
    "instrument": ("Instrument check",),
    "words": ("In words",),
    "compute": ("At equal compute",),
    "accuracy": ("Accuracy, single, intended", "Accuracy, mixed, intended"),
    "regime": ("Mixed minus single, intended",),
    "baseline": ("Variant minus baseline, single, intended", "Variant minus baseline, mixed, intended"),
    "mode": ("Published minus intended, single", "Published minus intended, mixed"),
    "control": ("fwm_hw_ld minus fwm_hw",),
}

FEW_ONLY = ("regime", "baseline", "mode", "control")  # blocks that keep the columns of few-shot suites only
OWN_HEADING = ("instrument", "words", "compute")  # the page has headings of its own for these
PICTURES = {
    "question_svg": "study_answer.svg",
    "forest_svg": "study_objectives.svg",
    "tradeoff_svg": "study_tradeoff.svg",
    "compute_svg": "study_compute.svg",
}


def sections(text: str) -> dict[str, str]:
    """The sections of a Markdown text by heading; what comes before the first is under ""."""
    parts = re.split(r"^## (.*)$", text, flags=re.M)
    return {"": parts[0], **{h: body.strip() for h, body in zip(parts[1::2], parts[2::2])}}


def few_columns(text: str, suites: set[str]) -> str:
    """``text``, of its Markdown tables only the first column and those whose heading begins with one of ``suites``."""
    lines, kept = [], None
    for line in text.splitlines():
        cells = [part.strip() for part in line.strip("|").split("|")] if line.startswith("|") else []
        if cells and kept is None:
            kept = [i for i, name in enumerate(cells) if i == 0 or name.split(" ")[0] in suites]
        kept = kept if cells else None
        lines.append("| " + " | ".join(cells[i] for i in kept) + " |" if kept else line)
    return "\n".join(lines)


def blocks(study) -> dict[str, str]:
    """Text of every block of the page."""
    found = sections(markdown(content(study)))
    out = {"answer": found.pop("").split("\n\n", 2)[2].strip()}  # behind title and question
    for block, headings in BLOCKS.items():
        missing = [h for h in headings if h not in found]
        if missing:
            raise SystemExit(f"the report has no section {missing[0]!r}; it has {', '.join(found)}")
        named = block not in OWN_HEADING
        out[block] = "\n\n".join(f"**{h}**\n\n{found[h]}" if named else found[h] for h in headings)
    few = {suite for suite, probe in study.outcomes if is_fewshot((suite, probe))}
    return {name: few_columns(text, few) if name in FEW_ONLY else text for name, text in out.items()}


def put(text: str, name: str, block: str) -> str:
    """``text`` with ``block`` between ``<!-- name -->`` and ``<!-- end name -->``."""
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"expected {begin} and {end} once each in the page")
    return f"{text.split(begin)[0]}{begin}\n{block}\n{end}{text.split(end)[1]}"


def page(text: str, study) -> str:
    """The page ``text`` with the study's blocks."""
    for name, block in blocks(study).items():
        text = put(text, name, block)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--study", type=Path, default=ROOT / "benchmarks" / "results" / "study_synthetic")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "study.md")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images")
    args = parser.parse_args()
    for name, svg in pictures(content(load_study(args.study))).items():
        if name in PICTURES and svg:
            (args.images / PICTURES[name]).write_text(svg, encoding="utf-8")
    args.page.write_text(page(args.page.read_text(encoding="utf-8"), load_study(args.study)), encoding="utf-8")
    print(f"wrote {args.page}")


if __name__ == "__main__":
    main()
