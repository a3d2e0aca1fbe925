"""A manifest without what cannot be read, by function and by `data check --write-clean`."""

import os
import shutil

import pytest

from vjepa_fast import cli
from vjepa_fast.data import load_manifest
from vjepa_fast.data.manifests.clean import write_clean
from vjepa_fast.errors import DataError


@pytest.fixture
def mixed(tmp_path, counter_video, broken):
    """Two good videos, one with a blank in its name, and two broken ones, listed relative to the manifest."""
    (tmp_path / "films").mkdir()
    for name in ("a.mp4", "b 7.mp4"):
        shutil.copy(counter_video, tmp_path / "films" / name)
    shutil.copy(broken["garbage"], tmp_path / "films" / "garbage.mp4")
    path = tmp_path / "all.csv"
    path.write_text("films/a.mp4 0\nfilms/garbage.mp4 1\nfilms/b 7.mp4 2\nfilms/missing.mp4 3\n")
    return path


def test_check_writes_what_can_be_read(mixed, tmp_path, capsys):
    out = tmp_path / "elsewhere" / "clean.csv"
    out.parent.mkdir()
    assert cli.main(["data", "check", str(mixed), "--speed", "0", "--write-clean", str(out)]) == 0
    assert f"{out}: 2 samples that can be read" in capsys.readouterr().out
    clean = load_manifest(out)
    assert [os.path.basename(p) for p in clean.paths] == ["a.mp4", "b 7.mp4"] and clean.labels.tolist() == [0, 2]
    assert all(os.path.isfile(p) for p in clean.paths)
    assert cli.main(["data", "check", str(out), "--speed", "0"]) == 0


def test_without_it_check_names_the_flag(mixed, capsys):
    assert cli.main(["data", "check", str(mixed), "--speed", "0"]) == 2
    assert "--write-clean OUT" in capsys.readouterr().err


def test_in_its_own_place_paths_stay_relative(mixed):
    manifest = load_manifest(mixed)
    assert write_clean(manifest, [manifest.paths[1], manifest.paths[3]], mixed) == 2
    assert mixed.read_text() == "films/a.mp4 0\nfilms/b 7.mp4 2\n"


def test_nothing_is_written_where_nothing_is_left(mixed, tmp_path):
    manifest = load_manifest(mixed)
    with pytest.raises(DataError, match="none of its 4 samples can be read"):
        write_clean(manifest, manifest.paths, tmp_path / "none.csv")
    assert not (tmp_path / "none.csv").exists()
