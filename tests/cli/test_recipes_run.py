"""All published recipes: at full size on the meta device, and one real step at a small size on real files."""

import json
import math

import pytest

from vjepa_fast import cli, config, trainer
from vjepa_fast.data.synthetic import render_suite

RUNS = [name for name in config.list_recipes() if name.startswith(("mixed_", "ucf101_", "synth_"))]
SMALL = [
    "model.model_name=vit_tiny",
    "model.embed_dim=48",
    "model.num_heads=3",
    "model.depth=4",
    "model.pred_depth=4",
    "model.pred_embed_dim=48",
    "model.pred_num_heads=2",
    "data.crop_size=64",
    "data.batch_size=2",
    "data.num_workers=0",
    "runtime.dtype=float32",
    "runtime.device=cpu",
    "runtime.tensorboard=false",
    "runtime.log_every=1",
]


@pytest.fixture(scope="module")
def manifests(tmp_path_factory):
    """Videos and still images under the names that the recipes give their datasets."""
    folder = tmp_path_factory.mktemp("suites")
    few = {"train": 8}
    videos = render_suite("motion8", folder / "motion8", splits=few, size=64, frames=32, fps=16, seed=0, workers=1)
    images = render_suite("objects", folder / "objects", splits=few, size=64, seed=0, workers=1)
    return {
        "ucf101.csv": videos["train"],
        "ssv2.csv": videos["train"],
        "synth.csv": videos["train"],
        "imagenet100.csv": images["train"],
    }


def small(name, manifests, folder, *overrides):
    """The recipe with its own datasets, masks and objectives, at a size that a laptop steps through at once."""
    cfg = config.load(name)
    datasets = json.dumps([str(manifests[d]) for d in cfg.data.datasets])
    return config.load(name, [*SMALL, f"data.datasets={datasets}", f"folder={folder}", *overrides])


def test_all_published_runs_are_here():
    assert len(RUNS) == 35


@pytest.mark.parametrize("name", RUNS)
def test_builds_at_full_size(name):
    checked = trainer.check(config.load(name))
    encoder, predictor, plan = checked.encoder, checked.predictor, checked.plan
    sizes = [sum(p.numel() for p in module.parameters()) for module in (encoder, predictor)]
    assert (encoder.embed_dim, encoder.levels) == (768, 4) and 85e6 < sizes[0] < 90e6 and 5e6 < sizes[1] < 20e6
    assert {p.device.type for module in (encoder, predictor, plan) for p in module.parameters()} == {"meta"}
    assert set(plan.terms) == set(config.load(name).objectives)


def alike():
    """One run for each way to choose data, terms of the loss and masks; what numbers they have is checked above."""
    found = {}
    for name in RUNS:
        cfg = config.load(name)
        terms = {term: {k: v for k, v in of.items() if not isinstance(v, float)} for term, of in cfg.objectives.items()}
        masks = cfg.masks.strategy, [spec.motion_guided for spec in cfg.masks.specs]
        found.setdefault(repr((terms, masks, cfg.target.mode, cfg.target.stop_gradient)), name)
        found.setdefault((name.split("_")[0], cfg.img_data is None), name)
    return sorted(set(found.values()))


@pytest.mark.parametrize("name", alike())
def test_takes_one_step(name, manifests, tmp_path):
    cfg = small(name, manifests, tmp_path / "run")
    result = trainer.train(cfg, max_steps=1)
    row = result.last_metrics
    assert result.step == 1 and math.isfinite(row["loss"])
    assert set(row["terms"]) == set(cfg.objectives)
    assert all(math.isfinite(value) for value in row["terms"].values())
    assert math.isclose(row["loss"], sum(row["weights"][t] * row["terms"][t] for t in row["terms"]), rel_tol=1e-4)
    assert row["weights"]["context"] == 0  # step 0 of the published warm-up from step 15,000
    assert row["grad_norm"] > 0


@pytest.mark.parametrize("name", ["mixed_4gpu_fwm_hw_ld", "ucf101_4gpu_kinematic_anneal"])
def test_published_mode_takes_one_step(name, manifests, tmp_path):
    cfg = small(name, manifests, tmp_path / "run", "compat=published")
    row = trainer.train(cfg, max_steps=1).last_metrics
    assert set(row["terms"]) == set(cfg.objectives) and math.isfinite(row["loss"])


