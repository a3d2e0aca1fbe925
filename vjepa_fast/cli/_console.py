"""Tables on stdout, progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vjepa_fast.errors import printable, shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table


def plain(text: object) -> str:
    """Text from a file (a name, a reason) for rich: no markup comes of it, and no control characters are in it."""
    from rich.markup import escape

    return escape("".join(c if shown(c) or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in str(text)))


def say(*lines: object, err: bool = False) -> None:
    """Print lines in which names from files may stand, without their control characters; ``err``: to stderr."""
    for line in lines:
        print(printable(line), file=sys.stderr if err else None, flush=True)


def table_console(width: int = 140, least: int = 0) -> Console:
    """A console on stdout: as wide as the terminal; ``width`` in a pipe, or where the terminal is below ``least``."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal and console.width >= least else Console(width=width)


def new_table(title: str, columns: Sequence[str], right: Sequence[str] = (), wraps: str = "encoder") -> Table:
    """A table with ``columns``, those in ``right`` aligned to the right; only the column ``wraps`` may wrap."""
    from rich.table import Table

    table = Table(title=plain(title))
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name != wraps)
    return table


@contextmanager
def counting() -> Iterator[Callable[[str, int, int], None]]:
    """A function that takes (what is done, number done, number in all) and shows it on stderr, with rate and time left.

    On a terminal it is a bar; else a line at the beginning of a stage and every minute. Without a number in all, the
    words are a line of their own.
    """
    import sys
    import time

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    stages: dict[str, tuple[TaskID, float, int]] = {}  # its bar, when it began, how many were done then
    said = 0.0

    def show(what: str, done: int, total: int) -> None:
        nonlocal said
        if not total:
            progress.console.print(plain(what))
            return
        now = time.monotonic()
        if what not in stages:
            stages[what] = progress.add_task(plain(what), total=total, rate=""), now, done
            said = now
        task, begin, first = stages[what]
        rate = (done - first) / max(now - begin, 1e-6)
        progress.update(task, completed=done, rate=f"{rate:.1f}/s" if done > first else "")
        if progress.disable and now - said > 60 and done > first:
            said = now
            minutes = (total - done) / rate / 60
            say(f"{what}: {done} of {total}, {rate:.1f}/s, about {minutes:.0f} min left", err=True)

    console = Console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not sys.stderr.isatty()
    ) as progress:
        yield show
