"""Kill runs at random moments, go on, and hold what comes out against an uninterrupted run, bit by bit.

    python tests/faults/kill.py --runs 2 --kills 5 --mutations 500

For each setting of `SETTINGS` one run goes through, and ``--runs`` are killed with SIGKILL at random moments (half of
them as soon as a checkpoint is being written) ``--kills`` times each, then go on to their end; of two ranks both are
killed. Then checkpoints are mutated at random (mutations.py) and read. Results are written after each setting. With
``--runs 0`` or ``--mutations 0`` that part is left out, and what the results file has of it stays. Exit code 1 where a
row, a weight or a moment differs, or a mutated checkpoint gives anything but a clear error.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.faults.conftest import rows, tiny
from tests.faults.mutations import attempt, mutated
from vjepa_fast import __version__
from vjepa_fast.config.schema import Config
from vjepa_fast.data.synthetic import render_suite
from vjepa_fast.files import write_json
from vjepa_fast.trainer import checkpoint, train

PARTS = ("encoder", "predictor", "target_encoder", "heads")
SETTINGS = {  # (workers, ranks, batches per step, images)
    "no workers": (0, 1, 1, False),
    "two workers": (2, 1, 1, False),
    "accumulation": (1, 1, 2, False),
    "images and videos": (1, 1, 1, True),
    "two ranks": (0, 2, 1, False),
}
COUNTS = ("runs", "kills", "kills_during_a_save", "runs_that_differ")
EPOCHS = 8  # of 4 steps, saved at every second step
LAZY = ("av", "vjepa_fast.data.decoders", "vjepa_fast.objectives", "vjepa_fast.masks")  # what a run imports later
WAIT_S = 600.0  # for a process that does nothing


def setting(name: str, data: dict[str, Path], folder: Path) -> tuple[Config, int]:
    """(configuration, ranks) of a run."""
    workers, ranks, accumulate, images = SETTINGS[name]
    cfg = tiny(data["videos"], folder)
    cfg = dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, num_workers=workers),
        optimization=dataclasses.replace(cfg.optimization, epochs=EPOCHS, accumulate=accumulate),
        runtime=dataclasses.replace(cfg.runtime, peak_tflops=1.0),  # not measured at each start
    )
    if images:
        still = dataclasses.replace(cfg.data, datasets=(str(data["images"]),), dataset_fpcs=(1,), batch_size=2)
        cfg = dataclasses.replace(cfg, img_data=still)
    return cfg, ranks


def rank(cfg: Config, number: int, ranks: int, port: int) -> None:
    """One process of a run, as torchrun starts it; what it says goes beside the run folder."""
    log = os.open(f"{cfg.folder}.{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if ranks > 1:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    train(cfg)


def start(cfg: Config, ranks: int) -> list[multiprocessing.Process]:
    """The processes of a run, made by forking one that has imported everything."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=rank, args=(cfg, n, ranks, port)) for n in range(ranks)]
    for process in processes:
        process.start()
    return processes  # pyright: ignore[reportReturnType]  # of a context


def killed_once(cfg: Config, ranks: int, rng: random.Random) -> tuple[bool, bool]:
    """Start, or go on, and kill at a random moment: (whether before its end, whether it was writing a checkpoint)."""
    folder = Path(cfg.folder) / "checkpoints"
    known = set(folder.glob("step-*.pt"))
    processes = start(cfg, ranks)
    own = f".step-*.{processes[0].pid}.tmp"  # what one before left half-written has its number
    end = time.monotonic() + WAIT_S
    writing = rng.random() < 0.5
    while processes[0].is_alive() and time.monotonic() < end:
        if list(folder.glob(own)) if writing else set(folder.glob("step-*.pt")) - known:
            break
        time.sleep(0.002)
    if not writing:
        time.sleep(rng.random() * 0.3)
    early = processes[0].is_alive()
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    return early, bool(list(folder.glob(own)))


def finished(cfg: Config, ranks: int) -> Path:
    """Let a run go to its end; its last checkpoint."""
    processes = start(cfg, ranks)
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        logs = "\n".join(p.read_text() for p in sorted(Path(cfg.folder).parent.glob(f"{Path(cfg.folder).name}.*.log")))
        raise RuntimeError(f"{cfg.folder}: did not go on:\n{logs}")
    found = checkpoint.latest(cfg.folder)
    assert found is not None and checkpoint.step_of(found) == 4 * EPOCHS
    return found


