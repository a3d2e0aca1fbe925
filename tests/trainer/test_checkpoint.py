"""Checkpoint files: atomic, pruned, refused with one line when they cannot be used or written."""

import os
import subprocess
import sys

import pytest
import torch

from vjepa_fast.errors import CheckpointError, UserError
from vjepa_fast.trainer import checkpoint


def state(step: int, size: int = 4) -> dict:
    """The least that is a training checkpoint."""
    return {
        "encoder": {"w": torch.full((size,), float(step))},
        **{part: {} for part in ("predictor", "target_encoder", "heads", "versions")},
        "opt": {"state": {}, "param_groups": []},
        "epoch": 0,
        "step": step,
        "sampler": {"start_step": step, "start_samples": [3 * step]},
        "rng": {"cpu": torch.get_rng_state()},
        "metrics": {"steps": [], "terms": [], "values": torch.zeros(0, 0), "monitors": {}},
        "config": {"data": {"batch_size": 3}},
    }


def test_round_trip_and_last_n_kept(tmp_path):
    for step in (1, 2, 10, 3):
        path = checkpoint.save(tmp_path, state(step), keep=2)
        assert path.name == f"step-{step:08d}.pt"
    assert [p.name for p in checkpoint.all_in(tmp_path)] == ["step-00000003.pt", "step-00000010.pt"]
    assert checkpoint.latest(tmp_path).name == "step-00000010.pt"
    loaded = checkpoint.load(tmp_path)
    assert loaded["step"] == 10 and torch.equal(loaded["encoder"]["w"], torch.full((4,), 10.0))
    assert set(os.listdir(tmp_path / "checkpoints")) == {"step-00000003.pt", "step-00000010.pt"}


def test_unfinished_files_are_not_taken_for_checkpoints_and_are_removed(tmp_path):
    checkpoint.save(tmp_path, state(1))
    half = tmp_path / "checkpoints" / ".step-00000002.pt.77.tmp"
    half.write_bytes(b"half")
    assert checkpoint.latest(tmp_path).name == "step-00000001.pt"
    checkpoint.remove_unfinished(tmp_path)
    assert not half.exists() and checkpoint.latest(tmp_path) is not None


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "damaged"), (b"not a zip", "damaged"), (None, "no such checkpoint")]
)
def test_unusable_file(tmp_path, content, words):
    path = tmp_path / "step-00000001.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_truncated_file(tmp_path):
    path = checkpoint.save(tmp_path, state(1, 10000))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)


def test_pickled_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "evil"),))

    torch.save({**state(1), "rng": Evil()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / "x.pt")
    assert not (tmp_path / "evil").exists()


def test_foreign_checkpoint(tmp_path):
    torch.save({"encoder": {}, "step": 3}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="predictor, target_encoder, heads, opt"):
        checkpoint.load(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        checkpoint.load(tmp_path)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written") as caught:
        checkpoint.save(tmp_path / "file" / "run", state(1))
    assert "\n" not in str(caught.value)


FULL = """
import resource, signal, sys
import torch
from vjepa_fast.errors import UserError
from vjepa_fast.trainer import checkpoint

def state(step, size=4):
    return {
        **{k: {} for k in checkpoint.KEYS}, "step": step, "epoch": 0, "encoder": {"w": torch.ones(size)},
        "opt": {"state": {}, "param_groups": []}, "sampler": {"start_step": step},
        "rng": {"cpu": torch.get_rng_state()},
        "metrics": {"steps": [], "terms": [], "values": torch.zeros(0, 0), "monitors": {}},
        "config": {"data": {"batch_size": 3}},
    }

checkpoint.save(sys.argv[1], state(1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save(sys.argv[1], state(2, 1_000_000))
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path):
    run = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "cannot be written" in run.stdout and len(run.stdout.strip().splitlines()) == 1
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001.pt"]
    assert checkpoint.load(tmp_path)["step"] == 1
