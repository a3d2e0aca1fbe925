"""What a row says of an error; without torch, which a process that is to start at once does not import."""

from __future__ import annotations


def error_text(error: BaseException) -> str:
    """The kind of an error and the first line of what it says, 300 characters at most."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
