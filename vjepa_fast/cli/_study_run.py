"""``vjepa-fast study run``: plan, train and evaluate every variant, or what is missing of them."""

from __future__ import annotations

import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from typing import TYPE_CHECKING

from vjepa_fast.cli._arguments import POOLINGS, add_overrides, names, positive, positive_real
from vjepa_fast.cli._console import say

if TYPE_CHECKING:
    from vjepa_fast.study.run.plan import Grid, StudyPlan
    from vjepa_fast.study.run.suites import Settings

OF_SUITE = {"paper": ("data", "tune"), "synthetic": ("sizes",)}  # options that one suite alone reads
GPU_RECIPE, GPU_SIZE = "gpu_study", 128  # of --scale gpu: the baseline, and pixels of the rendered clips
HELP = "train and evaluate the variants of a study; skips what is done, goes on where it stopped"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", metavar="DIR", help="folder of the study; several machines may share it")
    parser.add_argument("--suite", choices=("synthetic", "paper"), default="synthetic", help="default %(default)s")
    parser.add_argument(
        "--variants",
        default="all",
        metavar="NAMES",
        help="all (the baseline, the 18 counted, the controls fwm_hw and pixels; default) or a list such as "
        "baseline,fwm_hw_ld",
    )
    parser.add_argument("--regimes", type=names, default="single,mixed", metavar="NAMES", help="default %(default)s")
    parser.add_argument("--seeds", type=seeds, default="0..2", help="0..4 or 0,1,5 (default %(default)s)")
    parser.add_argument(
        "--compat",
        type=names,
        default="intended",
        metavar="MODES",
        help="intended (default), published, or intended,published",
    )
    parser.add_argument(
        "--published",
        metavar="NAMES",
        help="variants that also run as the published code does (with --compat published: only these do)",
    )
    parser.add_argument(
        "--scale",
        type=scale,
        default=1.0,
        help="stretch or cut all runs by this (default 1); gpu: ViT-small at 112 px, 8,000 steps (recipe gpu_study)",
    )
    add_overrides(parser, "a value of every run")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument(
        "--jobs", type=positive, help="runs at once (default: one per core, or --jobs-per-gpu on each GPU)"
    )
    parser.add_argument("--jobs-per-gpu", type=positive, default=1, help="runs that share a GPU (default %(default)s)")
    parser.add_argument("--threads", type=positive, help="CPU threads of each run (default: cores / runs at once)")
    parser.add_argument(
        "--launcher",
        choices=("processes", "slurm", "torchrun"),
        default="processes",
        help="processes (default; start the same command on more machines to share the work), slurm (an array through "
        "submitit), torchrun (every run on --gpus-per-run GPUs)",
    )
    parser.add_argument("--gpus-per-run", type=positive, help="with torchrun (default: all of this machine)")
    parser.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="for submitit, such as slurm_partition=gpu or timeout_min=600; may be repeated",
    )
    parser.add_argument(
        "--minutes",
        type=positive_real,
        help="stop after so long; runs save first, and the same command goes on with them",
    )
    parser.add_argument(
        "--force", action="store_true", help="run on suites too that fail their instrument check, or have none"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the runs and what is done; change nothing")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="DIR|NAME=PATH",
        help="paper suite: the folder below which vjepa-fast prepare wrote one per data set, or ssv2=FOLDER, or "
        "ssv2.train=FILE.csv; may be repeated",
    )
    data.add_argument(
        "--sizes",
        action="append",
        default=[],
        metavar="SUITE.PART=N",
        help="synthetic suite: clips, such as motion8.test=2000; may be repeated",
    )
    data.add_argument(
        "--evaluate", type=names, default=[], metavar="NAMES", help="evaluate on these only, such as motion8,fewshot"
    )
    data.add_argument(
        "--tune",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="paper suite: methods=meta-baseline,sun (default; none: frozen only), and their options, such as "
        "trunk=head or tune_epochs=20; may be repeated",
    )
    data.add_argument("--pooling", choices=POOLINGS, help="of probed suites; default: tdiff; paper suite: mean")
    data.add_argument("--way", type=positive, default=5, help="classes per episode (default %(default)s)")
    data.add_argument("--queries", type=positive, default=1, help="per class and episode (default %(default)s)")
    data.add_argument("--episodes", type=positive, default=10_000, help="default %(default)s")


