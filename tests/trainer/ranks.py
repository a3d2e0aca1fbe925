"""Several gloo processes of a run on this machine, in the environment that `torchrun` sets."""

import dataclasses
import os
import socket
from pathlib import Path

from vjepa_fast import config as configs
from vjepa_fast.data.synthetic import render_suite

from .. import forks
from .conftest import config

ROOT = Path(__file__).parents[2]


def environment(rank, world, port):
    """What torchrun sets."""
    numbers = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(n) for name, n in numbers.items()}}


def small(folder, clips=16, **sections):
    """A run of clips that are quick to read, by a model that is quick to train; no peak is measured."""
    manifest = render_suite(
        "motion8", folder / "data", splits={"train": clips}, size=32, frames=4, seed=0, form="rows"
    )["train"]
    model = {"embed_dim": 24, "depth": 2, "num_heads": 2, "pred_embed_dim": 24, "pred_depth": 1, "pred_num_heads": 2}
    own = {
        "data": {"datasets": (manifest,), "batch_size": 2},
        "model": {**model, "levels": 2},
        "runtime": {"peak_tflops": 1.0, "threads": 1},
    }
    return config(folder / "run", **{name: own.get(name, {}) | sections.get(name, {}) for name in {**own, **sections}})


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(cfg, tmp_path, name, script, world=2):
    """(configuration, exit codes, stderr, paths that ``script`` got as its second argument), of a run in ``name``."""
    (found,) = launch_all([(cfg, name, world)], tmp_path, script)
    return found


def launch_all(runs, tmp_path, script, timeout=600):
    """`launch` of each (configuration, name, number of processes), one after another."""
    return [_one(cfg, name, world, tmp_path, script, timeout) for cfg, name, world in runs]


def _one(cfg, name, world, tmp_path, script, timeout):
    cfg = dataclasses.replace(cfg, folder=str(tmp_path / name))
    recipe = tmp_path / f"{name}.yaml"
    recipe.write_text(configs.dump_yaml(cfg))
    outs = [tmp_path / f"{name}.{rank}.pt" for rank in range(world)]
    port = free_port()
    ranks = [
        forks.Forked("-c", script, str(recipe), str(out), env={**os.environ, **environment(rank, world, port)})
        for rank, out in enumerate(outs)
    ]
    try:
        errors = [rank.communicate(timeout)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return cfg, [rank.returncode for rank in ranks], errors, outs
