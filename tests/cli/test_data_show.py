"""``vjepa-fast data show`` and what ``data check`` says of the films: pictures, masks, codecs, speeds."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from vjepa_fast import config
from vjepa_fast.cli import _data_show, main
from vjepa_fast.data import ClipLoader, load_manifest
from vjepa_fast.data.synthetic import render_suite

SMALL = ["--set", "data.crop_size=64", "--set", "data.dataset_fpcs=[8]"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("motion8")
    return render_suite("motion8", folder, splits={"train": 6}, size=64, frames=16)["train"]


def test_a_sheet_shows_clips_and_masks(manifest, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert main(["data", "show", manifest, *SMALL, "--clips", "3", "--out", str(out)]) == 0
    assert f"3 clips of {manifest}: {out}" in capsys.readouterr().out
    with Image.open(out) as image:
        sheet = np.asarray(image)
    rows = 2 * _data_show._TEXT + 2 * _data_show._SIDE
    assert sheet.shape == (3 * rows, 8 * _data_show._SIDE, 3)
    for top in range(0, 3 * rows, rows):
        above, below = np.split(sheet[top + 2 * _data_show._TEXT : top + rows], 2)
        share = (above != below).any(-1).mean()
        assert 0.1 < share < 1 and above.std() > 10


def test_masks_are_where_the_tokens_are(manifest):
    cfg = config.load("mixed_4gpu_ld", [f"data.datasets=[{manifest}]", "data.datasets_weights=null", *SMALL[1::2]])
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch_size=2, num_workers=0), img_data=None)
    with ClipLoader(cfg) as loader:
        (group,) = next(loader).groups
    hidden = _data_show._hidden(cfg, group)
    assert hidden.shape == (2, 8, 64, 64) and set(np.unique(hidden)) >= {0, 1}
    tokens = hidden[:, ::2, ::16, ::16]
    assert (hidden == tokens.repeat(2, 1).repeat(16, 2).repeat(16, 3)).all()
    picture = np.full((64, 64, 3), 200, np.uint8)
    masked = _data_show._masked(picture, hidden[0, 0])
    assert (masked[hidden[0, 0] == 0] == 200).all() and (masked[hidden[0, 0] == 1] == 186).all()


def test_images_and_wrong_manifests(tmp_path, capsys):
    made = render_suite("objects", tmp_path / "objects", splits={"train": 4}, size=64)
    out = tmp_path / "sheet.jpg"
    assert main(["data", "show", made["train"], *SMALL[:2], "--clips", "2", "--out", str(out)]) == 0
    with Image.open(out) as image:
        assert image.format == "JPEG"
    assert main(["data", "show", str(tmp_path / "none.csv")]) == 2
    assert "no such manifest" in capsys.readouterr().err


def test_check_says_what_films_there_are(manifest, capsys):
    assert main(["data", "check", manifest, "--frames", "8", "--speed"]) == 0
    out = capsys.readouterr().out
    assert "6 x h264 64 x 64, 8 frames/s, 16 to 16 frames, a key frame every 8" in out
    assert "pyav: " in out and "clips/s of 8 frames on 2 threads, an epoch in " in out
    assert _data_show.contents(load_manifest(manifest)) != []
