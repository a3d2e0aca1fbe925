"""Kill runs at random moments, go on, and hold what comes out against an uninterrupted run, bit by bit.

    python tests/faults/kill.py --runs 20 --out tests/faults/results.json

Each run is killed with SIGKILL at random moments (half of them as soon as a checkpoint is being written) until it was
killed ``--kills`` times, then goes on to its end. Then checkpoints are mutated at random (mutations.py) and read. Exit
code 1 where a row or a weight differs, or a mutated checkpoint gives anything but a clear error.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.faults.conftest import rows, start, tiny
from tests.faults.mutations import attempt, mutated
from vjepa_fast import __version__
from vjepa_fast.data.synthetic import render_suite
from vjepa_fast.files import write_json
from vjepa_fast.trainer import checkpoint, train


def length(cfg, epochs: int):
    """``cfg`` with so many epochs of 4 steps, saved at every second step."""
    import dataclasses

    return dataclasses.replace(cfg, optimization=dataclasses.replace(cfg.optimization, epochs=epochs))


def killed_once(cfg, rng: random.Random) -> tuple[bool, float]:
    """Start, or go on, and kill at a random moment: (whether it was killed before its end, seconds after its start)."""
    began, folder = time.monotonic(), Path(cfg.folder) / "checkpoints"
    process = start(cfg)
    if rng.random() < 0.5:  # while a checkpoint is being written
        while process.poll() is None and not list(folder.glob(".step-*.tmp")):
            pass
    else:
        begun = time.monotonic()
        known = len(list(folder.glob("step-*.pt")))
        while process.poll() is None and len(list(folder.glob("step-*.pt"))) == known and time.monotonic() < begun + 60:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.3)
    early = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return early, time.monotonic() - began


def same(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same bits, but for paths and what depends on the clock."""
    x, y = checkpoint.load(a), checkpoint.load(b)
    parts = ("encoder", "predictor", "target_encoder", "heads")
    equal = all(torch.equal(v, y[part][k]) for part in parts for k, v in x[part].items())
    moments = zip(x["opt"]["state"].values(), y["opt"]["state"].values(), strict=True)
    return equal and all(
        torch.equal(torch.as_tensor(v), torch.as_tensor(q[k])) for p, q in moments for k, v in p.items()
    )


def main() -> int:
    """Run it and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=3, help="of each run")
    parser.add_argument("--mutations", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(Path(__file__).with_name("results.json")))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, place = random.Random(args.seed), Path(tempfile.mkdtemp())
    try:
        splits = {"train": 8}
        manifest = render_suite("motion8", place / "data", splits=splits, size=32, frames=8, seed=0, workers=1)["train"]
        whole = length(tiny(manifest, place / "whole"), 20)
        last = train(whole).checkpoint
        expected, kills, differing, during = rows(whole.folder), 0, 0, 0
        for run in range(args.runs):
            cfg = length(tiny(manifest, place / f"run{run}"), 20)
            for _ in range(args.kills):
                kills += killed_once(cfg, rng)[0]
                during += bool(list((Path(cfg.folder) / "checkpoints").glob(".step-*.tmp")))
            result = train(cfg)
            fine = rows(cfg.folder) == expected and same(result.checkpoint, last)
            differing += not fine
            print(f"run {run}: killed {kills} times in all, {'equal' if fine else 'DIFFERS'}", flush=True)
            shutil.rmtree(cfg.folder)
        outcomes, strange = collections.Counter[str](), list[str]()
        train(tiny(manifest, place / "run"), max_steps=4)
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # what the runs say
        for seed in range(args.mutations):
            shutil.rmtree(place / "copy", ignore_errors=True)
            shutil.copytree(place / "run", place / "copy")
            path = place / "copy" / "checkpoints" / "step-00000004.pt"
            what = mutated(path, seed)
            outcome = attempt(tiny(manifest, place / "copy"), path)
            outcomes[outcome if outcome in ("read", "refused") else "other"] += 1
            if outcome not in ("read", "refused"):
                strange.append(f"{seed}: {what}: {outcome}")
                print(strange[-1], flush=True)
        found = {
            "command": " ".join(["python", "tests/faults/kill.py", *sys.argv[1:]]),
            "package": __version__,
            "torch": torch.__version__,
            "runs": args.runs,
            "kills": kills,
            "kills_during_a_save": during,
            "runs_that_differ": differing,
            "mutations": args.mutations,
            "outcomes": dict(sorted(outcomes.items())),
            "strange": strange,
        }
        write_json(args.out, found)
        print(json.dumps(found))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return int(bool(differing or strange))


if __name__ == "__main__":
    sys.exit(main())
