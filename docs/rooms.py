"""Draw the rooms of the package and the imports between them: ``python docs/rooms.py [--root CHECKOUT] [--svg FILE]``.

Rooms are the folders of ``vjepa_fast/`` (with ``kernels/``); an arrow is an import anywhere in a file, type checking
included. Floors follow from the arrows: a room stands one floor above the highest of what it imports. Prints the same
as text, and exits with 1 where imports run in a circle.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from pathlib import Path

SMALL = ("_moved", "errors", "files", "imagenet", "registry")  # modules beside the rooms; every room may know them


def imported(tree: ast.AST, module: list[str], is_package: bool) -> list[str]:
    """Dotted names below the package that a file imports, absolute or relative."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                here = ["vjepa_fast", *module] if is_package else ["vjepa_fast", *module][:-1]
                base = here[: len(here) - node.level + 1] + base
            found += [".".join([*base, a.name]) for a in node.names]
    return [name.removeprefix("vjepa_fast.") for name in found if name.startswith("vjepa_fast.")]


def arrows(root: Path) -> tuple[dict[str, int], Counter]:
    """(room -> lines, (importer, imported) -> imports)."""
    lines: Counter = Counter()
    counts: Counter = Counter()
    files = [(p, p.relative_to(root / "vjepa_fast")) for p in (root / "vjepa_fast").rglob("*.py")]
    files += [(p, p.relative_to(root)) for p in (root / "kernels").rglob("*.py")]
    for path, relative in files:
        parts = [*relative.with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        module = parts[:-1] if is_package else parts
        room = module[0] if module else ""
        text = path.read_text(encoding="utf-8")
        if room in ("", "__main__") or room in SMALL:
            continue
        lines[room] += text.count("\n")
        for name in imported(ast.parse(text), module, is_package):
            counts[room, name.split(".")[0]] += 1
    kept = {(a, b): n for (a, b), n in counts.items() if a != b and b in lines}
    return dict(lines), Counter(kept)


def floors(rooms: set[str], edges: set[tuple[str, str]]) -> tuple[dict[str, int], set[str]]:
    """(room -> floor from 0, rooms in or above a circle, which have none)."""
    floor: dict[str, int] = {}
    left = set(rooms)
    while left:
        ready = {r for r in left if all(b in floor for a, b in edges if a == r)}
        if not ready:
            return floor, left
        for r in ready:
            floor[r] = 1 + max((floor[b] for a, b in edges if a == r), default=-1)
        left -= ready
    return floor, set()


def draw(lines: dict[str, int], edges: Counter, floor: dict[str, int], path: Path) -> None:
    """A picture with a row per floor; thicker arrows are more imports."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "rooms"  # the same picture, the same bytes
    levels: dict[int, list[str]] = {}
    for room in sorted(lines):
        levels.setdefault(floor[room], []).append(room)
    place = {r: ((i + 0.5) / len(rs), f) for f, rs in levels.items() for i, r in enumerate(rs)}
    figure, axes = plt.subplots(figsize=(10, 1.15 * len(levels)))
    for (a, b), n in edges.items():
        (xa, ya), (xb, yb) = place[a], place[b]
        style = dict(arrowstyle="-|>", color="#5b6b7a", lw=0.4 + min(n, 30) / 20, alpha=0.55, shrinkA=13, shrinkB=13)
        bend = 0 if ya - yb == 1 else 0.12
        axes.annotate("", (xb, yb), (xa, ya), arrowprops={**style, "connectionstyle": f"arc3,rad={bend}"})
    for room, (x, y) in place.items():
        box = dict(boxstyle="round,pad=0.45", facecolor="#eef3f8", edgecolor="#33475b")
        axes.text(x, y, f"{room}\n{lines[room]:,} lines", ha="center", va="center", fontsize=9, bbox=box)
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.5, len(levels) - 0.5)
    axes.axis("off")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> int:
    """Print, draw, and judge."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--svg", type=Path)
    args = parser.parse_args()
    lines, edges = arrows(args.root)
    floor, circle = floors(set(lines), set(edges))
    for level in sorted(set(floor.values()), reverse=True):
        for room in sorted(r for r in floor if floor[r] == level):
            below = ", ".join(sorted(b for a, b in edges if a == room)) or "none"
            print(f"floor {level}  {room:<11}{lines[room]:>6} lines  imports {below}")
    print(f"{len(lines)} rooms, {sum(lines.values())} lines, {len(edges)} arrows, circles: {sorted(circle) or 'none'}")
    if args.svg and not circle:
        draw(lines, edges, floor, args.svg)
    return 1 if circle else 0


if __name__ == "__main__":
    sys.exit(main())
