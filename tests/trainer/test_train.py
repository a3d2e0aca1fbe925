"""Whole runs on rendered videos: resume, signals, failures, what lies in the run folder."""

import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from vjepa_fast import config as configs
from vjepa_fast.config import schema
from vjepa_fast.data.loader import ClipLoader
from vjepa_fast.data.synthetic import render_suite
from vjepa_fast.errors import CheckpointError, TrainingError, UserError
from vjepa_fast.models import load_encoder
from vjepa_fast.trainer import checkpoint, train
from vjepa_fast.trainer.step import TrainStep

from .. import forks
from .conftest import config

MASK = schema.MaskConfig()
VOLATILE = ("clips_per_s", "tokens_per_s", "step_flops", "mfu", "peak_memory_mb", "data_wait", "save_wait")


@pytest.fixture
def cfg(manifest, tmp_path):
    return config(tmp_path / "run", data={"datasets": (manifest,)}, runtime={"save_every": 3})


def rows(folder) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in VOLATILE} for row in found]


def with_(cfg, **sections):
    for name, values in sections.items():
        old = getattr(cfg, name)
        cfg = dataclasses.replace(
            cfg,
            **{
                name: dataclasses.replace(old, **values)
                if isinstance(values, dict) and dataclasses.is_dataclass(old)
                else values
            },
        )
    return cfg


def same_checkpoints(a, b):
    a, b = checkpoint.load(a), checkpoint.load(b)
    for name in ("encoder", "predictor", "target_encoder", "heads"):
        assert a[name].keys() == b[name].keys()
        assert all(torch.equal(v, b[name][k]) for k, v in a[name].items()), name
    for x, y in zip(a["opt"]["state"].values(), b["opt"]["state"].values()):
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(y[k])) for k, v in x.items())


def test_run_folder(cfg, tmp_path):
    seen = []
    cfg = with_(cfg, runtime={"log_every": 2, "monitor_every": 4, "tensorboard": True})
    result = train(cfg, on_log=seen.append)
    assert (result.step, result.folder) == (12, tmp_path / "run")
    assert result.checkpoint == tmp_path / "run" / "checkpoints" / "step-00000012.pt"
    assert [r["step"] for r in rows(result.folder)] == [2, 4, 6, 8, 10, 12] == [r["step"] for r in seen]
    assert result.last_metrics == seen[-1]
    row = seen[1]
    assert set(row) == {
        "step",
        "epoch",
        "loss",
        "terms",
        "weights",
        "lr",
        "wd",
        "ema",
        "grad_norm",
        "monitors",
        *VOLATILE,
    }
    assert (
        row["step_flops"] > 1e6
        and row["tokens_per_s"] > row["clips_per_s"] > 0
        and 0 < row["mfu"] < 1
        and row["peak_memory_mb"] > 10
    )
    assert set(row["terms"]) == set(row["weights"]) == {"pred", "context", "ld"}
    parts = [*(f"level{i}" for i in range(4)), "appearance", "dynamics"]
    by_part = {f"{k}/{p}" for k in ("rankme", "alpha_req", "mean_cosine", "feature_std") for p in parts}
    assert set(row["monitors"]) == {"rankme", "feature_std", "target_var"} | by_part and seen[0]["monitors"] == {}
    assert [r["epoch"] for r in seen] == [0, 0, 1, 1, 2, 2]
    told = configs.load(result.folder)  # resolves what the recipe left open, in the model section
    assert dataclasses.replace(told, model=cfg.model) == cfg
    versions = json.loads((result.folder / "versions.json").read_text())
    assert {"package", "torch", "python", "commit", "device"} <= set(versions)
    kept = sorted(p.name for p in (result.folder / "checkpoints").iterdir())
    assert kept == ["step-00000009.pt", "step-00000012.pt"]
    assert list((result.folder / "tensorboard").glob("events.*"))
    assert not (result.folder / "bad_samples.jsonl").exists()