def same(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same bits, but for paths and what depends on the clock."""
    x, y = checkpoint.load(a), checkpoint.load(b)
    equal = all(torch.equal(v, y[part][k]) for part in PARTS for k, v in x[part].items())
    moments = zip(x["opt"]["state"].values(), y["opt"]["state"].values(), strict=True)
    return (
        equal
        and x["sampler"] == y["sampler"]
        and all(torch.equal(torch.as_tensor(v), torch.as_tensor(q[k])) for p, q in moments for k, v in p.items())
    )


def killed(name: str, data: dict[str, Path], place: Path, rng: random.Random, runs: int, kills: int) -> dict[str, int]:
    """Counts of one setting."""
    cfg, ranks = setting(name, data, place / "whole")
    last, expected = finished(cfg, ranks), rows(cfg.folder)
    found = {"runs": runs, "kills": 0, "kills_during_a_save": 0, "runs_that_differ": 0}
    for run in range(runs):
        mine = dataclasses.replace(cfg, folder=str(place / f"run{run}"))
        for _ in range(kills):
            early, during = killed_once(mine, ranks, rng)
            found["kills"] += early
            found["kills_during_a_save"] += early and during
        fine = same(finished(mine, ranks), last) and rows(mine.folder) == expected
        found["runs_that_differ"] += not fine
        print(f"{name}, run {run}: {found['kills']} kills so far, {'equal' if fine else 'DIFFERS'}", flush=True)
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return found


def mutations(number: int, data: dict[str, Path], place: Path) -> tuple[dict[str, int], list[str]]:
    """(how many were read or refused, what else happened)."""
    outcomes, strange = collections.Counter[str](), list[str]()
    train(tiny(data["videos"], place / "run"), max_steps=4)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # what the runs say
    for seed in range(number):
        shutil.rmtree(place / "copy", ignore_errors=True)
        shutil.copytree(place / "run", place / "copy")
        path = place / "copy" / "checkpoints" / "step-00000004.pt"
        what = mutated(path, seed)
        outcome = attempt(tiny(data["videos"], place / "copy"), path)
        outcomes[outcome if outcome in ("read", "refused") else "other"] += 1
        if outcome not in ("read", "refused"):
            strange.append(f"{seed}: {what}: {outcome}")
            print(strange[-1], flush=True)
        if seed % 50 == 49:
            print(f"{seed + 1} mutations: {dict(outcomes)}", flush=True)
    return dict(sorted(outcomes.items())), strange


def main() -> int:
    """Run it and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=2, help="that are killed, of each setting")
    parser.add_argument("--kills", type=int, default=5, help="of each run")
    parser.add_argument("--mutations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(SETTINGS), help="settings, with commas between them")
    parser.add_argument("--out", default=str(Path(__file__).with_name("results.json")))
    args = parser.parse_args()
    torch.set_num_threads(1)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["__main__", "vjepa_fast.trainer.trainer", *LAZY])
    place, out = Path(tempfile.mkdtemp()), Path(args.out)
    about = {
        "command": f"python tests/faults/kill.py --runs {args.runs} --kills {args.kills} --mutations {args.mutations}",
        "package": __version__,
        "torch": torch.__version__,
    }
    found = json.loads(out.read_text()) if out.exists() else {}
    wrong = False
    try:
        splits, options = {"train": 8}, {"size": 32, "seed": 0, "workers": 1}
        data = {
            "videos": render_suite("motion8", place / "videos", splits=splits, frames=8, **options)["train"],
            "images": render_suite("objects", place / "images", splits=splits, **options)["train"],
        }
        (place / "runs").mkdir()
        settings: dict[str, dict[str, int]] = {}
        for name in args.only.split(",") if args.runs else ():
            rng = random.Random(f"{args.seed} {name}")
            settings[name] = killed(name, data, place / "runs", rng, args.runs, args.kills)
            total = {key: sum(counts[key] for counts in settings.values()) for key in COUNTS}
            found["kills"] = {**about, **total, "settings": settings}
            write_json(out, found)
            wrong = wrong or total["runs_that_differ"] > 0
        if args.mutations:
            outcomes, strange = mutations(args.mutations, data, place)
            found["mutations"] = {**about, "mutations": args.mutations, "outcomes": outcomes, "strange": strange}
            wrong = wrong or bool(strange)
            write_json(out, found)
        print(json.dumps(found))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
