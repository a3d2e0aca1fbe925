"""Whether every start of every kind of film gives the frames that a decode from the beginning shows.

    python benchmarks/frame_starts.py                                                   # prints
    python benchmarks/frame_starts.py --json benchmarks/results/frame_starts.json       # and records anew
    python benchmarks/frame_starts.py --page docs/data.md                               # the recorded ones as a table

Of each film in ``films.py``, and of real ones in a folder given with ``--films``, two frames are read from every start,
and must be equal to the last bit.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import av.logging
import numpy as np

from benchmarks.films import KINDS, Lacking, plain_decode
from vjepa_fast.data import probe_video, read_clip
from vjepa_fast.errors import DataError
from vjepa_fast.files import write_json, write_text

RESULTS = Path(__file__).parent / "results" / "frame_starts.json"
BEGIN, END = "<!-- frame starts -->\n", "<!-- end of frame starts -->"


def wrong_starts(path: Path, every: int = 1) -> tuple[int, list[tuple[int, str]]]:
    """Frames that a film shows, and (start, what is wrong) of each start that does not give its frames."""
    shown, wrong = plain_decode(path), []
    for start in range(0, len(shown) - 1, every):
        try:
            clip = read_clip(path, 2, 1, start=start)
            if not np.array_equal(clip, np.stack(shown[start : start + 2])):
                wrong.append((start, f"other pictures, {clip.shape}"))
        except DataError as error:
            wrong.append((start, str(error)))
    if (counted := probe_video(path)["frames"]) != len(shown):
        wrong.append((-1, f"{counted} frames counted"))
    return len(shown), wrong


def main() -> int:
    """Measure and print; the exit code is 1 if a start is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--films", type=Path, help="folder of real films to look at too")
    parser.add_argument("--only", default="", metavar="TEXT", help="of the kinds those whose name holds this text")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--page", type=Path, help="write the recorded rows into this page, and measure nothing")
    args = parser.parse_args()
    if args.page:
        write_text(args.page, page(args.page.read_text(encoding="utf-8")))
        return 0
    av.logging.set_level(None)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, kind in enumerate(kind for kind in KINDS if args.only in kind):
            home = Path(folder, str(number))
            home.mkdir()
            try:
                rows.append(row(kind, KINDS[kind](home)))
            except Lacking as reason:
                print(f"{kind}: left out, {reason}")
    rows += [row(path.name, path, real=True) for path in sorted(args.films.iterdir() if args.films else ())]
    if args.json:
        libraries = {name: ".".join(map(str, version)) for name, version in av.library_versions.items()}
        write_json(args.json, {"av": av.__version__, "libraries": libraries, "rows": rows})
    return int(any(r["right"] != r["starts"] for r in rows))


def row(kind: str, path: Path, real: bool = False) -> dict[str, Any]:
    """One film's result, printed too."""
    frames, wrong = wrong_starts(path)
    starts = max(0, frames - 1)
    print(f"{kind:45s} {frames:4d} frames, {starts - len(wrong)} of {starts} starts right", *wrong[:1])
    return {"kind": kind, "frames": frames, "starts": starts, "right": starts - len(wrong), "real": real}


def page(text: str) -> str:
    """The text with the recorded rows between its marks."""
    before, rest = text.split(BEGIN)
    record = json.loads(RESULTS.read_text())
    lines = ["| film | frames | starts right |", "|---|---|---|"]
    for real in (False, True):
        lines += ["| | | |"] * real
        rows = [r for r in record["rows"] if r["real"] == real]
        lines += [f"| {r['kind']} | {r['frames']} | {r['right']} of {r['starts']} |" for r in rows]
    return before + BEGIN + "\n".join(lines) + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    raise SystemExit(main())
