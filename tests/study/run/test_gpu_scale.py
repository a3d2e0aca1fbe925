import dataclasses

import pytest

from vjepa_fast import config
from vjepa_fast.cli import main
from vjepa_fast.study.run.plan import Grid, StudyPlan
from vjepa_fast.study.run.suites import Settings
from vjepa_fast.study.run.variants import DEFAULT


def plan(folder, **settings):
    return StudyPlan(folder, Settings(**settings), Grid(variants=("baseline", "ld"), seeds=(0,)))


def test_the_command_lists_the_larger_runs_and_their_cost(tmp_path, capsys):
    folder = tmp_path / "study"
    assert main(["study", "run", str(folder), "--scale", "gpu", "--seeds", "0", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count(" 8000 steps") == 2 * len(DEFAULT) and not folder.exists()
    cost = next(line for line in out.splitlines() if line.startswith("training"))
    runs, clips, pflop, hours, _ = cost.split()[1:]
    assert (int(runs), clips) == (2 * len(DEFAULT), "192,000")
    # ViT-small, 392 tokens: 12 blocks of 24 N D^2 + 4 N^2 D and the patches' projection, 2.43 passes of training
    forward = 12 * (24 * 392 * 384**2 + 4 * 392**2 * 384) + 2 * (2 * 16 * 16 * 3) * 384 * 392
    assert float(pflop) == pytest.approx(192_000 * 2.43 * forward / 1e15, rel=0.01)
    assert float(hours) == pytest.approx(int(runs) * float(pflop) * 1e15 / (1e14 * 3600), rel=0.01)


def test_it_belongs_to_rendered_suites(capsys):
    assert main(["study", "run", "x", "--scale", "gpu", "--suite", "paper", "--dry-run"]) == 2
    assert "--scale gpu: belongs to --suite synthetic" in capsys.readouterr().err


def test_clips_are_rendered_larger_and_the_check_is_of_this_encoder(tmp_path):
    study = plan(tmp_path, recipe="gpu_study", size=128, device="cuda")
    setting = study.suite.setting()
    assert setting.values()["view"] == {"num_frames": 16, "crop_size": 112, "frame_step": 1}
    assert (setting.size, setting.encoder["embed_dim"], setting.device) == (128, 384, "cuda")
    cfg = config.from_dict(study.jobs[1]["config"])
    assert (cfg.runtime.dtype, cfg.data.batch_size, cfg.model.model_name) == ("bfloat16", 24, "vit_small")
    assert set(cfg.objectives) == {"pred", "context"}  # as published
    assert not plan(tmp_path / "laptop").suite.cost_lines(study.jobs)


def test_a_study_of_before_goes_on_and_is_not_mixed_with_the_larger_one(tmp_path):
    import json

    from vjepa_fast.errors import UserError

    plan(tmp_path).claim()
    path = tmp_path / "study.json"
    made = json.loads(path.read_text())
    del made["settings"]["recipe"]  # as plans were before there was a choice
    path.write_text(json.dumps(made))
    plan(tmp_path).claim()
    with pytest.raises(UserError, match=r"recipe \(laptop_study there, gpu_study now\)"):
        plan(tmp_path, recipe="gpu_study", size=128).claim()


def test_a_step_of_its_recipe(tmp_path):
    """One step, of a thin encoder on a CPU: masks, levels, heads and frames fit together."""
    from vjepa_fast.data.synthetic import render_suite
    from vjepa_fast.trainer import train

    found = render_suite("motion8", tmp_path / "clips", splits={"train": 8}, size=128, frames=16)
    cfg = config.load("gpu_study", ["runtime.dtype=float32", "runtime.device=cpu", "data.num_workers=0"])
    small = {"embed_dim": 48, "depth": 4, "num_heads": 3, "pred_embed_dim": 24, "pred_depth": 1, "pred_num_heads": 2}
    cfg = dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, datasets=(str(found["train"]),), datasets_weights=None, batch_size=2),
        model=dataclasses.replace(cfg.model, **small),
        optimization=dataclasses.replace(cfg.optimization, epochs=1, ipe=1, warmup=0),
        folder=str(tmp_path / "run"),
    )
    assert train(cfg).step == 1
