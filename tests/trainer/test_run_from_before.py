"""A run folder written by version 0.1.0 (before modules moved to their rooms) goes on as it would have then.

tests/goldens/run_before_rooms holds the folder after two steps, its clips, and what that version made of the next two.
"""

import hashlib
import json
import pathlib
import shutil

import pytest
import torch

from vjepa_fast import config as configs
from vjepa_fast.models import load_encoder
from vjepa_fast.trainer import train

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "run_before_rooms"
PARTS = ("encoder", "predictor", "target_encoder", "heads")


def digest(state):
    h = hashlib.sha256()
    for part in PARTS:
        for name, tensor in sorted(state[part].items()):
            h.update(name.encode())
            h.update(tensor.contiguous().numpy().tobytes())
    return h.hexdigest()


def same_machine(expected):
    """Bits are promised where torch and the CPU are those that wrote the golden; elsewhere rounding may differ."""
    from vjepa_fast.trainer.run_folder import device_name

    told = json.loads((GOLDEN / "run" / "versions.json").read_text())
    return expected["torch"] == torch.__version__ and told["device"] == device_name(torch.device("cpu"))


def test_it_goes_on(tmp_path, monkeypatch):
    expected = json.loads((GOLDEN / "expected.json").read_text())
    shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    result = train(configs.load("run"), max_steps=4)
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    state = torch.load(result.checkpoint, weights_only=True)
    if same_machine(expected):
        assert digest(state) == expected["sha256"]
        assert [{k: row[k] for k in want} for row, want in zip(rows[2:], expected["rows"])] == expected["rows"]
    for row, want in zip(rows[2:], expected["rows"]):
        assert row["loss"] == pytest.approx(want["loss"], rel=1e-4)
        assert row["terms"] == pytest.approx(want["terms"], rel=1e-3)
        assert {k: row[k] for k in ("lr", "wd", "ema", "weights")} == {
            k: want[k] for k in ("lr", "wd", "ema", "weights")
        }
    for part, want in expected["abs_sums"].items():
        assert float(sum(v.double().abs().sum() for v in state[part].values())) == pytest.approx(want, rel=1e-4)


def test_nothing_is_reported_as_changed(tmp_path, monkeypatch, capsys):
    shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    train(configs.load("run"), max_steps=3)
    said = capsys.readouterr()
    assert "resuming" in said.out + said.err
    assert "changed since" not in said.out + said.err


def test_its_encoder_loads_without_the_trainer(tmp_path):
    encoder = load_encoder(GOLDEN / "run")
    saved = torch.load(GOLDEN / "run" / "checkpoints" / "step-00000002.pt", weights_only=True)["target_encoder"]
    assert all(torch.equal(v, saved[f"module.backbone.{k}"]) for k, v in encoder.state_dict().items())