def test_a_run_leaves_the_process_as_it_was(cfg):
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers, state, threads = [signal.getsignal(s) for s in signals], torch.get_rng_state(), torch.get_num_threads()
    train(with_(cfg, runtime={"threads": threads + 1}), max_steps=1)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert [signal.getsignal(s) for s in signals] == handlers
    broken = with_(cfg, data={"datasets": ("missing.csv",)}, runtime={"threads": threads + 1})
    with pytest.raises(UserError):
        train(broken, resume=False)
    assert torch.get_num_threads() == threads


def test_checkpoint_has_the_published_layout_and_loads_as_an_encoder(cfg):
    result = train(cfg, max_steps=2)
    data = torch.load(result.checkpoint, weights_only=True)
    assert set(data) == {*checkpoint.KEYS, "digests", "scaler"}
    for name in ("encoder", "predictor", "target_encoder"):
        assert all(k.startswith("module.backbone.") for k in data[name])
    assert {
        "module.backbone.patch_embed.proj.weight",
        "module.backbone.blocks.0.attn.qkv.weight",
        "module.backbone.norms_block.3.bias",
    } <= set(data["encoder"])
    assert {
        "module.backbone.predictor_blocks.0.attn.qkv.weight",
        "module.backbone.predictor_proj_context.weight",
    } <= set(data["predictor"])
    assert set(data["heads"]) == {f"heads.ld.{n}.{k}" for n in (0, 2) for k in ("weight", "bias")}
    assert (data["step"], data["epoch"]) == (2, 0)
    assert data["sampler"] == {"start_step": 2, "start_samples": [2 * cfg.data.batch_size]}
    assert data["config"] == configs.to_dict(cfg)
    step = TrainStep(cfg)
    step.load_state_dict(data)
    for which, module in (("target_encoder", step.target_encoder), ("encoder", step.encoder)):
        loaded = load_encoder(result.folder, which)
        assert all(torch.equal(v, module.state_dict()[k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"runtime": {"log_every": 4, "save_every": 3, "monitor_every": 5}},
        {"optimization": {"accumulate": 2}},
        {"data": {"num_workers": 2}},
        {"target": {"mode": "online"}},
        {"target": {"mode": "online"}, "objectives": {"pixels": {}}, "masks": {"strategy": "random", "specs": (MASK,)}},
        {"masks": {"truncate": "none"}},
    ],
)
def test_stopping_and_resuming_gives_the_same_run(cfg, tmp_path, change):
    """Stops in the middle of an epoch and of a log interval; a head, an anneal and the EMA ramp are all under way."""
    cfg = with_(cfg, **change)
    whole = train(cfg)
    parts = dataclasses.replace(cfg, folder=str(tmp_path / "parts"))
    # max_steps ends a log interval, a crash does not: cut the run where a checkpoint was left behind
    train(parts, max_steps=7)
    for path in checkpoint.all_in(parts.folder)[1:]:
        path.unlink()
    assert checkpoint.latest(parts.folder).name == "step-00000006.pt"
    torch.manual_seed(123)
    result = train(parts)
    assert rows(result.folder) == rows(whole.folder)
    same_checkpoints(result.checkpoint, whole.checkpoint)


RUN = """
import sys, time
import torch
torch.set_num_threads(1)
from vjepa_fast import config, trainer
cfg = config.load(sys.argv[1])
trainer.train(cfg, on_log=lambda row: time.sleep(float(sys.argv[2])))
"""


def start(cfg, folder, pause=0.0) -> forks.Forked:
    recipe = folder.parent / f"{folder.name}.yaml"
    recipe.write_text(configs.dump_yaml(dataclasses.replace(cfg, folder=str(folder))))
    return forks.Forked("-c", RUN, str(recipe), str(pause))


