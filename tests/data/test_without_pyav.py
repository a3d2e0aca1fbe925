"""Row stores alone: written, trained on and evaluated where no decoder of videos is installed."""

import importlib.util
import sys
import zlib

import numpy as np
import pytest

from vjepa_fast import cli, config, trainer
from vjepa_fast.data import load_manifest, read_clip
from vjepa_fast.data.synthetic import SUITES, render_clip, render_suite
from vjepa_fast.errors import ConfigError, DataError

PLAN = {"splits": {"train": 6, "test": 2}, "size": 32, "frames": 8, "fps": 8, "seed": 3}


@pytest.fixture
def no_pyav(monkeypatch):
    """As on a machine without it: the import fails, and its place is not found."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "av" else real(name, *more))
    for name in [n for n in sys.modules if n == "av" or n.startswith("av.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "av", None)


def test_every_pixel_is_kept_and_images_are_as_ever(no_pyav, tmp_path):
    paths = render_suite("motion8", tmp_path / "rows", form="rows", **PLAN)
    manifest = load_manifest(paths["train"])
    assert len(manifest) == 6 and all(path.endswith(".rows") for path in manifest.paths)
    seeds = [3, zlib.crc32(b"motion8"), zlib.crc32(b"train")]
    for index, (path, label) in enumerate(zip(manifest.paths, manifest.labels, strict=True)):
        drawn, _, _ = render_clip("motion8", np.random.default_rng([*seeds, index]), 32, 8, label=int(label))
        assert np.array_equal(read_clip(path, 8, frame_step=1, start=0.0), drawn)
    still = render_suite("objects", tmp_path / "images", form="rows", **PLAN)["train"]
    assert all(path.endswith(".jpg") for path in load_manifest(still).paths)


def test_a_run_and_a_probe(no_pyav, tmp_path, capsys):
    paths = render_suite("motion8", tmp_path / "rows", form="rows", **{**PLAN, "splits": {"train": 16, "test": 16}})
    cfg = config.load(
        "demo_baseline_single",
        [
            *(f"data.datasets=[{paths['train']}]", "data.datasets_weights=null", "data.crop_size=36"),
            *("data.dataset_fpcs=[8]", "data.batch_size=4", "data.frame_sample_rate=1"),
            *("optimization.epochs=1", "optimization.ipe=2", f"folder={tmp_path / 'run'}"),
        ],
    )
    result = trainer.train(cfg, device="cpu")
    assert result.step == 2
    out = tmp_path / "probe.json"
    parts = ["--train", paths["train"], "--test", paths["test"], "--probes", "linear"]
    assert cli.main(["probe", str(tmp_path / "run"), *parts, "--json", str(out)]) == 0
    assert out.is_file()


def test_other_videos_are_refused_in_one_line(no_pyav, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"\0" * 100)
    with pytest.raises(DataError, match=r"a.mp4: cannot be read: no decoder .*pip install av"):
        read_clip(tmp_path / "a.mp4", 4)
    with pytest.raises(ConfigError, match="PyAV is not installed"):
        read_clip(tmp_path / "a.mp4", 4, decoder="pyav")


def test_a_folder_of_the_other_form_is_refused(tmp_path):
    render_suite("motion8", tmp_path / "a", form="rows", **PLAN)
    with pytest.raises(DataError, match="another form"):
        render_suite("motion8", tmp_path / "a", **PLAN)
    render_suite("motion8", tmp_path / "b", **PLAN)
    with pytest.raises(DataError, match="another form"):
        render_suite("motion8", tmp_path / "b", form="rows", **PLAN)
    with pytest.raises(ConfigError, match="form 'row' is not known; choose from mp4, rows"):
        render_suite(SUITES["motion8"], tmp_path / "c", form="row", **PLAN)


def test_command(tmp_path, capsys):
    assert cli.main(["synthetic", "motion8", str(tmp_path / "x"), "--train", "2", "--val", "0", "--test", "0",
                     "--size", "16", "--frames", "2", "--form", "rows"]) == 0  # fmt: skip
    assert (tmp_path / "x" / "train" / "000001.rows").is_file()
