"""Few-shot episodes on features in memory: seconds for 10,000 of them, drawing, products and classification included.

    python benchmarks/bench_fewshot.py [--classes 24] [--per-class 100] [--widths 768 3072] [--json PATH]

The protocols of vjepa_fast.evaluation.fewshot on random features with a planted class mean; prototypes by cosine, and
logistic regression (C = 1) on L2-normalised features and on features as they are, which is the hardest to fit. One row
per number of shots; medians of --repeats runs, with the CPU seconds (all threads) of a run beside them.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib
import statistics
import sys
import time

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from vjepa_fast.bench import results  # noqa: E402
from vjepa_fast.evaluation import Features  # noqa: E402
from vjepa_fast.evaluation.fewshot import episode_protocol, evaluate_episodes, sample_episodes  # noqa: E402

SHOTS = (1, 5)
CASES = {"prototype": ("prototype", {}), "logistic l2": ("logistic", {"l2": True}), "logistic": ("logistic", {})}


def features(classes: int, per_class: int, d: int) -> Features:
    """Class means of unit variance in noise six times as large: 5-way accuracies well between chance and 1."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(classes), per_class)
    return Features(rng.standard_normal((classes, d))[y] + 6 * rng.standard_normal((len(y), d)), y)


def evaluate(f: Features, shot: int, classifier: str, options: dict, episodes: int) -> float:
    protocol = episode_protocol("action", shots=(shot,), episodes=episodes)
    return evaluate_episodes(f, protocol, classifier, **options)[0].mean


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=24)
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 3072])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch (default: its own)")
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    shape, device = f"{args.classes} x {args.per_class}", torch.device("cpu")
    labels, fns = np.repeat(np.arange(args.classes), args.per_class), {}
    for shot in SHOTS:
        fns["drawing", f"{shot}-shot", shape] = functools.partial(sample_episodes, labels, 5, shot, 1, seed=0)
    for d in args.widths:
        f = features(args.classes, args.per_class, d)
        for (name, (classifier, options)), shot in itertools.product(CASES.items(), SHOTS):
            fns[name, f"{shot}-shot", f"{shape} x {d}"] = functools.partial(evaluate, f, shot, classifier, options)
    rows = []
    for (name, mode, what), fn in fns.items():
        fn(episodes=200)  # the first products of a process are slow
        wall, cpu, out = [], [], None
        for _ in range(args.repeats):
            began, busy = time.perf_counter(), time.process_time()
            out = fn(episodes=args.episodes)
            wall.append(1e3 * (time.perf_counter() - began))
            cpu.append(time.process_time() - busy)
        more = {"cpu_s": round(statistics.median(cpu), 3), "accuracy": out if isinstance(out, float) else None}
        rows.append(
            {
                **results.row(
                    wall,
                    None,
                    op=f"{args.episodes} episodes",
                    shape=what,
                    dtype="float32",
                    mode=mode,
                    provider=name,
                    peak_bytes=None,
                    **results.describe(device),
                ),
                **more,
            }
        )
    print("| classifier | features | shots | seconds | CPU seconds | accuracy |\n|---|---|---|--:|--:|--:|")
    for r in rows:
        accuracy = "" if r["accuracy"] is None else f"{100 * r['accuracy']:.1f} %"
        seconds = f"{r['median_ms'] / 1e3:.2f} | {r['cpu_s']:.2f}"
        print(f"| {r['provider']} | {r['shape']} | {r['mode']} | {seconds} | {accuracy} |")
    if args.json:
        results.write(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
