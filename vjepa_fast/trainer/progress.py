"""What a person sees while a run goes on: a live bar with ETA on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from vjepa_fast.errors import printable
from vjepa_fast.metrics.collapse import CollapseWatch

if TYPE_CHECKING:
    from rich.progress import Progress as Live


EVERY_S = 60.0  # without a terminal, a line at least so often
MEASURED_S = 5.0  # of steps after the first, before the rate is said for the first time
DAY = 86400.0


class Progress:
    """Context manager that writes to stderr; ``log`` takes a metrics row. Other ranks pass ``enabled=False``.

    Once a few steps have been made a line says what the run will take. Without a terminal a line comes at least once in
    `EVERY_S`, in the middle of a long step too.
    """

    def __init__(self, total: int, start: int = 0, *, enabled: bool = True, every: float = EVERY_S):
        self.total, self.first, self.enabled, self.every = total, start, enabled, every
        self.live: Live | None = None
        self.collapse = CollapseWatch()
        self.step, self.stopped = start, threading.Event()
        self.warm: float | None = None  # when the first step was made
        self.measured = False

    def __enter__(self) -> Progress:
        self.began = self.said = time.perf_counter()
        if self.enabled and not sys.stderr.isatty():
            threading.Thread(target=self._beat, name="vjepa-fast-progress", daemon=True).start()
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
        self.stopped.set()
        if self.live is not None:
            self.live.stop()

    def advance(self, step: int) -> None:
        """Move the bar to ``step``."""
        self._made(step)
        if self.live is not None:
            self.live.update(self.task, completed=step)

    def log(self, row: dict[str, Any]) -> None:
        """Show a row of metrics: next to the bar, or as a line with the time that is left. Where features begin to
        collapse, one line names the remedies.
        """
        status = summary(row)
        self._made(row["step"])
        if self.live is not None:
            short = f"loss {row['loss']:.4f}  {row['clips_per_s']:.1f} clips/s"  # with the bar in 80 columns
            self.live.update(self.task, completed=row["step"], status=short)
        elif self.enabled:
            self._print(f"step {row['step']}/{self.total}  {status}  ETA {duration(self._left())}")
        for line in self.collapse(row["monitors"]):
            self.note(line)

    def note(self, text: str) -> None:
        """Show a line of text above the bar."""
        if self.live is not None:
            self.live.console.print(printable(text, keep="\n"), highlight=False, markup=False)
        elif self.enabled:
            self._print(text)

    def _print(self, text: str) -> None:
        self.said = time.perf_counter()
        print(printable(text, keep="\n"), file=sys.stderr, flush=True)

    def _left(self) -> float:
        """Seconds to the end, by the steps after the first, which builds and measures; by that where it is alone."""
        now, made = time.perf_counter(), self.step - self.first
        if self.warm is not None and made > 1:
            return (now - self.warm) / (made - 1) * (self.total - self.step)
        return (now - self.began) / max(1, made) * (self.total - self.step)

    def _made(self, step: int) -> None:
        """Note that ``step`` was made; the first time that this can be said, say what the run takes."""
        self.step, now = step, time.perf_counter()
        if self.warm is None:
            self.warm = now
        made, left = step - self.first, self._left()
        certain = made > 1 and now - self.warm > MEASURED_S or made == 1 and now - self.began > self.every / 2
        if self.measured or not certain or step == self.total:
            return
        self.measured = True
        pace = (now - self.began) / made if made == 1 else (now - self.warm) / (made - 1)
        self.note(
            f"measured: {pace:.3g} s a step, ETA {duration(left)} for the {self.total - step:,} steps that are left"
        )
        if left > DAY:
            self.note(long_run(left))

    def _beat(self) -> None:
        """A line when nothing was said for `every` seconds."""
        while not self.stopped.wait(min(1.0, self.every / 4)):
            now = time.perf_counter()
            if now - self.said < self.every:
                continue
            eta = f"  ETA {duration(self._left())}" if self.step > self.first else ""
            self._print(
                f"step {self.step}/{self.total} made, {duration(now - self.began)} since the start{eta}; "
                "the next is being made"
            )


def long_run(seconds: float) -> str:
    """The warning about a run of more than a day."""
    return (
        f"warning: this run takes about {seconds / DAY:.1f} days here; vjepa-fast train --videos DIR chooses a size "
        "and length that fit, --steps N is a shorter run, Ctrl-C stops this one"
    )


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
    if row.get("save_wait", 0.0) > 0.1:
        parts.append(f"waiting for checkpoints {100 * row['save_wait']:.0f} %")
    if row.get("skipped"):
        parts.append(f"skipped {row['skipped']}")
    if row.get("spikes"):
        parts.append(f"spikes skipped {row['spikes']}")
    # levels and halves (rankme/level0) are in the row and in TensorBoard, a line has no room for them
    parts += [f"{k} {v:.2f}" for k, v in row["monitors"].items() if v is not None and "/" not in k]
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """``h:mm:ss``."""
    minutes, s = divmod(int(max(0.0, seconds)), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02d}:{s:02d}"
