"""Tables on stdout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def table_console(width: int = 140, least: int = 0) -> Console:
    """A console on stdout: as wide as the terminal; ``width`` in a pipe, or where the terminal is below ``least``."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal and console.width >= least else Console(width=width)


def new_table(title: str, columns: Sequence[str], right: Sequence[str] = (), wraps: str = "encoder") -> Table:
    """A table with ``columns``, those in ``right`` aligned to the right; only the column ``wraps`` may wrap."""
    from rich.table import Table

    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name != wraps)
    return table