def run(args: Namespace) -> int:
    """Run what is missing of the study, or list it; 1 where a run failed."""
    import os

    from vjepa_fast.errors import UserError
    from vjepa_fast.study.jobs.processes import slots, visible_gpus
    from vjepa_fast.study.run.plan import StudyPlan
    from vjepa_fast.study.run.runner import run_study

    grid, settings = _grid(args), _settings(args)
    if args.minutes and args.launcher == "slurm":
        raise UserError("--minutes: a SLURM job has a limit of its own; give --slurm timeout_min=N")
    places, threads, processes = [None], args.threads or 0, 1
    if args.launcher == "processes":
        places, share = slots(settings.device, args.jobs, args.jobs_per_gpu, len(grid.runs()))
        threads = args.threads or share
    elif args.launcher == "torchrun":
        processes = args.gpus_per_run or (len(visible_gpus()) if settings.device == "cuda" else 2)
        threads = args.threads or max(1, (os.cpu_count() or 1) // processes)
    study = StudyPlan(
        args.folder, settings, grid, threads=threads, side_by_side=len(places), processes=processes, force=args.force
    )
    if args.dry_run:
        return _dry_run(study)
    display = _Display(study, len(places))
    failed = run_study(
        study,
        launcher="slurm" if args.launcher == "slurm" else "processes",
        places=places,
        slurm=_pairs("--slurm", args.slurm, numbers=True),
        at_once=args.jobs,
        minutes=args.minutes,
        on_event=display.event,
    )
    display.close(failed)
    return 1 if failed else 0


def _grid(args: Namespace) -> Grid:
    from vjepa_fast.errors import UserError
    from vjepa_fast.study.records import COMPATS
    from vjepa_fast.study.run import variants
    from vjepa_fast.study.run.plan import Grid

    chosen = variants.names(args.variants)
    if not args.compat or not set(args.compat) <= set(COMPATS):
        raise UserError(f"--compat: {','.join(args.compat)!r}: give {', '.join(COMPATS)} or both")
    published = variants.names(args.published) if args.published else []
    if "published" in args.compat and not args.published:
        published = [name for name in chosen if name not in variants.OTHER_METHODS]
    return Grid(
        variants=tuple(chosen),
        regimes=tuple(args.regimes),
        seeds=args.seeds,
        intended="intended" in args.compat,
        published=tuple(published),
    )


def _settings(args: Namespace) -> Settings:
    from vjepa_fast.errors import UserError
    from vjepa_fast.study.run.suites import Settings

    for suite, options in OF_SUITE.items():
        if suite != args.suite and (given := [name for name in options if getattr(args, name)]):
            raise UserError(f"--{given[0]}: belongs to --suite {suite}, not to {args.suite}")
    device = args.device
    if device != "cpu":
        import torch

        if device not in ("auto", "cuda"):
            raise UserError(f"--device: {device!r} is not known; give auto, cpu or cuda")
        device = "cuda" if torch.cuda.is_available() or device == "cuda" else "cpu"
    sizes = {name: dict(parts) for name, parts in Settings().sizes.items()}
    for key, number in _pairs("--sizes", args.sizes, numbers=True).items():
        name, _, part = key.partition(".")
        if name not in sizes or part not in ("train", "val", "test") or not isinstance(number, int) or number < 0:
            raise UserError(
                f"--sizes {key}={number}: expected SUITE.PART=N with {', '.join(sizes)}, and train, val or test"
            )
        sizes[name][part] = number
    larger = {"scale": 1.0, "recipe": GPU_RECIPE, "size": GPU_SIZE} if args.scale == "gpu" else {"scale": args.scale}
    if args.scale == "gpu" and args.suite == "paper":
        raise UserError("--scale gpu: belongs to --suite synthetic; the paper's recipes have a size of their own")
    return Settings(
        **{k: getattr(args, k) for k in ("suite", "way", "queries", "episodes")},
        **larger,
        overrides=tuple(args.overrides),
        device=device,
        sizes=sizes,
        data=_pairs("--data", [text if "=" in text else f"prepared={text}" for text in args.data]),
        tune=_pairs("--tune", args.tune),
        evaluate=tuple(args.evaluate),
        pooling=args.pooling or "",
    )


def scale(text: str) -> float | str:
    """A positive number, or ``gpu``."""
    return text if text == "gpu" else positive_real(text)


def seeds(text: str) -> tuple[int, ...]:
    """``0..4`` or ``0,1,5``."""
    try:
        out = []
        for part in names(text):
            first, dots, last = part.partition("..")
            out += range(int(first), int(last) + 1) if dots else [int(first)]
        if not out or min(out) < 0:
            raise ValueError
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a range such as 0..4 or a list such as 0,1,5") from None
    return tuple(dict.fromkeys(out))


def _pairs(option: str, texts: list[str], numbers: bool = False) -> dict:
    from vjepa_fast.errors import UserError

    out = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip() or not value.strip():
            raise UserError(f"{option} {text}: expected NAME=VALUE")
        value = value.strip()
        out[key.strip()] = int(value) if numbers and value.lstrip("-").isdigit() else value
    return out


def _dry_run(study: StudyPlan) -> int:
    jobs = study.missing()
    for line in study.suite.cost_lines(jobs):
        say(line)
    missing = {job["key"] for job in jobs}
    for job in study.jobs:
        state = "to do" if job["key"] in missing else "done"
        say(f"{state:<6}  {job['key']:<44} {'' if job['kind'] == 'random' else job['settings']['steps'] + ' steps'}")
    say(f"{len(study.jobs)} runs, {len(missing)} to do")
    return 0


class _Display:
    """A line per finished run: its accuracies, its time, and how long the rest may take."""

    def __init__(self, study: StudyPlan, at_once: int):
        self.study, self.at_once, self.start = study, at_once, time.time()
        self.total, self.kept, self.finished = len(study.jobs), 0, 0
        self.began: dict[str, float] = {}
        self.seconds: list[float] = []  # of the runs that were trained here

    def event(self, what: str, job: dict | str) -> None:
        if isinstance(job, str):
            if what == "cost":
                say(job)
            elif not job.endswith((": start", ": kept")):
                self.say(job)
            return
        key = job["key"]
        if what == "start":
            self.began[key] = time.time()
        elif what == "elsewhere":
            self.say(f"{key}: another command is at it")
        elif what in ("kept", "done"):
            self.finished += 1
            if what == "kept":
                self.kept += 1
                return
            seconds = time.time() - self.began.get(key, self.start)
            if job["kind"] != "random" and key in self.began:
                self.seconds.append(seconds)
            self.say(f"{key}: {self.accuracies(key)}; {seconds:.0f} s{self.left()}")
        elif what == "stopped":
            self.say(f"{key}: stopped, saved as far as it was")
        elif what == "failed":
            from vjepa_fast.study.run.cells import error_path

            path = error_path(self.study.folder, key)
            self.say(f"{key}: FAILED: {path.read_text().strip().splitlines()[-1]} ({path})")

    def say(self, text: str) -> None:
        say(f"[{self.finished:>3}/{self.total}] {time.time() - self.start:6.0f} s  {text}")

    def accuracies(self, key: str) -> str:
        from vjepa_fast.study.run.cells import read_cell

        out: dict[str, list[str]] = {}
        for row in (read_cell(self.study.folder, key) or {"rows": []})["rows"]:
            out.setdefault(row["suite"], []).append(f"{row['probe']} {100 * row['accuracy']:.1f}")
        return ", ".join(f"{suite} {' '.join(found)}" for suite, found in out.items())

    def left(self) -> str:
        if not self.seconds or self.finished >= self.total:
            return ""
        import statistics

        seconds = statistics.median(self.seconds) * (self.total - self.finished) / self.at_once
        return f"; about {seconds / 60:.0f} min left" if seconds < 7200 else f"; about {seconds / 3600:.1f} h left"

    def close(self, failed: list[str]) -> None:
        done = self.total - len(self.study.missing())
        kept = f" ({self.kept} not by this command)" if self.kept else ""
        say(
            f"{done} of {self.total} runs done{kept}, {len(failed)} failed, {time.time() - self.start:.0f} s: "
            f"{self.study.folder}"
        )
        for key in failed:
            say(f"  failed: {key}")
        if done + len(failed) < self.total:
            say(f"{self.total - done - len(failed)} are left; the same command goes on with them")
