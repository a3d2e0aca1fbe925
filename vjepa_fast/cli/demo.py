"""``vjepa-fast demo``: the whole story on a laptop, in a few minutes."""

from __future__ import annotations

import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vjepa_fast.cli._arguments import add_device, device_of, positive, positive_real
from vjepa_fast.cli._console import plain, say, table_console
from vjepa_fast.files import parse_json

if TYPE_CHECKING:
    from rich.progress import TaskID

    from vjepa_fast.evaluation import Row

HELP = "render videos, pretrain, probe frozen, write a report; a few minutes on a laptop"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--folder", default="runs/demo", help="folder to write; a stopped demo goes on (default %(default)s)"
    )
    parser.add_argument(
        "--minutes",
        type=_minutes,
        help="stretch or cut training so that two cores take about so long (default: as made, 6 at most)",
    )
    add_device(parser, default="cpu")
    parser.add_argument("--workers", type=positive, help="tasks at once (default: one per core, 4 at most; 1 on a GPU)")


def _minutes(text: str) -> float:
    if (minutes := positive_real(text)) > 24 * 60:
        raise ArgumentTypeError(f"{text} minutes are more than a day")
    return minutes


def run(args: Namespace) -> int:
    """Run the demo, or what is missing of it; print its table and the path of its report."""
    device = "cpu" if args.device == "cpu" else str(device_of(args.device))

    from vjepa_fast.study.demo.graph import run_demo
    from vjepa_fast.study.demo.plan import plan_for

    start, plan = time.time(), plan_for(args.minutes, device)
    with _Display(args.folder, start) as display:
        rows, report = run_demo(args.folder, plan, workers=args.workers, on_event=display.event, on_tick=display.tick)
    _table(rows)
    _verdict(rows)
    say(f"report: {report}   ({time.time() - start:.0f} s)")
    return 0


class _Display:
    """What runs now: bars on a terminal, lines elsewhere."""

    def __init__(self, folder: str, start: float):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.folder, self.start = folder, start
        self.bars: dict[str, TaskID] = {}
        self.totals: dict[Path, int] = {}  # steps of each run
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> _Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def event(self, kind: str, name: str) -> None:
        if kind == "start":
            self.bars[name] = self.progress.add_task(plain(name), total=None, note="")
        elif kind == "done":
            self.progress.remove_task(self.bars.pop(name))
        if kind != "start":
            what = "done" if kind == "done" else "kept from before"
            self.console.print(f"[dim]{time.time() - self.start:5.0f} s[/dim]  {plain(name)} {what}", highlight=False)

    def tick(self, running: set) -> None:
        for name in running & set(self.bars):
            if name.startswith("train-"):
                self._follow(name)

    def _follow(self, name: str) -> None:
        """The last row of a run's metrics: its step and loss."""
        run = Path(self.folder) / "runs" / name.removeprefix("train-")
        try:
            row = parse_json((run / "metrics.jsonl").read_text().splitlines()[-1])
            self.progress.update(
                self.bars[name],
                completed=row["step"],
                total=self._total(run),
                note=f"step {row['step']}  loss {row['loss']:.3f}",
            )
        except (OSError, ValueError, IndexError, KeyError):
            return

    def _total(self, run: Path) -> int:
        from vjepa_fast import config

        if run not in self.totals:
            opt = config.load(run / "config.yaml").optimization
            self.totals[run] = int(opt.epochs * opt.ipe * opt.ipe_scale)
        return self.totals[run]


def _table(rows: Sequence[Row]) -> None:
    """The pivot of the report on the terminal: a line per encoder, a column per suite and probe."""
    from rich.table import Table

    from vjepa_fast.study.demo.page import table

    pivot = table(rows)
    out = Table(
        title="Accuracy in %, 95 % interval; + above, - below random init by the interval of the paired difference",
        title_justify="left",
    )
    out.add_column("encoder")
    for suite, probe in pivot["columns"]:
        out.add_column(f"{suite}\n{probe}", justify="right", no_wrap=True)
    marks = {"above": "[green]+[/green]", "below": "[red]-[/red]"}
    pretrained_before = None
    for label, kind, cells in pivot["lines"]:
        pretrained = kind == "pretrained"
        if pretrained_before not in (None, pretrained):
            out.add_section()
        pretrained_before = pretrained
        texts = []
        for r in cells:
            mark = marks.get(r.verdict, " ") if r and pretrained else " "
            interval = f"[dim]{100 * r.low:.0f}-{100 * r.high:.0f}[/dim]" if r else ""
            texts.append(f"{100 * r.accuracy:.1f}{mark}\n{interval}" if r else "")
        out.add_row(plain(label), *texts)
    table_console(130, least=120).print(out)


def _verdict(rows: Sequence[Row]) -> None:
    from vjepa_fast.study.demo.page import statement

    said = statement(rows)
    say(
        f"{len(said['above'])} of {said['compared']} pretrained rows stand above random init beyond the 95 % interval, "
        f"{len(said['below'])} below, {said['level']} cannot be told from it."
    )
    for name, d in said["above"]:
        say(f"  above: {name}: {100 * d['value']:+.1f} points ({100 * d['low']:+.1f} to {100 * d['high']:+.1f})")
