"""Several gloo processes of a run on this machine, in the environment that `torchrun` sets.

They are forks of one process that has imported what they need, which takes longer than what they do.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from vjepa_fast import config as configs
from vjepa_fast.data.synthetic import render_suite

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


def launch_all(runs, tmp_path, script, timeout=1500):
    """`launch` of each (configuration, name, number of processes), one after another."""
    jobs, out = [], []
    for cfg, name, world in runs:
        cfg = dataclasses.replace(cfg, folder=str(tmp_path / name))
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(configs.dump_yaml(cfg))
        outs = [tmp_path / f"{name}.{rank}.pt" for rank in range(world)]
        jobs.append([[str(recipe), str(path)] for path in outs])
        out.append((cfg, outs))
    asked = json.dumps({"script": script, "jobs": jobs})
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "tests.trainer.ranks"]
    done = subprocess.run(command, input=asked, env=env, text=True, timeout=timeout, capture_output=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    return [(cfg, codes, errors, outs) for (cfg, outs), (codes, errors) in zip(out, results, strict=True)]


def _main():
    asked = json.load(sys.stdin)
    import torch

    import vjepa_fast.trainer.trainer  # noqa: F401  # for the forks

    torch.set_num_threads(1)
    results = [_one(asked["script"], job) for job in asked["jobs"]]
    print(json.dumps(results), flush=True)


def _one(script, job):
    port, pids = free_port(), []
    for rank, args in enumerate(job):
        pid = os.fork()
        if pid == 0:
            _rank(script, args, environment(rank, len(job), port))
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return codes, [Path(args[1] + ".err").read_text() for args in job]


def _rank(script, args, env):
    code = 1
    try:
        with open(args[1] + ".err", "w") as err:
            os.dup2(err.fileno(), 2)
            os.dup2(err.fileno(), 1)
            os.environ.update(env)
            sys.argv = ["-c", *args]
            exec(compile(script, "script", "exec"), {"__name__": "__main__"})
            code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _main()
