"""Does pretraining beat random init on rendered videos? Renders, trains three seeds, probes frozen, writes the result.

    python benchmarks/synthetic_small.py                     # everything, resumable; two runs at a time
    python benchmarks/synthetic_small.py --seeds 0           # one seed

Writes benchmarks/results/synthetic_small.json (format: vjepa_fast/study/demo/records.py) and synthetic_small.png. The
probe reads one centre view per clip; the penalty is chosen on the validation part; the test part is read once, at the
end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SUITES = ("motion8", "objects")
PARTS = {"train": 4000, "val": 600, "test": 2000}
POOLINGS = ("mean", "meanstd")
PROBE = ["--level", "all", "--which", "target_encoder", "--probes", "linear", "--workers", "0"]
NOTE = (
    "Linear probes of frozen features, all four levels, pooled over all tokens: mean, or mean and standard "
    "deviation (meanstd). Minutes are of the last call of the command."
)


def run(*arguments: object, threads: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-m", "vjepa_fast", *map(str, arguments)], check=True, env=environment)


def train(folder: Path, seed: int, overrides: list[str], threads: int) -> Path:
    out = folder / f"seed{seed}"
    data = ",".join(str(folder / "suites" / s / "train.csv") for s in SUITES)
    sets = [f"data.datasets=[{data}]", f"seed={seed}", f"runtime.threads={threads}", *overrides]
    run("train", "synthetic_small", "--folder", out, *(x for s in sets for x in ("--set", s)), threads=threads)
    return out


def probe(folder: Path, seed: int, threads: int) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {pooling: [] for pooling in POOLINGS}
    for suite in SUITES:
        parts = folder / "suites" / suite
        for pooling in POOLINGS:
            target = folder / f"seed{seed}" / f"probe_{suite}_{pooling}.json"
            run(
                "probe",
                folder / f"seed{seed}",
                *(x for p in PARTS for x in (f"--{p}", parts / f"{p}.csv")),
                *PROBE,
                "--pooling",
                pooling,
                "--seed",
                seed,
                "--json",
                target,
                threads=threads,
            )
            files[pooling].append(target)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/synthetic_small"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each")
    parser.add_argument("--render-seed", type=int, default=7, help="of the clips; the recipe was chosen on seed 0")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="overrides of the recipe")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "synthetic_small.json")
    args = parser.parse_args()

    started = time.time()
    for suite in SUITES:
        sizes = [x for part, n in PARTS.items() for x in (f"--{part}", n)]
        run(
            "synthetic",
            suite,
            args.folder / "suites" / suite,
            *sizes,
            "--seed",
            args.render_seed,
            "--workers",
            args.parallel,
            threads=1,
        )
    with ThreadPoolExecutor(args.parallel) as pool:
        runs = dict(zip(args.seeds, pool.map(lambda s: train(args.folder, s, args.set, args.threads), args.seeds)))
        probes = dict(zip(args.seeds, pool.map(lambda s: probe(args.folder, s, args.threads), args.seeds)))
    report(args, runs, probes, (time.time() - started) / 60)


def report(
    args: argparse.Namespace, runs: dict[int, Path], probes: dict[int, dict[str, list[Path]]], minutes: float
) -> None:
    import json

    from vjepa_fast.files import write_json
    from vjepa_fast.study.records import read_metrics

    about = json.loads((runs[args.seeds[0]] / "versions.json").read_text())
    found, rows = {}, []
    for pooling in POOLINGS:
        files = {seed: of_seed[pooling] for seed, of_seed in probes.items()}
        found = collect(
            files,
            runs,
            recipe="synthetic_small",
            commit=about.get("commit", ""),
            versions=about,
            command=" ".join(["python benchmarks/synthetic_small.py", *sys.argv[1:]]),
            device=f"CPU, {os.cpu_count()} cores",
            minutes=round(minutes, 1),
            note=NOTE,
        )
        rows += [{**row, "probe": f"linear, {pooling}"} for row in found["rows"]]
    found["rows"] = sorted(rows, key=lambda r: (r["suite"], r["probe"], r["seed"]))
    write_json(args.json, found)
    for row in found["rows"]:
        low, high = row["difference_ci95"]
        print(
            f"{row['suite']:8} {row['probe']:15} seed {row['seed']}: pretrained {row['pretrained']:.3f}, "
            f"random init {row['random']:.3f}, difference {row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
        )
    plot({seed: read_metrics(folder) for seed, folder in runs.items()}, found, args.json.with_suffix(".png"))
    print(f"wrote {args.json}")


def collect(
    probe_files: Mapping[int, Sequence[str | os.PathLike]],
    run_folders: Mapping[int, str | os.PathLike],
    *,
    recipe: str,
    command: str,
    device: str,
    minutes: float,
    commit: str,
    versions: dict,
    note: str = "",
    points: int = 200,
) -> dict:
    """The result from ``{seed: [probe --json files]}`` and ``{seed: run folder}`` (for the curves)."""
    from vjepa_fast.study.records import read_metrics

    rows = []
    for seed, files in probe_files.items():
        for file in files:
            found = json.loads(Path(file).read_text())["rows"]
            controls = {(r["suite"], r["probe"]): r for r in found if r["kind"] == "random"}
            for r in found:
                if r["kind"] != "pretrained" or r.get("difference") is None:
                    continue
                control = controls[r["suite"], r["probe"]]
                rows.append(
                    {
                        "suite": r["suite"],
                        "probe": r["probe"],
                        "encoder": r["label"],
                        "seed": seed,
                        "n": r["n"],
                        "chance": r["chance"],
                        "pretrained": r["accuracy"],
                        "pretrained_ci95": [r["low"], r["high"]],
                        "random": control["accuracy"],
                        "random_ci95": [control["low"], control["high"]],
                        "difference": r["difference"]["value"],
                        "difference_ci95": [r["difference"]["low"], r["difference"]["high"]],
                    }
                )
    curves = []
    for seed, folder in run_folders.items():
        metrics = read_metrics(folder)
        metrics = metrics[:: max(1, len(metrics) // points)]
        curves.append(
            {"seed": seed, "step": [m["step"] for m in metrics], "loss": [round(m["loss"], 5) for m in metrics]}
        )
    return {
        "format": 1,
        "recipe": recipe,
        "command": command,
        "device": device,
        "minutes": minutes,
        "commit": commit,
        "versions": versions,
        "note": note,
        "rows": rows,
        "curves": curves,
    }


def plot(metrics: dict[int, list[dict]], found: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for seed, rows in metrics.items():
        step = [r["step"] for r in rows]
        for name, style in (("pred", "-"), ("kinematic", "--")):
            axes[0].plot(step, [r["terms"][name] for r in rows], style, lw=1, label=f"{name}, seed {seed}")
        axes[1].plot(step, [r["terms"]["sigreg"] for r in rows], lw=1, label=f"seed {seed}")
    axes[0].set(title="Prediction and kinematic terms", xlabel="step")
    axes[0].legend(fontsize=7)
    axes[1].set(title="SIGReg term", xlabel="step", yscale="log")
    axes[1].legend(fontsize=7)
    for place, row in enumerate(found["rows"]):
        for kind, colour, shift in (("random", "0.6", 0.0), ("pretrained", "C0", 0.35)):
            low, high = row[f"{kind}_ci95"]
            value = row[kind]
            axes[2].bar(place + shift, value, 0.33, color=colour, yerr=[[value - low], [high - value]], capsize=2)
        axes[2].hlines(row["chance"], place - 0.2, place + 0.55, colors="k", linestyles=":", lw=1)
    names = [f"{r['suite']}, {r['probe'].split(', ')[1]}, seed {r['seed']}" for r in found["rows"]]
    axes[2].set_xticks([i + 0.18 for i in range(len(names))], names, fontsize=7, rotation=40, ha="right")
    axes[2].set(title="Grey: random init, blue: pretrained\n(95 % intervals, dotted: chance)", ylim=(0, 1))
    axes[2].title.set_fontsize(9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
