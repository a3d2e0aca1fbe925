"""Clips per second of rendering and reading a synthetic suite: ``python benchmarks/data_reading.py [--json OUT]``.

Milliseconds are processor time of this process per clip, so that other load on the machine hardly counts; clips per
second are by the clock.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable

import numpy as np

from vjepa_fast.config.schema import Config, DataConfig, RuntimeConfig
from vjepa_fast.data import ClipLoader
from vjepa_fast.data.synthetic import SUITES, render_clip, render_suite
from vjepa_fast.files import write_json


def measure(what: str, number: int, work: Callable[[], object]) -> dict:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"what": what, "cpu_ms_per_clip": round(1e3 * cpu / number, 2), "clips_per_s": round(number / wall, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Clips per second of rendering and reading a synthetic suite.")
    parser.add_argument("--clips", type=int, default=160, help="clips rendered (default %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="pixels of each side (default %(default)s)")
    parser.add_argument("--frames", type=int, default=16, help="frames per clip (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="batches of 16 per setting (default %(default)s)")
    parser.add_argument("--json", metavar="OUT", help="also write the rows to a file")
    args = parser.parse_args()
    rows = [
        measure(
            f"draw {name}",
            args.clips,
            lambda name=name: [
                render_clip(name, np.random.default_rng(i), args.size, args.frames) for i in range(args.clips)
            ],
        )
        for name in SUITES
    ]
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        rows.append(
            measure(
                "draw motion8 and write H.264",
                args.clips,
                lambda: paths.update(
                    render_suite("motion8", folder, splits={"train": args.clips}, size=args.size, frames=args.frames)
                ),
            )
        )
        for workers, cache in ((0, 0), (2, 0), (0, 4000), (2, 4000)):
            data = DataConfig(
                datasets=(paths["train"],),
                dataset_fpcs=(args.frames,),
                batch_size=16,
                crop_size=args.size,
                num_workers=workers,
                cache_mb=cache,
            )
            with ClipLoader(Config(data=data, runtime=RuntimeConfig(device="cpu"))) as loader:
                for _ in range(args.clips // 16 + 2 if cache else 2):  # a whole epoch fills the cache
                    next(loader)
                rows.append(
                    measure(
                        f"read, crop, scale: {workers} threads, {'cached' if cache else 'from files'}",
                        16 * args.steps,
                        lambda loader=loader: [next(loader) for _ in range(args.steps)],
                    )
                )
    for row in rows:
        print(f"{row['what']:45s} {row['cpu_ms_per_clip']:7.2f} ms CPU/clip {row['clips_per_s']:9.1f} clips/s")
    if args.json:
        facts = {
            "machine": platform.machine(),
            "python": platform.python_version(),
            "size": args.size,
            "frames": args.frames,
            "rows": rows,
        }
        write_json(args.json, facts)


if __name__ == "__main__":
    main()