PUBLISHED_FILE = """
app: vjepa_2_1
nodes: 1
tasks_per_node: 1
mem_per_gpu: 20G
folder: {folder}
data:
  dataset_type: VideoDataset
  datasets: [{videos}, {images}]
  datasets_weights: [0.5, 0.5]
  batch_size: 2
  crop_size: 64
  patch_size: 16
  dataset_fpcs: [8, 16]
  tubelet_size: 2
  fps: null
  frame_sample_rate: 2
  num_workers: 0
  persistent_workers: false
data_aug: {{auto_augment: false, random_resize_aspect_ratio: [0.75, 1.35], random_resize_scale: [0.3, 1.0]}}
loss: {{loss_exp: 1.0, predict_all: true, shift_by_n: 0, weight_distance_loss: true}}
mask:
- {{num_blocks: 4, spatial_scale: [0.15, 0.15], temporal_scale: [1, 1], aspect_ratio: [0.75, 1.5], max_keep: null}}
- {{num_blocks: 2, spatial_scale: [0.5, 0.5], temporal_scale: [1, 1], aspect_ratio: [0.75, 1.5], motion_guided: true}}
meta: {{dtype: float32, seed: 239, load_checkpoint: false, read_checkpoint: null, use_sdpa: true}}
model:
  model_name: vit_tiny
  pred_depth: 4
  pred_embed_dim: 48
  pred_num_heads: 2
  use_rope: true
  interpolate_rope: true
  modality_embedding: true
  img_temporal_dim_size: 1
  uniform_power: true
  lambda_value_vid: 0.5
  lambda_value_img: 0.5
  lambda_progressive: false
optimization:
  ema: [0.99, 0.99]
  epochs: 1
  ipe: 2
  lr: 6e-4
  start_lr: 1.0e-4
  final_lr: 0.0006
  warmup: 0
  weight_decay: 0.04
  final_weight_decay: 0.04
  hw_coeff: 1.0
  hw_temp: 1.0
  ld_coeff: 1.0
  ld_hidden_dim: 32
  fwm_static_coeff: 0.05
  fwm_orth_coeff: 0.01
  fwm_app_ratio: 0.5
"""


def test_published_file_trains_from_the_command_line(manifests, tmp_path, caplog):
    path, folder = tmp_path / "published.yaml", tmp_path / "run"
    path.write_text(
        PUBLISHED_FILE.format(folder=folder, videos=manifests["ucf101.csv"], images=manifests["imagenet100.csv"])
    )
    overrides = ["--set", "model.depth=4", "--set", "runtime.log_every=1", "--set", "runtime.tensorboard=false"]
    assert cli.main(["train", str(path), "--device", "cpu", *overrides]) == 0
    assert "keys without effect here: nodes" in caplog.text
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert set(rows[0]["terms"]) == {"pred", "context", "hw", "fwm_static", "fwm_orth", "ld"}
    assert rows[0]["weights"]["context"] == 0.5  # lambda_progressive: false
    assert rows[0]["lr"] == pytest.approx(6e-4)
    assert config.load(folder).objectives == config.load(path).objectives
    assert (folder / "checkpoints" / "step-00000002.pt").is_file()


def test_a_moved_run_folder_goes_on_where_it_lies(manifests, tmp_path, capsys):
    assert cli.main(small_train(manifests, tmp_path / "old")) == 0
    (tmp_path / "old").rename(tmp_path / "new")
    assert cli.main(["train", str(tmp_path / "new"), "--max-steps", "2"]) == 0
    assert f"step 2: {tmp_path / 'new'}" in capsys.readouterr().out
    assert not (tmp_path / "old").exists()
    assert (tmp_path / "new" / "checkpoints" / "step-00000002.pt").is_file()


def small_train(manifests, folder):
    datasets = json.dumps([str(manifests["ucf101.csv"])])
    overrides = [part for text in [*SMALL, f"data.datasets={datasets}"] for part in ("--set", text)]
    return ["train", "ucf101_4gpu_baseline", "--folder", str(folder), "--max-steps", "1", *overrides]


def test_folder_that_cannot_be_made(manifests, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "run"
    assert cli.main(small_train(manifests, folder)) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {folder}") and err.count("\n") == 1
