"""One check of values that have a few names."""

from __future__ import annotations

from collections.abc import Iterable

from vjepa_fast.errors import ConfigError
from vjepa_fast.registry import suggestion


def check_choice(what: str, value: str, accepted: Iterable[str]) -> None:
    """ConfigError where ``value`` is not one of ``accepted``; names them, and the closest."""
    names = list(accepted)
    if value not in names:
        raise ConfigError(f"unknown {what} {value!r}; choose from {', '.join(names)}{suggestion(value, names)}")
