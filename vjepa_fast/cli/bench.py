"""``vjepa-fast bench step``: a whole training step, timed against the published algorithm written plainly."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence

from vjepa_fast.bench.cases import LIMITED, ONE_PER_KIND, PROVIDERS, PUBLIC, RECIPE, SHAPES
from vjepa_fast.cli._arguments import names, positive, some_names, writable_file
from vjepa_fast.cli._console import say

HELP = "time a whole training step against the published algorithm"


def add_arguments(parser: ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("what", choices=["step"], help="step: target, context, predictor, loss, backward, AdamW, EMA")
    parser.add_argument(
        "--recipe",
        default=RECIPE,
        help=f"recipe or YAML file (default {RECIPE}, made ViT-tiny, 112 px, 16 frames, batch 4, float32)",
    )
    parser.add_argument(
        "--recipes",
        metavar="A,B",
        type=_recipes,
        help="several recipes, in short: ld is mixed_4gpu_ld, kinematic is ucf101_4gpu_kinematic; "
        f"all: {','.join(ONE_PER_KIND)}",
    )
    parser.add_argument(
        "--cases",
        metavar="A,B",
        type=_cases,
        help="in place of recipes: shapes of which others have published figures, whose rows stand beside ours; on a "
        f"GPU only. all, or some of: {', '.join(PUBLIC)}",
    )
    parser.add_argument("--batches", metavar="N,N", type=_batches, help="several batch sizes, such as 8,32,64")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one value, such as data.batch_size=8; may be repeated",
    )
    parser.add_argument("--full-size", action="store_true", help="keep the recipe's own model, clip and batch size")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="bfloat16 is autocast (default: float32, on CUDA bfloat16)"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument(
        "--providers",
        default="vjepa_fast,reference",
        metavar="A,B",
        type=_providers,
        help="all, or some of: " + "; ".join(f"{name}: {what}" for name, what in PROVIDERS.items()),
    )
    parser.add_argument(
        "--shapes",
        choices=list(SHAPES),
        default="new",
        help="; ".join(f"{name}: {what}" for name, what in SHAPES.items()) + " (default new)",
    )
    parser.add_argument("--warmup", type=positive, default=2, metavar="N", help="steps before timing (default 2)")
    parser.add_argument(
        "--repeats",
        type=positive,
        default=10,
        metavar="N",
        help="timed turns of each (default 10), a turn being one step, on CUDA four",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="S",
        help="seconds after which nothing more is begun; what was left out has a row that says so",
    )
    parser.add_argument(
        "--limit-s",
        type=float,
        default=300.0,
        metavar="S",
        help=f"seconds after which {', '.join(LIMITED)} is ended, which runs in a process of its own (default 300)",
    )
    parser.add_argument("--no-memory", action="store_true", help="skip the peak-memory runs (CPU: a process each)")
    parser.add_argument("--json", metavar="PATH", type=writable_file, help="also write the rows as JSON, as they come")


def _recipes(text: str) -> list[str]:
    return list(ONE_PER_KIND) if text == "all" else some_names(text)


def _cases(text: str) -> list[str]:
    chosen = list(PUBLIC) if text == "all" else some_names(text)
    for name in chosen:
        if name not in PUBLIC:
            raise ArgumentTypeError(f"{name!r} is unknown; accepted: all, {', '.join(PUBLIC)}")
    return chosen


def _batches(text: str) -> list[int]:
    sizes = [int(size) if size.isdigit() else 0 for size in names(text)]
    if not sizes or min(sizes) < 1:
        raise ArgumentTypeError(f"expected positive numbers with commas between, got {text!r}")
    return sizes


def _providers(text: str) -> list[str]:
    chosen = list(PROVIDERS) if text == "all" else some_names(text)
    for name in chosen:
        if name not in PROVIDERS:
            raise ArgumentTypeError(f"{name!r} is unknown; accepted: all, {', '.join(PROVIDERS)}")
    return chosen


def run(args: Namespace) -> int:
    """Run the command: a table per case as it is through, and the JSON file as rows come.

    Returns 1 where some rows have an error, which did not stop the others.

    Raises:
        UserError: nothing at all could be measured, or losses differ.
    """
    import os
    import time

    from vjepa_fast.bench.cases import Case, config_of, full_name, public_case
    from vjepa_fast.errors import UserError
    from vjepa_fast.files import write_json

    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # torch's profiler reports a missing GPU as an error
    same = {"device": args.device, "dtype": args.dtype, "threads": args.threads}
    batches = args.batches or [None]
    if args.cases and not args.device.startswith("cuda"):
        raise UserError(f"--cases: of the size of {', '.join(args.cases)} on a GPU only, got --device {args.device}")
    if args.cases:  # what cannot be used is refused before anything runs
        cases = [public_case(name, args.overrides, batch=batch, **same) for name in args.cases for batch in batches]
    else:
        recipes = map(full_name, args.recipes or [args.recipe])
        same["full_size"] = args.full_size
        cases = [Case(r, config_of(r, args.overrides, batch=batch, **same)) for r in recipes for batch in batches]
    from vjepa_fast.bench import step

    rows: list[dict] = []

    def keep(found: list[dict]) -> None:
        rows[:] = found
        if args.json:
            write_json(args.json, rows)

    for case in step.measure_cases(
        cases,
        args.providers,
        args.warmup,
        args.repeats,
        shapes=args.shapes,
        limit_s=args.limit_s,
        deadline=float("inf") if args.budget is None else time.monotonic() + args.budget,
        memory=not args.no_memory,
        on_rows=keep,
    ):
        say(*table(case).split("\n"))
    wrong = [row for row in rows if row["error"]]
    nothing = all(row["error"] for row in rows if row["provider"] != "public")
    told = [
        f"{row['provider']} ({row['recipe']}, batch {row['batch']}): {row['error']}"
        for row in wrong
        if row["mismatch"] or nothing
    ]
    if told:
        raise UserError("; ".join(told))
    return 1 if wrong else 0


def table(rows: Sequence[dict]) -> str:
    """Plain text; the ratio is to the reference where it was measured."""
    base = next((r for r in rows if r["provider"] == "reference" and r["median_ms"]), None)
    head = next((r for r in rows if "shape" in r), rows[0])
    columns = {  # heading -> key, form, scale; those of a GPU are left out where no row has them
        "MFU %": ("mfu", "{:.1f}", 100),
        "peak MB": ("peak_after_imports", "{:.0f}", 1e-6),
        "launches": ("launches_per_step", "{:.0f}", 1),
        "syncs": ("syncs_per_step", "{:g}", 1),
        "host ms": ("host_ms", "{:.1f}", 1),
        "busy %": ("device_busy", "{:.0f}", 100),
        "plans": ("plan_builds_per_step", "{:g}", 1),
    }
    for name in ("host ms", "busy %", "plans"):
        if all(r[columns[name][0]] is None for r in rows):
            del columns[name]
    lines = [("provider", "median ms", "min to max ms", "clips/s", "x reference", *columns)]

    def cell(value: float | None, form: str = "{:.1f}", scale: float = 1) -> str:
        return "-" if value is None else form.format(scale * value)

    for r in rows:
        ratio = base["median_ms"] / r["median_ms"] if base and r["median_ms"] else None
        span = "-" if r["min_ms"] is None else f"{r['min_ms']:.1f} to {r['max_ms']:.1f}"
        lines.append(
            (
                f"public, {r['device']}" if r["provider"] == "public" else r["provider"],
                cell(r["median_ms"]),
                span,
                cell(r["clips_per_s"], "{:.2f}"),
                cell(ratio, "{:.2f}"),
                *(cell(r[key], form, scale) for key, form, scale in columns.values()),
            )
        )
    first, *widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join([name.ljust(first), *(c.rjust(w) for c, w in zip(rest, widths))]) for name, *rest in lines]
    errors = [f"{r['provider']}: {r['error']}" for r in rows if r["error"]]
    sources = dict.fromkeys(f"public: {r['source']}" for r in rows if "source" in r)
    where = ", ".join(str(head[k]) for k in ("recipe", "shape", "dtype", "device", "threads") if k in head)
    where += (" threads" if "threads" in head else "") + (f", shapes {head['shapes']}" if head["shapes"] else "")
    return "\n".join([where, *text, *errors, *sources, ""])
