"""Training a run of the study under torchrun."""

from pathlib import Path

import pytest

from tests.study.run.tiny import study
from vjepa_fast import config
from vjepa_fast.errors import UserError
from vjepa_fast.study.run import cells, training


def test_torchrun_trains_a_run_on_several_gpus(tmp_path, monkeypatch):
    made = study(tmp_path / "s", processes=4)
    job, commands = made.jobs[1], []
    assert made.jobs[0]["processes"] == 1 and job["processes"] == 4  # a control is not trained

    class Run:
        def __init__(self, command):
            commands.append(command)
            write()

        def wait(self):
            return 0

    class Failing(Run):
        def wait(self):
            return 1

    def write():
        path = Path(job["config"]["folder"]) / "checkpoints"
        path.mkdir(parents=True, exist_ok=True)
        (path / "step-00000004.pt").write_bytes(b"")

    monkeypatch.setattr(training.subprocess, "Popen", Run)
    assert cells._checkpoint(job).endswith("step-00000004.pt")
    cells._checkpoint(job)
    yaml = str(made.folder / "configs" / f"{job['key']}.yaml")
    wanted = "-m torch.distributed.run --standalone --nproc_per_node=4 -m vjepa_fast train " + yaml
    assert [c[1:] for c in commands] == [wanted.split()] * 2  # the second goes on
    assert config.load(yaml) == config.from_dict(job["config"])
    cells._checkpoint({**job, "config_hash": "another plan"})
    assert commands[-1][-1] == "--no-resume"
    monkeypatch.setattr(training.subprocess, "Popen", Failing)
    with pytest.raises(UserError, match="exit code 1"):
        cells._checkpoint(job)
