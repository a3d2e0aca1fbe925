"""``vjepa-fast bench step``: a whole training step, timed against the published algorithm written plainly."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence

from vjepa_fast.bench.cases import ONE_PER_KIND, PROVIDERS, RECIPE
from vjepa_fast.cli._arguments import names, positive, some_names, writable_file

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
    parser.add_argument("--no-memory", action="store_true", help="skip the peak-memory runs (CPU: a process each)")
    parser.add_argument("--json", metavar="PATH", type=writable_file, help="also write the rows as JSON, as they come")


def _recipes(text: str) -> list[str]:
    return list(ONE_PER_KIND) if text == "all" else some_names(text)


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
    """Run the command: a table per case as it is through, and the JSON file as rows come."""
    import os
    import time

    from vjepa_fast.bench.cases import config_of, full_name
    from vjepa_fast.errors import UserError
    from vjepa_fast.files import write_json

    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # torch's profiler reports a missing GPU as an error
    same = {"full_size": args.full_size, "device": args.device, "dtype": args.dtype, "threads": args.threads}
    cases = [
        (recipe, config_of(recipe, args.overrides, batch=batch, **same))  # refused before anything runs
        for recipe in map(full_name, args.recipes or [args.recipe])
        for batch in args.batches or [None]
    ]
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
        deadline=float("inf") if args.budget is None else time.monotonic() + args.budget,
        memory=not args.no_memory,
        on_rows=keep,
    ):
        print(table(case), flush=True)
    failed = [
        f"{row['provider']} ({row['recipe']}, batch {row['batch']}): {row['error']}"
        for row in rows
        if row["error"] and (row["mismatch"] or all(r["error"] for r in rows))
    ]
    if failed:
        raise UserError("; ".join(failed))
    return 0


def table(rows: Sequence[dict]) -> str:
    """Plain text; the ratio is to the reference where it was measured."""
    base = next((r for r in rows if r["provider"] == "reference" and r["median_ms"]), None)
    head = next((r for r in rows if "shape" in r), rows[0])
    lines = [
        ("provider", "median ms", "min to max ms", "clips/s", "x reference", "MFU %", "peak MB", "launches", "syncs")
    ]

    def cell(value: float | None, form: str = "{:.1f}", scale: float = 1) -> str:
        return "-" if value is None else form.format(scale * value)

    for r in rows:
        ratio = base["median_ms"] / r["median_ms"] if base and r["median_ms"] else None
        span = "-" if r["min_ms"] is None else f"{r['min_ms']:.1f} to {r['max_ms']:.1f}"
        lines.append(
            (
                r["provider"],
                cell(r["median_ms"]),
                span,
                cell(r["clips_per_s"], "{:.2f}"),
                cell(ratio, "{:.2f}"),
                cell(r["mfu"], "{:.1f}", 100),
                cell(r["peak_after_imports"], "{:.0f}", 1e-6),
                cell(r["launches_per_step"], "{:.0f}"),
                cell(r["syncs_per_step"], "{:g}"),
            )
        )
    first, *widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join([name.ljust(first), *(c.rjust(w) for c, w in zip(rest, widths))]) for name, *rest in lines]
    errors = [f"{r['provider']}: {r['error']}" for r in rows if r["error"]]
    where = ", ".join(str(head[k]) for k in ("recipe", "shape", "dtype", "device", "threads") if k in head)
    return "\n".join([f"{where} threads" if "threads" in head else where, *text, *errors, ""])
