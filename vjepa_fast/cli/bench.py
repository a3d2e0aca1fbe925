"""``vjepa-fast bench step``: a whole training step, timed against the published algorithm written plainly."""

from __future__ import annotations

HELP = "time a whole training step against the published algorithm"

RECIPE = "mixed_4gpu_fwm_hw_ld"
SMALL = ("model.model_name=vit_tiny", "data.crop_size=112", "data.dataset_fpcs=[16]", "data.batch_size=4")
FIXED = (
    "data.datasets=[]",
    "data.datasets_weights=null",
    "loss.context_warmup=[0,0]",
    "runtime.device=cpu",
    "model.use_activation_checkpointing=false",
    "runtime.dtype=float32",
    "runtime.tensorboard=false",
)
PROVIDERS = {
    "vjepa_fast": "ours as configured",
    "vjepa_fast_compiled": "ours with runtime.compile: blocks, which is what auto takes on CUDA",
    "reference": "the published algorithm without activation checkpointing",
    "reference_compiled": "its encoder, predictor and target under torch.compile",
    "reference_checkpointed": "with activation checkpointing, as published",
}
ISSUE = ("baseline", "motion_guided", "ld", "fwm_hw_ld", "kinematic", "spectral", "hamiltonian")


def add_arguments(parser) -> None:
    parser.add_argument("what", choices=["step"], help="step: target, context, predictor, loss, backward, AdamW, EMA")
    parser.add_argument(
        "--recipe",
        default=RECIPE,
        help=f"recipe or YAML file (default {RECIPE}, made ViT-tiny, 112 px, 16 frames, batch 4, float32)",
    )
    parser.add_argument(
        "--recipes",
        metavar="A,B",
        help="several recipes, in short: ld is mixed_4gpu_ld, kinematic is "
        f"ucf101_4gpu_kinematic; all: {','.join(ISSUE)}",
    )
    parser.add_argument("--batches", metavar="N,N", help="several batch sizes, such as 8,32,64")
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
        help="all, or some of: " + "; ".join(f"{name}: {what}" for name, what in PROVIDERS.items()),
    )
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="steps before timing (default 2)")
    parser.add_argument(
        "--repeats",
        type=int,
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
    parser.add_argument("--json", metavar="PATH", help="also write the rows as JSON, as they come")


def config_of(args, recipe: str | None = None, batch: int | None = None):
    """The benchmark's configuration: the recipe, made small unless asked otherwise, then the user's overrides."""
    from vjepa_fast import config

    dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    overrides = [
        *FIXED,
        *(() if args.full_size else SMALL),
        f"runtime.device={args.device}",
        f"runtime.dtype={dtype}",
        f"runtime.threads={args.threads}",
        *args.overrides,
    ]
    if batch is not None:
        overrides.append(f"data.batch_size={batch}")
    return config.load(recipe or args.recipe, overrides)


def run(args) -> int:
    import os
    import time

    from vjepa_fast.bench.step import measure
    from vjepa_fast.errors import UserError

    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # torch's profiler tells of a missing GPU as of an error

    chosen = list(PROVIDERS) if args.providers == "all" else _names(args.providers)
    for name in chosen:
        if name not in PROVIDERS:
            raise UserError(f"--providers: {name!r} is unknown; accepted: all, {', '.join(PROVIDERS)}")
    if not chosen or args.repeats < 1 or args.warmup < 1:
        raise UserError("--providers, --repeats and --warmup: at least one of each is needed")
    recipes = [full_name(r) for r in (ISSUE if args.recipes == "all" else _names(args.recipes or args.recipe))]
    batches = [None]
    if args.batches is not None:
        batches = [int(b) if b.isdigit() else 0 for b in _names(args.batches)]
        if not batches or min(batches) < 1:
            raise UserError(f"--batches: expected positive numbers with commas between, got {args.batches!r}")
    cases = [config_of(args, recipe, batch) for recipe in recipes for batch in batches]  # refused before anything runs
    if args.json:
        _check_writable(args.json)
    deadline = float("inf") if args.budget is None else time.monotonic() + args.budget
    passes = [chosen]
    if len(cases) > 1 and args.device.startswith("cuda"):  # what compiles takes minutes: last, if the budget lasts
        late = [name for name in chosen if name.endswith("_compiled")]
        passes = [names for names in ([name for name in chosen if name not in late], late) if names]
    found: list[list[dict]] = [[] for _ in cases]
    for names in passes:
        for recipe, cfg, mine in zip((r for r in recipes for _ in batches), cases, found):
            for new in measure(
                cfg, names, args.warmup, args.repeats, deadline=deadline, memory=not args.no_memory, against=mine
            ):
                mine += [{"recipe": recipe, **row} for row in new]
                if args.json:
                    _write(args.json, [row for rows in found for row in rows])
            print(table(mine), flush=True)
    rows = [row for mine in found for row in mine]
    failed = [
        f"{row['provider']} ({row['recipe']}, batch {row['batch']}): {row['error']}"
        for row in rows
        if row["error"] and (row["mismatch"] or all(r["error"] for r in rows))
    ]
    if failed:
        raise UserError("; ".join(failed))
    return 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def full_name(name: str) -> str:
    """``ld`` is ``mixed_4gpu_ld``, ``kinematic``, which was published on UCF-101 alone, ``ucf101_4gpu_kinematic``."""
    from vjepa_fast import config

    known = config.list_recipes()
    return next((full for full in (name, f"mixed_4gpu_{name}", f"ucf101_4gpu_{name}") if full in known), name)


def _check_writable(path: str) -> None:
    from vjepa_fast.errors import UserError

    try:
        with open(path, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror})") from None


def _write(path: str, rows: list[dict]) -> None:
    import json

    with open(path, "w", encoding="utf-8") as f:
        json.dump(rows, f, indent=1)
        f.write("\n")


def table(rows: list[dict]) -> str:
    """Plain text; the ratio is to the reference where it was measured."""
    base = next((r for r in rows if r["provider"] == "reference" and r["median_ms"]), None)
    head = next((r for r in rows if "shape" in r), rows[0])
    lines = [
        ("provider", "median ms", "min to max ms", "clips/s", "x reference", "MFU %", "peak MB", "launches", "syncs")
    ]

    def cell(value, form: str = "{:.1f}", scale: float = 1) -> str:
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
