"""Markdown pages of the repository, cut into what a test can look at: commands, Python blocks, YAML blocks, links."""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
REASONS = ("needs gpu", "needs data", "needs network", "long", "fragment")
MARK = re.compile(r"\s*<!-- test: ([\w ]+?)(?: \((.+?)\))?(?:: .+)? -->$")
YAML = r"(base|method|levjepa|data|img_data|masks|model|objectives|optimization|runtime|target): *\S*\n?"
COMMAND = re.compile(r"(?:time )?(vjepa-fast|make|python3? (?:-m )?|torchrun|pip install)")


@dataclass(frozen=True)
class Piece:
    """A command (one logical line) or a block of code of a page."""

    page: str
    line: int
    kind: str  # command | mention (inline code) | python | yaml
    text: str
    mark: str  # why it is not run, or ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text.splitlines()[0]}"


def words(command: str) -> list[str]:
    """Words of a command, without its comment and without ``time``."""
    found = shlex.split(command, comments=True)
    return found[1:] if found[0] == "time" else found


def pieces(page: Path) -> list[Piece]:
    """What ``page`` holds, in order.

    A mark ``<!-- test: REASON (WORDS): why -->`` holds for the block or paragraph after it; with WORDS in brackets, for
    what contains them. The words and the why may be missing.
    """
    name, found, marks, block = page.relative_to(ROOT).as_posix(), [], [], None
    lines = [*page.read_text(encoding="utf-8").split("\n"), ""]
    pending = fresh = False  # marks are waiting for a chunk; the line before was blank

    def why(text: str) -> str:
        return next((reason for reason, words in marks if not words or words in text), "")

    def close() -> None:
        nonlocal block
        start, kind, content = block
        text, block = textwrap.dedent("\n".join(content)), None
        if kind == "":
            kind = "python" if re.match(r"(from|import) \S", text) else "yaml" if re.match(YAML, text) else ""
        if kind in ("python", "yaml"):
            found.append(Piece(name, start, kind, text, why(text)))
        elif kind in ("", "sh", "shell", "bash", "console"):
            for offset, command in commands(text):
                found.append(Piece(name, start + offset, "command", command, why(command)))

    fenced = False
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith("```"):
            if fenced:
                close()
                marks, fenced = [], False
            else:
                block, fenced, pending = (number + 1, line.strip().strip("`"), []), True, False
        elif fenced:
            block[2].append(line)
        elif mark := MARK.match(line):
            assert mark[1] in REASONS, f"{name}:{number}: the reason {mark[1]!r} is not one of {REASONS}"
            marks, pending = [*(marks if pending else []), (mark[1], mark[2] or "")], True
        elif block is not None and (not line.strip() or line.startswith("    ")):
            block[2].append(line)
        else:
            if block is not None:
                close()
                marks = []
            if line.startswith("    ") and fresh:
                block, pending = (number, "", [line]), False
            elif line.strip():
                pending = False
                for text in re.findall(r"`([^`]+)`", line):
                    if COMMAND.match(text):
                        found.append(Piece(name, number, "mention", text, why(text)))
            elif not pending:
                marks = []
        fresh = not line.strip() or bool(MARK.match(line))
    if block is not None:
        close()
    return found


def commands(text: str) -> list[tuple[int, str]]:
    """(line, command) of a block: continued lines are joined, ``a && b`` are two, anything that is no command goes."""
    found, joined, start = [], "", 0
    for offset, line in enumerate(text.split("\n")):
        start = start if joined else offset
        joined += line.removeprefix("$ ")
        if joined.endswith("\\"):
            joined = joined[:-1]
            continue
        found += [(start, part.strip()) for part in joined.split(" && ") if COMMAND.match(part.strip())]
        joined = ""
    return found


def links(page: Path) -> list[tuple[int, str]]:
    """(line, target) of the links and images of a page that lead into the repository; code is left out."""
    found, fenced = [], False
    for number, line in enumerate(page.read_text(encoding="utf-8").split("\n"), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        if not fenced and not line.startswith("    "):
            plain = re.sub(r"`[^`]*`", "", line)
            found += [(number, t) for t in re.findall(r"\]\(([^()\s]+)\)", plain) if not re.match(r"[a-z]+:", t)]
    return found


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and MkDocs make them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    slugs = set()
    for heading in re.findall(r"^#+ +(.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", heading).strip().lower()
        slugs.add(re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain)))
    return slugs