def wait_for_rows(process, folder, count):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate()[1])


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_kill_at_a_random_step_and_resume(cfg, tmp_path):
    cfg = with_(cfg, optimization={"epochs": 5}, runtime={"save_every": 2, "keep_checkpoints": 1})
    step = int.from_bytes(os.urandom(1), "big") % 14 + 3
    print("killed after row", step)
    killed = tmp_path / "killed"
    process = start(cfg, killed, pause=0.05)
    wait_for_rows(process, killed, step)
    while checkpoint.latest(killed) is None and process.poll() is None:  # it is written beside the steps
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = len(rows(killed))
    assert step <= before < 20
    process = start(cfg, killed)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"resuming {killed}" in err
    whole = train(cfg)
    assert rows(killed) == rows(whole.folder) and len(rows(killed)) == 20
    same_checkpoints(checkpoint.latest(killed), whole.checkpoint)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGTERM")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, None)])
def test_signals_save_and_stop(cfg, tmp_path, number, code):
    cfg = with_(cfg, optimization={"epochs": 50}, runtime={"save_every": 1000})
    folder = tmp_path / "stopped"
    process = start(cfg, folder, pause=0.05)
    wait_for_rows(process, folder, 4)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    if code is None:
        assert process.returncode != 0 and "KeyboardInterrupt" in err
    else:
        assert process.returncode == code, err
    found = checkpoint.load(folder)
    assert found["step"] == rows(folder)[-1]["step"] and f"saved {checkpoint.latest(folder)}" in err
    assert [r["step"] for r in rows(folder)] == list(range(1, found["step"] + 1))
    whole = train(cfg, max_steps=found["step"])
    assert rows(folder) == rows(whole.folder)


def test_non_finite_loss(cfg, monkeypatch):
    cfg = with_(cfg, runtime={"log_every": 4, "save_every": 3})
    train(cfg, max_steps=6)
    forward = TrainStep.forward
    names = []

    def poisoned(self, batch, index):
        state = forward(self, batch, index)
        if index == 8:  # the ninth step: noticed at the checkpoint after it, in the middle of an interval
            state.z[0][0] = state.z[0][0] * float("inf")
            names.extend(batch.groups[0].paths)
        return state

    monkeypatch.setattr(TrainStep, "forward", poisoned)
    with pytest.raises(TrainingError) as caught:
        train(cfg)
    text = str(caught.value)
    assert "step 9:" in text and "ld=" in text and all(n in text for n in names) and "\n" not in text
    assert checkpoint.latest(cfg.folder).name == "step-00000006.pt"
    report = json.loads((checkpoint.latest(cfg.folder).parent.parent / "failure.json").read_text())
    assert report["step"] == 9 and report["samples"] == names
    monkeypatch.undo()
    assert train(cfg).step == 12  # what was saved before goes on


def test_resume_choices(cfg, tmp_path):
    first = train(cfg, max_steps=4)
    assert train(cfg, max_steps=4).checkpoint == first.checkpoint  # nothing to do, nothing written twice
    assert len(rows(first.folder)) == 4
    other = dataclasses.replace(cfg, folder=str(tmp_path / "other"))
    from_file = train(other, resume=str(first.checkpoint), max_steps=6)
    assert [r["step"] for r in rows(from_file.folder)] == [5, 6]
    again = train(cfg, resume=False, max_steps=2)
    assert [r["step"] for r in rows(again.folder)] == [1, 2]
    assert len(rows(again.folder / "previous-1")) == 4
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        train(cfg, resume=str(tmp_path / "nothing.pt"))


