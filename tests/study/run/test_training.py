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


def test_cost_has_the_flop_of_all_steps(tmp_path):
    cfg = config.load("demo_baseline_single", [f"folder={tmp_path}"])
    rows = [{"step": s, "loss": 1.0, "clips_per_s": 24.0, "step_flops": f} for s, f in ((5, 10), (10, 20))]
    cost, _ = cells.of_metrics(cfg, rows)
    assert cost["flops"] == 5 * 10 + 5 * 20 and cost["minutes"] == pytest.approx(10 / 60, abs=1e-3)
    del rows[0]["step_flops"]  # of a run that began before they were recorded
    assert cells.of_metrics(cfg, rows)[0]["flops"] is None
