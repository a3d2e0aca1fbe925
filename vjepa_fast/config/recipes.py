"""What the recipes are, in a line each, from the comments that they begin with."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vjepa_fast.config.load import list_recipes, recipe_path

_SUITS = re.compile(r"# Suits own data: (.+)")


@dataclass(frozen=True)
class About:
    """A recipe: its ``name``, ``what`` it is, and how it suits own data (``own``), empty where it does not."""

    name: str
    what: str
    own: str = ""


def about(name: str) -> About:
    """What the first comment of a recipe says: its first sentence, and its line ``# Suits own data: ...``."""
    lines = recipe_path(name).read_text(encoding="utf-8").splitlines()
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line)
    own = next((found[1] for line in comment if (found := _SUITS.fullmatch(line))), "")
    text = " ".join(line.removeprefix("#").strip() for line in comment if not _SUITS.fullmatch(line))
    sentence = re.split(r"(?<=[\w)\]])\. |; ", text)[0]
    return About(name, re.sub(r"^Run \S+ of (\S+):", r"\1:", sentence.rstrip(".")), own)


def all_recipes() -> list[About]:
    """Those that suit own data first, and of them the one that fits any machine."""
    found = [about(name) for name in list_recipes()]
    return sorted(found, key=lambda a: (not a.own, not a.own.startswith("any"), a.name))