@pytest.mark.parametrize(
    "change", [{"data": {"batch_size": 6}}, {"data": {"batch_size": 1}}, {"optimization": {"accumulate": 3}}]
)
def test_resume_with_other_batches_goes_on_at_the_next_sample(cfg, tmp_path, change, monkeypatch):
    """No sample is skipped or read again, also from a checkpoint that does not say how many were taken."""
    cfg = with_(cfg, runtime={"save_every": 2})
    train(cfg, max_steps=2)
    taken = 2 * cfg.data.batch_size
    old = checkpoint.load(cfg.folder)
    old["sampler"] = {"start_step": 2}
    positions, load = [], ClipLoader._load
    monkeypatch.setattr(ClipLoader, "_load", lambda self, n, *more: positions.append(n) or load(self, n, *more))
    for name, saved in (("new", None), ("old", old)):
        folder = tmp_path / name
        shutil.copytree(cfg.folder, folder)
        if saved is not None:
            checkpoint.save(folder, saved, 2)
        positions.clear()
        other = with_(cfg, folder=str(folder), **change)
        run = train(other, max_steps=3)
        size = other.data.batch_size * other.optimization.accumulate
        assert set(range(taken, taken + size)) <= set(positions) and min(positions) == taken
        assert checkpoint.load(run.checkpoint)["sampler"]["start_samples"] == [taken + size]


def test_resume_with_another_architecture_touches_nothing(cfg):
    result = train(cfg, max_steps=3)
    before = {p: p.read_bytes() for p in result.folder.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=r"step-00000003.pt: encoder.*architecture") as caught:
        train(with_(cfg, model={"embed_dim": 96}))
    assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in result.folder.rglob("*") if p.is_file()} == before


def test_changed_settings_are_told(cfg, capsys):
    train(cfg, max_steps=2)
    train(with_(cfg, optimization={"lr": 2e-3}), max_steps=4)
    assert "changed since: optimization.lr: 0.001 -> 0.002" in capsys.readouterr().err


def test_unwritable_folder(cfg, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train(dataclasses.replace(cfg, folder=str(tmp_path / "file" / "run")))


def test_bad_videos_are_replaced_and_listed(cfg, manifest, tmp_path):
    good = Path(manifest).read_text().splitlines()
    base = os.path.dirname(manifest)
    lines = [os.path.join(base, line) for line in good] + [f"{tmp_path / 'broken.mp4'} 0"]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "mixed.csv").write_text("\n".join(lines) + "\n")
    cfg = with_(cfg, data={"datasets": (str(tmp_path / "mixed.csv"),), "max_bad_fraction": 0.5})
    folder = train(cfg).folder
    listed = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert [os.path.basename(b["path"]) for b in listed] == ["broken.mp4"] and listed[0]["reason"]


def test_images_beside_videos(cfg, tmp_path):
    images = render_suite("objects", tmp_path / "objects", splits={"train": 8}, size=32, seed=0)["train"]
    data = dataclasses.replace(cfg.data, datasets=(images,), dataset_fpcs=(1,), batch_size=2)
    result = train(dataclasses.replace(cfg, img_data=data), max_steps=2)
    step = TrainStep(cfg)
    fresh = step.encoder.patch_embed_img.proj.weight.clone()
    step.load_state_dict(checkpoint.load(result.checkpoint))
    assert not torch.equal(step.encoder.patch_embed_img.proj.weight, fresh)


def test_no_step_to_make(cfg):
    with pytest.raises(UserError, match="no step"):
        train(cfg, max_steps=0)


def test_published_recipes_start(manifest, tmp_path):
    """The headline recipe, made small: the trainer needs to know nothing about its terms."""
    spec = schema.MaskConfig
    small = config(
        tmp_path / "run",
        data={"datasets": (manifest,)},
        compat="published",
        objectives={
            "pred": {},
            "hw": {},
            "context": {},
            "fwm_static": {"coeff": 0.05},
            "fwm_orth": {"coeff": 0.01},
            "ld": {"channels": "dynamics", "hard_weighting": 1.0},
        },
        masks={"specs": (spec(), spec(2, (0.7, 0.7)))},
        loss={"context_warmup": (15000, 30000)},
    )
    result = train(small, max_steps=2)
    assert result.last_metrics["weights"]["context"] == 0 and set(result.last_metrics["terms"]) == set(small.objectives)
