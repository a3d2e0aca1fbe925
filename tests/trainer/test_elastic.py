"""torchrun starts all processes again when one is killed, and the run goes on from its last checkpoint."""

import dataclasses
import json

from vjepa_fast import config as configs

from .. import forks
from .ranks import launch, small

TRAIN = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from vjepa_fast import config
from vjepa_fast.trainer import train

def killed(row):
    if row["step"] == 5 and os.environ["RANK"] == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        os.kill(os.getpid(), signal.SIGKILL)

train(config.load(sys.argv[1]), on_log=killed)
"""

# what the torchrun command does, with forks of this process
TORCHRUN = """
import sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
config = LaunchConfig(
    1, 1, 2, run_id="standalone", rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=1, start_method="fork"
)
elastic_launch(config, lambda: exec(sys.argv[2], {}))()
"""


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_killed_process_is_started_again_and_the_losses_are_the_same(tmp_path):
    cfg = small(tmp_path, optimization={"epochs": 2, "ipe": 4}, runtime={"save_every": 3, "timeout": 60.0})
    cfg = dataclasses.replace(cfg, folder=str(tmp_path / "killed"))
    _, codes, errors, _ = launch(dataclasses.replace(cfg, folder=str(tmp_path / "whole")), tmp_path, "whole", TRAIN)
    assert codes == [0, 0], errors
    (tmp_path / "killed.yaml").write_text(configs.dump_yaml(cfg))
    done = forks.run("-c", TORCHRUN, str(tmp_path / "killed.yaml"), TRAIN)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr and "at step 3" in done.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")  # to the bit
