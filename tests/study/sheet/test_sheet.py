"""The contact sheet: it shows the clips and masks of a training step, with the frames' true numbers."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vjepa_fast import config
from vjepa_fast.cli import main
from vjepa_fast.data import ClipLoader, load_manifest
from vjepa_fast.data.synthetic.write import write_video
from vjepa_fast.errors import DataError
from vjepa_fast.study.sheet.read import CONTEXT, PREDICTED, read_sheet
from vjepa_fast.trainer.building import build_samplers

SETTINGS = ["data.crop_size=32", "data.patch_size=8", "data.batch_size=3", "data.dataset_fpcs=[8]"]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Three films whose grey level is 6 x the frame number, at 25 fps, and one that is no film."""
    folder = tmp_path_factory.mktemp("films")
    levels = np.broadcast_to(6 * np.arange(40, dtype=np.uint8)[:, None, None, None], (40, 32, 32, 3)).copy()
    for name in "abc":
        write_video(folder / f"{name}.mp4", levels, fps=25, crf=1)
    (folder / "no.mp4").write_text("no film" * 99)
    (folder / "train.csv").write_text("a.mp4 0\nb.mp4 1\nc.mp4 2\nno.mp4 1\n")
    (folder / "classes.json").write_text('["run", "<jump>", "sit"]')
    return folder


def test_clips_numbers_and_masks_are_those_of_the_step(films):
    manifest, step = str(films / "train.csv"), 5
    extra = ["data.frame_sample_rate=2", "optimization.accumulate=2", "data.max_bad_fraction=0.5", "data.num_workers=1"]
    cfg = config.load(None, [*SETTINGS, *extra])
    sheet = read_sheet(cfg, manifest, clips=2, step=step)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, datasets=(manifest,)))
    with ClipLoader(cfg, start_step=2 * step) as loader:
        (group,) = next(loader).groups
    assert [clip.path for clip in sheet.clips] == group.paths[:2]
    enc, pred = build_samplers(cfg)[0](group.clip, step=step, first_sample=group.first_sample)
    for i, clip in enumerate(sheet.clips):
        assert np.array_equal(clip.frames, group.clip[i].permute(1, 2, 3, 0).numpy())
        assert clip.numbers is not None and clip.seconds is not None
        assert clip.numbers.tolist() == np.rint(clip.frames.reshape(8, -1).mean(1) / 6).astype(int).tolist()
        assert np.allclose(clip.seconds, clip.numbers / 25)
        assert clip.name == ["run", "<jump>", "sit"][clip.label] and "32 x 32 h264, 40 frames, 25" in clip.facts
        assert clip.masks.shape == (2, 4, 4, 4)
        for mask, context, predicted in zip(clip.masks.reshape(2, -1), enc, pred, strict=True):
            assert np.nonzero(mask == CONTEXT)[0].tolist() == context[i].tolist()
            assert np.nonzero(mask == PREDICTED)[0].tolist() == predicted[i].tolist()


def test_nothing_outside_of_the_root_of_the_recipe(films, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "train.csv").write_text(f"{films / 'a.mp4'} 0\n")
    cfg = config.load(None, [*SETTINGS, f"data.root={tmp_path / 'root'}"])
    with pytest.raises(DataError, match="a.mp4 lies outside of data.root"):
        read_sheet(cfg, str(tmp_path / "train.csv"))
    cfg = config.load(None, [*SETTINGS, f"data.root={films}", "data.num_workers=1", "data.batch_size=1"])
    (tmp_path / "train.csv").write_text("a.mp4 0\n")
    assert len(read_sheet(cfg, str(tmp_path / "train.csv")).clips) == 1


def test_page_and_picture(films, tmp_path, capsys):
    settings = [a for s in [*SETTINGS, "data.max_bad_fraction=0.5", "data.batch_size=6"] for a in ("--set", s)]
    page, picture = tmp_path / "sheet.html", tmp_path / "sheet.png"
    command = ["data", "show", str(films / "train.csv"), *settings, "--clips", "6"]
    assert main([*command, "--out", str(page)]) == 0
    assert "6 clips of step 0, 1 unreadable" in capsys.readouterr().out
    text = page.read_text()
    assert len(re.findall("<img", text)) == 18  # the clip and two masks of each
    assert "(&lt;jump&gt;)" in text and "no.mp4" in text and "unreadable or truncated" in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert main([*command, "--out", str(picture)]) == 0
    with Image.open(picture) as image:
        assert image.width > 1000 and len(np.unique(np.asarray(image))) > 50
    assert main([*command, "--out", str(tmp_path / "sheet.pdf")]) == 2
    assert ".html or .png" in capsys.readouterr().err


def test_images_by_the_image_stream_or_repeated(tiny_suites):
    manifest = tiny_suites["objects"]["train"]
    still = {"datasets": ["x"], "dataset_fpcs": [1], "batch_size": 2, "crop_size": 32, "patch_size": 8}
    for cfg, frames in (
        (config.load(None, SETTINGS), 8),
        (config.from_dict({"data": {"crop_size": 32, "patch_size": 8}, "img_data": still}), 1),
    ):
        clip = read_sheet(cfg, manifest, clips=1).clips[0]
        assert clip.frames.shape == (frames, 32, 32, 3) and clip.numbers is None and clip.facts == "image"
        assert clip.masks.shape[1:] == (max(1, frames // 2), 4, 4)
        assert clip.label == load_manifest(manifest).labels[load_manifest(manifest).paths.index(clip.path)]


def test_images_are_held_to_the_root_of_their_own_stream(tiny_suites, tmp_path):
    """The films of a recipe may lie elsewhere."""
    manifest = tiny_suites["objects"]["train"]
    whole = tmp_path / "whole.csv"
    whole.write_text("".join(f"{path} 0\n" for path in load_manifest(manifest).paths))
    still = {"datasets": ["x"], "dataset_fpcs": [1], "batch_size": 2, "crop_size": 32, "patch_size": 8}
    for root, fits in ((Path(manifest).parents[1], True), (tmp_path, False)):
        data = {"crop_size": 32, "patch_size": 8, "root": str(tmp_path)}
        cfg = config.from_dict({"data": data, "img_data": {**still, "root": str(root)}})
        if fits:
            assert len(read_sheet(cfg, str(whole), clips=1).clips) == 1
        else:
            with pytest.raises(DataError, match="lies outside of data.root"):
                read_sheet(cfg, str(whole), clips=1)
