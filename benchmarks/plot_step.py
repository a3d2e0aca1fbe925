"""Puts what was measured into docs/performance.md: tables between its markers, and docs/images/step.png.

    python benchmarks/plot_step.py                 # after benchmarks/bench_step.py, bench_linear.py, training_curves.py

Reads benchmarks/results/bench_step.json and, where it is there, bench_step_cuda.json, linear.json and
training_curves.json; the table of the step's floor is computed. A part whose file is missing stays as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_page  # noqa: E402
import step_floor  # noqa: E402

from vjepa_fast import config  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {
    "vjepa_fast": "C0",
    "vjepa_fast_compiled": "C9",
    "reference": "0.45",
    "reference_compiled": "0.65",
    "reference_checkpointed": "0.82",
}


_ON_A_GPU = (  # heading, key, form, scale
    ("host ms", "host_ms", "{:.1f}", 1),
    ("busy %", "device_busy", "{:.0f}", 100),
    ("plans", "plan_builds_per_step", "{:g}", 1),
)


def cases(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """(device, dtype, case, batch) -> provider -> row, in the order of the rows.

    What others have reported stands with what was measured, under the name of their device.
    """
    found: dict[tuple, dict[str, dict]] = {}
    devices = [r["device"] for r in rows if "device" in r and r["provider"] != "public"]
    here = devices[0] if devices else "?"
    for r in rows:
        public = r["provider"] == "public"
        device, name = (here, f"public, {r['device']}") if public else (r.get("device", here), r["provider"])
        case = r.get("case") or r["recipe"]
        case += ", shapes repeated" if r.get("shapes") == "repeated" else ""
        found.setdefault((device, r["dtype"], case, r["batch"]), {})[name] = r
    return found


def step_table(rows: list[dict]) -> str:
    head = next(r for r in rows if "shape" in r)
    gpu = [column for column in _ON_A_GPU if any(r.get(column[1]) is not None for r in rows)]
    lines = [
        f"{head['device']}, {head['threads']} threads, torch {head['torch']}, {head['dtype']}, "
        f"{head['shape'].split(' ')[0]} {head['shape'].split(' ', 2)[2].rsplit(' ', 1)[0]}:",
        "",
        "| recipe | batch | step | ms | clips/s | speed-up | MFU % | peak MB | of reference | launches | syncs |"
        + "".join(f" {heading} |" for heading, *_ in gpu),
        "|---" * (11 + len(gpu)) + "|",
    ]
    for (_, _, recipe, batch), providers in cases(rows).items():
        base = providers.get("reference", {})
        for name, r in providers.items():
            cells = [recipe, batch, name]
            if r["error"]:
                cells += [r["error"].replace("|", "/"), *[""] * (7 + len(gpu))]
            else:
                cells += [
                    f"{r['median_ms']:.1f}",
                    f"{r['clips_per_s']:.2f}",
                    _ratio(base, r, "median_ms"),
                    _number(r["mfu"], "{:.1f}", 100),
                    _number(r["peak_after_imports"], "{:.0f}", 1e-6),
                    _ratio(r, base, "peak_after_imports"),
                    _number(r["launches_per_step"], "{:.0f}"),
                    _number(r["syncs_per_step"], "{:g}"),
                    *(_number(r.get(key), form, scale) for _, key, form, scale in gpu),
                ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _number(value, form: str, scale: float = 1) -> str:
    return "-" if value is None else form.format(scale * value)


def _ratio(a: dict, b: dict, key: str) -> str:
    return f"{a[key] / b[key]:.2f}" if a.get(key) and b.get(key) else "-"


def linear_table(found: dict) -> str:
    names = ("forward", "gelu", "gradient_x", "gradient_w", "gradient_wb")
    head = ("model", "layer", "x W^T + b", "with GELU", "gradient in x", "in W", "in W and b, ours")
    lines = [
        f"{found['device']}, {found['threads']} threads, torch {found['torch']}; MKL's time over that of oneDNN "
        f"(last column: ours), {found['rows'][0]['tokens']} tokens:",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    by_layer: dict[tuple, dict] = {}
    for r in found["rows"]:
        by_layer.setdefault((r["model"], f"{r['layer']} {r['inputs']} to {r['outputs']}"), {})[r["product"]] = r
    for (model, layer), products in by_layer.items():
        ratios = " | ".join(f"{products[n]['mkl_ms'] / products[n]['other_ms']:.2f}" for n in names)
        lines.append(f"| {model} | {layer} | {ratios} |")
    return "\n".join(lines)


def curves_text(found: dict) -> str:
    outside = len(found["steps_outside_the_spread"])
    beyond = len(found["steps_beyond_the_spread_of_that_step"])
    text = (
        f"Over {found['steps']} steps the losses of the fast step and of the float32 reference are at most "
        f"{found['largest_distance']:.1e} apart (mean of {found['window']} steps), those of the two references at "
        f"most {found['largest_spread']:.1e}. The fast step is outside the spread so far at {outside} steps, and "
        f"at its nearest to that it takes up {100 * found['largest_share_of_the_spread']:.0f} % of it; it is "
        f"farther than the spread of that very step at {beyond} steps."
    )
    return textwrap.fill(text, 118)


def plot(rows: list[dict], path: Path) -> None:
    """Clips per second above, peak memory below; a column per device and batch size, a group of bars per recipe."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = cases(rows)
    columns = list(dict.fromkeys((device, dtype, batch) for device, dtype, _, batch in found))
    names = list(dict.fromkeys(name for providers in found.values() for name in providers))
    counts = [sum(1 for k in found if (k[0], k[1], k[3]) == c) for c in columns]
    size = (max(6.0, sum(1.6 + 1.1 * n for n in counts)), 6)
    figure, axes = plt.subplots(
        2,
        len(columns),
        figsize=size,
        squeeze=False,
        layout="constrained",
        gridspec_kw={"width_ratios": [n + 1 for n in counts]},
    )
    handles: dict[str, Any] = {}
    for (device, dtype, batch), upper, lower in zip(columns, *axes):
        here = {k[2]: v for k, v in found.items() if (k[0], k[1], k[3]) == (device, dtype, batch)}
        for axis, key, scale in ((upper, "clips_per_s", 1), (lower, "peak_after_imports", 1e-6)):
            for place, providers in enumerate(here.values()):
                for i, name in enumerate(names):
                    value = providers.get(name, {}).get(key)
                    if value is not None:
                        at = place + 0.8 * ((i + 0.5) / len(names) - 0.5)
                        bar = axis.bar(at, scale * value, 0.8 / len(names), color=COLOURS.get(name), label=name)
                        form = "{:.0f}" if scale < 1 or value > 99 else "{:.2f}"
                        axis.bar_label(bar, fmt=form, fontsize=7, padding=2, rotation=90 if len(here) > 2 else 0)
            axis.set_xticks(range(len(here)), [r.replace("_4gpu_", "\n") for r in here], fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
        upper.set(title=f"{device}\n{dtype}, batch {batch}", ylabel="clips per second")
        upper.title.set_fontsize(9)
        lower.set(ylabel="peak memory, MB")
        lower.margins(y=0.15)
        shown, labels = upper.get_legend_handles_labels()
        handles = dict(zip(labels, shown))
        upper.margins(y=0.15)  # room for the numbers
    figure.legend(handles.values(), handles, fontsize=8, ncols=3, loc="outside lower center", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def put(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between ``<!-- name -->`` and ``<!-- end name -->``."""
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise SystemExit(f"expected {begin} and {end} once each in the page")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="of the JSON files")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--png", type=Path, default=ROOT / "docs" / "images" / "step.png")
    args = parser.parse_args()

    def read(name: str):
        path = args.results / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    text = args.page.read_text(encoding="utf-8")
    floor = [
        step_floor.table(config.load("mixed_4gpu_baseline", [*step_floor.FIXED, f"data.batch_size={n}"]), 989, 4.8)
        for n in (8, 64)
    ]
    text = put(text, "floor", "\n\n".join(floor))
    tables = [rows for rows in (read("bench_step.json"), read("bench_step_cuda.json")) if rows]
    if tables:
        text = put(text, "step", "\n\n".join(map(step_table, tables)))
        plot([row for rows in tables for row in rows], args.png)
    text = put(text, "h100", gpu_page.section())
    for name, file, made in (("linear", "linear.json", linear_table), ("curves", "training_curves.json", curves_text)):
        if (found := read(file)) is not None:
            text = put(text, name, made(found))
    args.page.write_text(text, encoding="utf-8")
    print(f"wrote {args.page} and {args.png}")


if __name__ == "__main__":
    main()
