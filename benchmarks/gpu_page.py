"""What an H100 said of the step, from benchmarks/results/h100/, as the tables of docs/performance.md ("On an H100").

    python benchmarks/gpu_page.py                  # called by plot_step.py

captured.json has captured steps and their kernels by name, attention.json what ``runtime.attention: auto`` measured
meanwhile. Of the code before those, step.json has whole steps with their kernels by name, and library_kernels.json the
products and attentions of the same step through cuBLAS and the backends of scaled_dot_product_attention. All say which
commit and versions were measured.
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results" / "h100"
KINDS = (  # the first that a kernel's name matches
    ("attention", r"sdpa|cudnn::fusion|flash|packed_attention"),
    ("float32 products without tensor cores", r"simt_sgemm|f32f32_f32f32|GemmUniversal.*float"),
    ("float32 products on tensor cores", r"^_product$|^_covariance"),
    ("products with GELU in their epilogue", r"^_gelu_product$"),
    ("products in bfloat16", r"nvjet|cublasLt|xmma_gemm_bf16"),
    ("GELU and its slope, as passes", r"gelu"),
    ("LayerNorm and its backward", r"layer_norm|GammaBeta|^_add_norm"),
    ("rotary positions, as a pass", r"rope3d"),
    ("AdamW and the average", r"^_step$"),
    ("latent losses", r"^(token|pair|column)(_|$)"),
    ("copies of clips", r"^Memcpy"),
)
REST = "residuals, concatenations, copies, casts, sums"


def by_kind(kernels: list) -> dict[str, float]:
    """Milliseconds per step of each kind, the largest first."""
    found: dict[str, float] = {}
    for name, _, ms in kernels:
        kind = next((kind for kind, pattern in KINDS if re.search(pattern, name)), REST)
        found[kind] = found.get(kind, 0.0) + ms
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def least(kernels: dict, batch: int) -> float:
    """Milliseconds of the best library kernel for every product and attention of a step of ViT-B, added up.

    The predictor's second mask, which was not measured, counts as the first with the square of its length.
    """

    def product(name: str, *keys: str) -> float:
        row = kernels[f"b{batch} {name}"]
        return sum(row[f"{key}_ms"] for key in keys)

    def attention(name: str, *keys: str) -> float:
        rows = [row for key, row in kernels.items() if key.startswith(f"b{batch} {name} ") and "fwd_ms" in row]
        return sum(min(row[f"{key}_ms"] for row in rows) for key in keys)

    both = ("fwd", "dx", "dw")
    layers = ("qkv", "proj", "fc1", "fc2")
    target = 12 * (sum(product(f"target {x}", "fwd") for x in layers) + attention("target attn", "fwd"))
    seen = sum(attention(f"context{m} attn", "fwd", "bwd") for m in (1, 2))
    context = 12 * (sum(product(f"context {x}", *both) for x in layers) + seen)
    lengths = {8: (1268, 1268), 64: (1053, 1189)}[batch]
    masks = sum((n / lengths[0]) ** 2 for n in lengths)
    predictor = 8 * sum(product(f"predictor {x}", *both) for x in layers)
    predictor += 8 * masks * attention("predictor1 attn hd32", "fwd", "bwd")
    ends = sum(product(x, *both) for x in ("pred_embed1", "pred_embed2", "pred_out", "ctx_out"))
    return target + context + predictor + ends


def steps_table(step: dict) -> str:
    lines = [
        textwrap.fill(
            f"ViT-B/16, 16 x 224 x 224, fwm_hw_ld, bfloat16, on an {step['device']} (torch {step['torch']}, Triton "
            f"{step['triton']}), commit {step['commit']}; three steps each, mask lengths "
            "new at every step unless a row says otherwise:",
            118,
        ),
        "",
        "| step | batch | ms | clips/s | MFU % | peak GB |",
        "|---|---|---|---|---|---|",
    ]
    for r in sorted((r for r in step["rows"] if "ms" in r), key=lambda r: (r["batch"], r["provider"])):
        options = "".join(f", {x}" for x in r["over"])
        options += ", lengths that the process had met before" * (r["tag"] == "ours_b8")
        low, high = min(r["ms"]), max(r["ms"])
        lines.append(
            f"| {r['provider']}{options} | {r['batch']} | {low:.0f} to {high:.0f} | {r['clips_per_s']:.0f} | "
            f"{100 * r['mfu']:.1f} | {r['peak_gb']:.1f} |"
        )
    return "\n".join(lines)


def kinds_table(step: dict, library: dict) -> str:
    rows = {r["batch"]: r["kernels_ms_per_step"] for r in step["rows"] if "kernels_ms_per_step" in r}
    found = {batch: by_kind(kernels) for batch, kernels in sorted(rows.items())}
    sizes = list(found)
    lines = [
        "| kernels of a step, ms | " + " | ".join(f"batch {n}" for n in sizes) + " |",
        "|---" * (1 + len(sizes)) + "|",
    ]
    for kind in found[sizes[-1]]:
        lines.append(f"| {kind} | " + " | ".join(f"{found[n].get(kind, 0):.1f}" for n in sizes) + " |")
    lines.append("| all | " + " | ".join(f"{sum(found[n].values()):.1f}" for n in sizes) + " |")
    floor = " | ".join(f"{least(library['kernels'], n):.1f}" for n in sizes)
    lines.append(f"| the best library kernels for its products and attention | {floor} |")
    return "\n".join(lines)


def graph_text(step: dict) -> str:
    row = next(r for r in step["rows"] if "graph_ms" in r)
    return textwrap.fill(
        f"Forward, losses and backward of one batch of {row['batch']} with masks held fixed took "
        f"{row['fixed_shape_ms']:.0f} ms, all of it the host's; the same captured by hand as one CUDA graph "
        f"{row['graph_ms']:.1f} ms.",
        118,
    )


def captured_tables(found: dict, attention: dict) -> str:
    """Rows of the benchmark, steps one at a time, kernels by kind, and attention by backend."""
    parts = [
        textwrap.fill(
            f"{found['device']}, torch {found['torch']}, Triton {found['triton']}; mask lengths new at every step. "
            "First, turns of four steps, among them steps whose capacities had not come before, which run as they are "
            "once and are captured once:",
            118,
        ),
        "\n".join(
            [
                "| batch | median ms | least to most | clips/s | MFU % | peak GB | launches | syncs | plans | busy % |",
                "|---" * 10 + "|",
                *(
                    f"| {r['batch']} | {r['median_ms']:.1f} | {r['min_ms']:.1f} to {r['max_ms']:.1f} | "
                    f"{r['clips_per_s']:.0f} | {100 * r['mfu']:.1f} | {r['peak_after_imports'] / 1e9:.1f} | "
                    f"{r['launches_per_step']:g} | "
                    f"{r['syncs_per_step']:g} | {r['plan_builds_per_step']:g} | {100 * r['device_busy']:.0f} |"
                    for r in found["rows"]
                ),
            ]
        ),
    ]
    said = []
    for batch, steps in found["steps"].items():
        pairs = zip(steps, steps[1:])  # of a replay no graph and no shape was new
        replays = sorted(ms for before, (ms, *_, graphs, seen) in pairs if before[2:] == [graphs, seen])
        said.append(f"at batch {batch} {replays[0]:.1f} to {replays[-1]:.1f} ms ({len(replays)} of {len(steps)} steps)")
    parts.append(
        textwrap.fill(f"Second, steps one at a time, of which those that were replays took {', '.join(said)}.", 118)
    )
    kinds = by_kind(found["kernels"]["8"])
    rest = found["kernel_ms"]["8"] - sum(kinds.values())  # of kernels too short for the file
    kinds[REST] += rest
    lines = ["| kernels of a captured step at batch 8 | ms |", "|---|---|"]
    lines += [f"| {kind} | {ms:.1f} |" for kind, ms in sorted(kinds.items(), key=lambda item: -item[1])]
    parts.append("\n".join([*lines, f"| all {found['kernels_per_step']['8']:.0f} | {found['kernel_ms']['8']:.1f} |"]))
    names = ["triton", "sdpa_cudnn", "sdpa_flash", "varlen"]
    lines = ["| attention, device ms | " + " | ".join(f"`{name}`" for name in names) + " |", "|---" * 5 + "|"]
    for shape, ms in attention["ms"].items():
        cells = (f"{ms[name]:.3f}" if name in ms else "" for name in names)
        lines.append(f"| {shape.removeprefix('bfloat16, ').replace(', rope', '')} | {' | '.join(cells)} |")
    return "\n\n".join([*parts, "\n".join(lines)])


def section() -> str:
    """All of it."""
    names = ("step", "library_kernels", "captured", "attention")
    step, library, captured, attention = (json.loads((RESULTS / f"{name}.json").read_text()) for name in names)
    before = (steps_table(step), graph_text(step), kinds_table(step, library))
    return "\n\n".join((captured_tables(captured, attention), "Before that:", *before))


if __name__ == "__main__":
    print(section())
