"""The first hour with one's own videos, as it goes: a folder of odd films, ``train --videos``, ``probe``, ``show``.

    python benchmarks/fetch_films.py films                    # real ones; needs a network
    python benchmarks/own_videos.py --films films --json benchmarks/results/own_videos.json
    python benchmarks/own_videos.py --page docs/own_videos.md # the recorded transcript

Real films are taken from the folder that ``--films`` names, films of odd kinds are written (``films.py``), 24 in all
with three files that are no films. Every command is one that a user types; what it prints is kept line by line.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.films import KINDS, Lacking
from vjepa_fast.bench.results import describe
from vjepa_fast.files import write_json, write_text

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- transcript -->\n", "<!-- end of transcript -->"
VIDEOS = 24
ODD = (
    "h264 mp4, B-frames", "h264 mp4, open GOP", "h264 mp4, fragments", "h264 mkv, 10 bit 4:4:4", "h264 ts", "h264 flv",
    "hevc mp4, RASL", "vp8 webm, hidden frames", "vp9 webm, hidden frames", "mpeg4 avi, B-frames", "mpeg2 mpg",
    "mjpeg avi", "qtrle mov", "prores mov", "wmv2 wmv", "h263 3gp", "gif", "mpeg1 mpg", "flv1 flv", "mpeg2 ts",
    "h264 mp4, cut by an edit list"
)  # fmt: skip
COMMANDS = (
    "vjepa-fast train --videos videos --out runs/mine --minutes {minutes:g}",
    "vjepa-fast data manifest videos --val-fraction 0.25 --out clips.csv",
    "vjepa-fast data check clips.csv --frames 8 --write-clean train.csv",
    "vjepa-fast data check clips_val.csv --frames 8 --write-clean val.csv",
    "vjepa-fast probe runs/mine --train train.csv --test val.csv --probe knn --which target_encoder",
    "vjepa-fast show runs/mine --out mine.html",
)


def collect(folder: Path, films: Path | None) -> dict[str, int]:
    """Fill ``folder/films`` with real films and ``folder/odd`` with written ones and three that are none; how many."""
    (folder / "odd").mkdir(parents=True)
    real = sorted(path for path in films.iterdir() if path.is_file()) if films is not None else []
    real = real[: VIDEOS // 2]
    if real:
        (folder / "films").mkdir()
    for path in real:
        shutil.copy(path, folder / "films" / path.name)
    written: list[Path] = []
    for kind in ODD:
        if len(real) + len(written) + 3 == VIDEOS:
            break
        with tempfile.TemporaryDirectory() as scratch:
            try:
                made = KINDS[kind](Path(scratch))
            except Lacking:
                continue
            written.append(folder / "odd" / f"{re.sub(r'[^a-z0-9]+', '_', kind)}{made.suffix}")
            shutil.copy(made, written[-1])
    half = written[0].read_bytes()
    (folder / "odd" / "half.mp4").write_bytes(half[: len(half) // 2])
    (folder / "odd" / "notes.mp4").write_text("to do: film the cat\n" * 40)
    (folder / "odd" / "empty.mov").touch()
    return {"real": len(real), "written": len(written), "broken": 3}


def run(command: str, folder: Path, more: list[str]) -> dict[str, Any]:
    """One command in ``folder``: what it printed, both streams as they came, its exit code and seconds."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    print(f"$ {command}", flush=True)
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "vjepa_fast", *command.split()[1:], *more],
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.replace(f"{folder}/", "").rstrip())
        print(lines[-1], flush=True)
    code = process.wait()
    return {"command": command, "code": code, "seconds": round(time.perf_counter() - began, 1), "lines": lines}


def transcript(results: dict[str, Any], longest: int = 24) -> str:
    """What was typed and printed, as a block of a page; of long outputs the first and the last lines."""
    counts = results["videos"]
    machine = results["machine"]
    real = f"{counts['real']} real films, " if counts["real"] else ""
    head = (
        f"{real}{counts['written']} written ones of odd kinds and {counts['broken']} files that are no films, on "
        f"{machine['device']}, threads: {machine['threads']}, torch {machine['torch']}:\n\n```text\n"
    )
    out = []
    for entry in results["commands"]:
        lines = entry["lines"]
        if len(lines) > longest:
            skipped = len(lines) - longest
            lines = [*lines[: longest // 2], f"... {skipped} lines ...", *lines[-longest // 2 :]]
        out += [f"$ {entry['command']}", *lines, f"[{entry['seconds']:.0f} s]", ""]
    return head + "\n".join(out).rstrip() + "\n```\n"


def page(text: str, results: dict[str, Any]) -> str:
    """A page's text with the recorded transcript between its marks."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + transcript(results) + END + rest.split(END)[1]


def main() -> int:
    """Run all and record; the exit code is that of the first command that failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--films", type=Path, help="folder of real films, as fetch_films.py makes it")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training (default %(default)s)")
    parser.add_argument("--train", default="", help="more flags for the training, such as '--steps 3'")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "own_videos.json")
    parser.add_argument("--page", type=Path, help="write the recorded transcript into this page, and run nothing")
    args = parser.parse_args()
    if args.page:
        results = json.loads(args.results.read_text(encoding="utf-8"))
        write_text(args.page, page(args.page.read_text(encoding="utf-8"), results))
        return 0
    results = {"machine": describe(torch.device("cpu")), "minutes": args.minutes, "commands": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve() / "first"
        results["videos"] = collect(folder / "videos", args.films)
        for command in COMMANDS:
            more = args.train.split() if " train " in command else []
            results["commands"].append(run(command.format(minutes=args.minutes), folder, more))
            if results["commands"][-1]["code"] not in (0, 1):
                break
    if args.json:
        write_json(args.json, results)
    return max(entry["code"] for entry in results["commands"])


if __name__ == "__main__":
    raise SystemExit(main())
