"""What a person sees while a run goes on: a live bar with ETA on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from vjepa_fast.metrics.collapse import CollapseWatch

if TYPE_CHECKING:
    from rich.progress import Progress as Live


class Progress:
    """Context manager that writes to stderr; ``log`` takes a metrics row. Other ranks pass ``enabled=False``."""

    def __init__(self, total: int, start: int = 0, *, enabled: bool = True):
        self.total, self.first, self.enabled = total, start, enabled
        self.live: Live | None = None
        self.collapse = CollapseWatch()

    def __enter__(self) -> Progress:
        self.began = time.perf_counter()
        if self.enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Live

            self.live = Live(
                TextColumn("train"),
                BarColumn(bar_width=16),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                refresh_per_second=2,
            )
            self.live.start()
            self.task = self.live.add_task("train", total=self.total, completed=self.first, status="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def advance(self, step: int) -> None:
        """Move the bar to ``step``."""
        if self.live is not None:
            self.live.update(self.task, completed=step)

    def log(self, row: dict[str, Any]) -> None:
        """Show a row of metrics: next to the bar, or as a line with the time that is left. Where features begin to
        collapse, one line names the remedies.
        """
        status = summary(row)
        if self.live is not None:
            short = f"loss {row['loss']:.4f}  {row['clips_per_s']:.1f} clips/s"  # with the bar in 80 columns
            self.live.update(self.task, completed=row["step"], status=short)
        elif self.enabled:
            rate = (time.perf_counter() - self.began) / max(1, row["step"] - self.first)
            left = duration(rate * (self.total - row["step"]))
            print(f"step {row['step']}/{self.total}  {status}  ETA {left}", file=sys.stderr, flush=True)
        for line in self.collapse(row["monitors"]):
            self.note(line)

    def note(self, text: str) -> None:
        """Show a line of text above the bar."""
        if self.live is not None:
            self.live.console.print(text, highlight=False, markup=False)
        elif self.enabled:
            print(text, file=sys.stderr, flush=True)


def summary(row: dict[str, Any]) -> str:
    """A row of metrics as one line."""
    parts = [f"loss {row['loss']:.4f}"]
    if len(row["terms"]) > 1:
        parts += [f"{k} {v:.3f}" for k, v in row["terms"].items()]
    parts += [f"lr {row['lr']:.2e}", f"{row['clips_per_s']:.1f} clips/s"]
    if row.get("mfu"):
        parts.append(f"MFU {100 * row['mfu']:.0f} %")
    if row["data_wait"] > 0.1:
        parts.append(f"waiting for data {100 * row['data_wait']:.0f} %")
    # levels and halves (rankme/level0) are in the row and in TensorBoard, a line has no room for them
    parts += [f"{k} {v:.2f}" for k, v in row["monitors"].items() if v is not None and "/" not in k]
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """``h:mm:ss``."""
    minutes, s = divmod(int(max(0.0, seconds)), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02d}:{s:02d}"
