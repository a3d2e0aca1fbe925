"""What was given on the command line, so that an error names the flag that was wrong and not the recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterable
from contextlib import contextmanager

from vjepa_fast.errors import ConfigError


class Given(str):
    """An override, ``section.key=value``, that came by another flag than ``--set``: ``flag`` is how it was written."""

    flag: str

    def __new__(cls, text: str, flag: str) -> Given:
        """The override ``text`` that was written as ``flag``."""
        made = super().__new__(cls, text)
        made.flag = flag
        return made


def quoted(text: str) -> str:
    """Text as a value of an override, which is YAML: a folder may be called ``2024-01-01`` or ``a #2``."""
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(text, ensure_ascii=False))


def folder_override(folder: object, flag: str = "") -> Given:
    """The override of ``folder``, whatever it is called."""
    return Given(f"folder={quoted(str(folder))}", flag or f"--folder {folder}")


def flag_of(override: str) -> str:
    """How an override was written on the command line."""
    return override.flag if isinstance(override, Given) else f"--set {override}"


@contextmanager
def blamed(source: str, overrides: Iterable[str]) -> Generator[None]:
    """As `convert.named`, but a `ConfigError` about a key that was overridden gets the flag in place of ``source``.

    Of several that the message names, the key at its beginning counts before others, and the last flag of a key.
    """
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{_culprit(str(error), list(overrides)) or source}: {error}") from None


def _culprit(message: str, overrides: list[str]) -> str | None:
    keys = {override.partition("=")[0].strip(): flag_of(override) for override in overrides}
    at = {key: message.find(key) for key in keys if re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", message)}
    if at:
        return keys[min(at, key=lambda key: (at[key], -len(key)))]
    section = message.partition(":")[0]
    return next((flag for key, flag in keys.items() if key.startswith(f"{section}.")), None)
