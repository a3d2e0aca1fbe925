"""What saving costs a step: ViT-S/16 on noise, checkpoints that training waits for and those written beside it.

    python benchmarks/bench_saving.py                        # writes benchmarks/results/saving.json
    python benchmarks/bench_saving.py --threads 2 --rounds 9 # with more threads and rounds

Times are those of the clock and of the processor (all threads of the process together); the latter do not change with
what else the machine does. ``stands`` is the part of a save in which training stands still. Where no core is free for
the thread, all of a save is taken from the steps: with one every N steps its processor time is 1/N of the share given.
Medians over rounds.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vjepa_fast import __version__
from vjepa_fast import config as configs
from vjepa_fast.bench.cases import RECIPE, config_of
from vjepa_fast.bench.providers import Provider
from vjepa_fast.config.schema import RuntimeConfig
from vjepa_fast.files import write_json
from vjepa_fast.trainer import checkpoint
from vjepa_fast.trainer.distributed import Distributed
from vjepa_fast.trainer.run_folder import device_name
from vjepa_fast.trainer.saving import Saver, size_of
from vjepa_fast.trainer.step import TrainStep
from vjepa_fast.trainer.writer import RunLock

RESULTS = Path(__file__).resolve().parent / "results" / "saving.json"
GOAL = 0.05  # of a step, on average
Times = dict[str, float]


def timed(run: Callable[[], object]) -> Times:
    """Seconds of the clock and of the processor."""
    began, used = time.perf_counter(), time.process_time()
    run()
    return {"clock_s": time.perf_counter() - began, "processor_s": time.process_time() - used}


def state_of(step: TrainStep, number: int) -> dict:
    """What the trainer saves."""
    return {
        **step.state_dict(),
        "epoch": 0,
        "step": number,
        "sampler": {"start_step": number, "start_samples": [0]},
        "rng": checkpoint.rng_state(step.device),
        "metrics": {"steps": [], "terms": [], "values": torch.zeros(0, 0), "monitors": {}},
        "config": configs.to_dict(step.cfg),
        "versions": {},
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="vit_small")
    parser.add_argument("--crop", type=int, default=112)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default=str(RESULTS))
    args = parser.parse_args()
    overrides = [f"model.model_name={args.model}", f"data.crop_size={args.crop}", f"data.batch_size={args.batch}"]
    provider = Provider("vjepa_fast", config_of(RECIPE, overrides, device=args.device, threads=args.threads))
    step, found = provider.ours, dict[str, list[Times]]()
    assert step is not None

    def one(batch: object, index: int) -> None:
        provider.step(batch, index)
        if step.device.type == "cuda":
            torch.cuda.synchronize(step.device)

    with tempfile.TemporaryDirectory(dir=Path.cwd()) as place:  # on the disk that runs are written to
        folder, world = Path(place), Distributed()
        ways = {
            way: Saver(folder, world, RunLock(folder), RuntimeConfig(async_save=behind))
            for way, behind in (("waiting", False), ("beside", True))
        }
        for number in range(args.rounds + 1):
            batch = provider.prepare(number)
            times = {"step": timed(lambda batch=batch, number=number: one(batch, number))}
            for way, saver in ways.items():
                stands = timed(lambda saver=saver, n=number: saver.save(n, state_of(step, n)))
                rest = timed(saver.settle)
                times[f"{way}_stands"] = stands
                times[way] = {key: stands[key] + rest[key] for key in stands}
            if number:  # the first allocates
                for name, of in times.items():
                    found.setdefault(name, []).append(of)
                print(number, {name: {k: round(v, 2) for k, v in of.items()} for name, of in times.items()}, flush=True)
        size = size_of(state_of(step, 0))
    middle = {
        name: {key: statistics.median(t[key] for t in times) for key in times[0]} for name, times in found.items()
    }
    of_a_step = {name: middle[name]["processor_s"] / middle["step"]["processor_s"] for name in middle if name != "step"}
    every = {name: max(1, math.ceil(share / GOAL)) for name, share in of_a_step.items()}
    given = [
        f"--{key} {value}" for key, value in vars(args).items() if key != "out" and value != parser.get_default(key)
    ]
    result = {
        "command": " ".join(["python benchmarks/bench_saving.py", *given]),
        "package": __version__,
        "torch": torch.__version__,
        "device": device_name(torch.device(args.device)),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "model": args.model,
        "clips": [args.batch, 16, args.crop, args.crop],
        "rounds": args.rounds,
        "checkpoint_mb": round(size / 1e6, 1),
        "times": {name: {key: round(value, 3) for key, value in of.items()} for name, of in middle.items()},
        "of_a_step": {name: round(share, 3) for name, share in of_a_step.items()},
        "steps_between_saves_for_5_percent": every,
    }
    write_json(args.out, result)
    print(result)


if __name__ == "__main__":
    main()
