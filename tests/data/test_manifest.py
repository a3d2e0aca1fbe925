"""Manifests, and making and checking them from folders."""

import json
import os
import shutil
from pathlib import Path

import pytest

from vjepa_fast.cli import main
from vjepa_fast.data import load_manifest
from vjepa_fast.data.manifests.check import check_manifest
from vjepa_fast.data.manifests.scan import group_of, scan_folder
from vjepa_fast.errors import DataError, UserError


def test_separators_quotes_blanks_and_relative_paths(tmp_path):
    file = tmp_path / "m.csv"
    lines = ("a/one.mp4 3", "", '"two words.mp4" 0', "three::1", "/abs/four.mp4\t2", "five,x.mp4,4", "six.mp4, 5")
    file.write_text("\n".join([*lines, '"s,7.mp4 12", 6', '"""8"".mp4" 7', "take 9 8"]))
    manifest = load_manifest(file)
    assert manifest.paths == [
        str(tmp_path / "a/one.mp4"),
        str(tmp_path / "two words.mp4"),
        str(tmp_path / "three"),
        "/abs/four.mp4",
        str(tmp_path / "five,x.mp4"),
        str(tmp_path / "six.mp4"),
        str(tmp_path / "s,7.mp4 12"),
        str(tmp_path / '"8".mp4'),
        str(tmp_path / "take 9"),
    ]
    assert manifest.labels.tolist() == [3, 0, 1, 2, 4, 5, 6, 7, 8] and manifest.labels.dtype == "int64"
    assert (manifest.name, manifest.kind, len(manifest)) == ("m", "video", 9)


def test_relative_to_the_working_directory_if_only_there(tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    (tmp_path / "film.mp4").write_bytes(b"x")
    (tmp_path / "lists" / "m.csv").write_text("film.mp4 0\n")
    monkeypatch.chdir(tmp_path)
    assert load_manifest("lists/m.csv").paths == [str(tmp_path / "film.mp4")]
    (tmp_path / "lists" / "film.mp4").write_bytes(b"x")
    assert load_manifest("lists/m.csv").paths == [str(tmp_path / "lists" / "film.mp4")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("\n \n", "empty"),
        ("a.mp4\n", ":1: expected"),
        ("a.mp4 0\nb.mp4 cat\n", ":2: expected"),
        ("a.mp4 -1\n", "negative"),
        ("a.mp4 \u00b2\n", ":1: expected"),
        ("a.mp4 --3\n", ":1: expected"),
        ("a.mp4 99999999999999999999\n", ":1: expected"),
        ("a.mp4 163 1\n", ":1: more than two columns"),
        ("a.mp4,163,1\n", ":1: more than two columns"),
        ("0,a.mp4,1\n", ":1: more than two columns"),
        ("path,label\na.mp4,1\n", ":1: expected"),
    ],
)
def test_bad_manifests(tmp_path, text, message):
    file = tmp_path / "bad.csv"
    file.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        load_manifest(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_manifest_and_folder(tmp_path):
    with pytest.raises(DataError, match="no such manifest"):
        load_manifest(tmp_path / "none.csv")
    with pytest.raises(DataError, match="is a folder.*vjepa-fast data manifest"):
        load_manifest(tmp_path)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x81" * 9)
    with pytest.raises(DataError, match="cannot read"):
        load_manifest(tmp_path / "binary.csv")


def test_hash_follows_list_labels_and_files(tmp_path):
    film, file = tmp_path / "a.mp4", tmp_path / "m.csv"
    film.write_bytes(b"1")
    file.write_text("a.mp4 0\n")
    first = load_manifest(file).hash
    assert load_manifest(file).hash == first
    file.write_text("a.mp4 1\n")
    second = load_manifest(file).hash
    film.write_bytes(b"12")
    assert len({first, second, load_manifest(file).hash}) == 3


@pytest.fixture
def class_folders(tmp_path, tiny_suites):
    """DIR/<class>/<file>: 5 videos each of two classes, and something that is no video."""
    paths = load_manifest(tiny_suites["motion8"]["train"]).paths
    for i, path in enumerate(paths[:10]):
        folder = tmp_path / "films" / ("walk" if i % 2 else "jump high")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    (tmp_path / "films" / "walk" / "notes.txt").write_text("no video")
    (tmp_path / "films" / "walk" / ".film.mp4.123.tmp").write_text("a video being written")
    return tmp_path / "films"


def test_scan_gives_readable_manifests(class_folders, tmp_path):
    written = scan_folder(class_folders)
    assert written == {"train": {"path": str(class_folders / "train.csv"), "samples": 10, "classes": 2}}
    assert json.loads((class_folders / "classes.json").read_text()) == ["jump high", "walk"]
    moved = class_folders.rename(tmp_path / "moved")  # relative paths: the folder can move
    manifest = load_manifest(moved / "train.csv")
    assert all(map(os.path.isfile, manifest.paths))
    assert all(("walk" in p) == bool(y) for p, y in zip(manifest.paths, manifest.labels))
    assert check_manifest(manifest) == []


def test_scan_splits_every_class_and_is_repeatable(class_folders, tmp_path):
    out = tmp_path / "lists" / "own.csv"
    written = scan_folder(class_folders, out=out, val_fraction=0.2, test_fraction=0.4, absolute=True)
    assert {p: w["samples"] for p, w in written.items()} == {"train": 4, "val": 2, "test": 4}
    parts = {p: load_manifest(w["path"]) for p, w in written.items()}
    assert [len(set(m.labels.tolist())) for m in parts.values()] == [2, 2, 2]
    assert len(set().union(*(m.paths for m in parts.values()))) == 10
    names = {p.name for p in out.parent.iterdir()}
    assert names == {"own.csv", "own_val.csv", "own_test.csv", "own_classes.json"}
    before = out.read_text()
    assert before.startswith("/")
    scan_folder(class_folders, out=out, val_fraction=0.2, test_fraction=0.4, absolute=True)
    assert out.read_text() == before


def test_scan_of_ready_parts_and_loose_files(class_folders, tmp_path):
    shutil.copytree(class_folders, tmp_path / "parts" / "train")
    shutil.copytree(class_folders / "walk", tmp_path / "parts" / "test" / "walk")
    written = scan_folder(tmp_path / "parts")
    assert {p: w["samples"] for p, w in written.items()} == {"train": 10, "test": 5}
    assert load_manifest(written["test"]["path"]).labels.tolist() == [1] * 5  # numbered as in train
    with pytest.raises(DataError, match="already"):
        scan_folder(tmp_path / "parts", val_fraction=0.1)
    loose = scan_folder(class_folders / "walk")
    assert loose["train"]["samples"] == 5 and loose["train"]["classes"] == 1


def test_scan_refusals(class_folders, tmp_path, tiny_suites):
    with pytest.raises(DataError, match="no such folder"):
        scan_folder(tmp_path / "none")
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="no video or image"):
        scan_folder(tmp_path / "bare")
    with pytest.raises(DataError, match="fractions"):
        scan_folder(class_folders, val_fraction=1.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="x.csv: cannot be written.*--out"):
        scan_folder(class_folders, out=tmp_path / "file" / "x.csv")
    shutil.copy(load_manifest(tiny_suites["objects"]["train"]).paths[0], class_folders / "walk")
    with pytest.raises(DataError, match="10 videos and 1 images"):
        scan_folder(class_folders)


def test_check_lists_what_is_broken(broken, write_manifest, tiny_suites):
    good = load_manifest(tiny_suites["motion8"]["train"]).paths[:2]
    manifest = load_manifest(write_manifest([good[0], broken["zero"], good[1], broken["cut"]]))
    bad = check_manifest(manifest)
    assert [path for path, _ in bad] == [broken["zero"], broken["cut"]]
    short = load_manifest(write_manifest([broken["cut"]]))
    assert check_manifest(short, num_frames=2)[0][0] == broken["cut"] or check_manifest(short, num_frames=2, full=True)
    images = load_manifest(tiny_suites["objects"]["val"])
    assert images.kind == "image" and check_manifest(images) == []


@pytest.mark.parametrize(
    "name",
    [b"Stra\xdfe", "a\u2028b".encode(), b"a\x0cb", b" lead", b'"q"', b'"', b"5,x", b"x.mp4 5", b"a::3 b"],
    ids=repr,
)
def test_every_file_name_is_read_back(tmp_path, name, capsys):
    folder = os.path.join(os.fsencode(tmp_path), b"films")
    os.makedirs(folder)
    path = os.path.join(folder, name + b".mp4")
    with open(path, "wb") as f:
        f.write(b"x")
    manifest = load_manifest(scan_folder(tmp_path / "films")["train"]["path"])
    assert [os.fsencode(p) for p in manifest.paths] == [path] and len(manifest.hash) == 64
    assert main(["data", "check", manifest.path, "--speed", "0"]) == 2
    assert "bad: " in capsys.readouterr().out


def test_hidden_files_and_folders_are_not_data(tmp_path):
    hidden = (".ipynb_checkpoints/v.mp4", "__MACOSX/c0/v.mp4", "c0/._v.mp4", "c0/.old/v.mp4", "c0/__MACOSX/v.mp4")
    for name in ("c0/v.mp4", "c1/deep/v.mp4", *hidden):
        path = tmp_path / ".home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    scan_folder(tmp_path / ".home")  # itself in a hidden place, which is the user's choice
    assert json.loads((tmp_path / ".home" / "classes.json").read_text()) == ["c0", "c1"]
    assert (tmp_path / ".home" / "train.csv").read_text() == "c0/v.mp4 0\nc1/deep/v.mp4 1\n"


def test_clips_of_one_video_stay_in_one_part(tmp_path):
    for group in range(1, 9):
        for clip in range(1, 6):
            path = tmp_path / "Archery" / f"v_Archery_g{group:02d}_c{clip:02d}.avi"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"x")
    for video in "abcdefgh":
        for second in (0, 10, 20):
            path = tmp_path / "abseiling" / f"{video * 11}_{second:06d}_{second + 10:06d}.mp4"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"x")
    written = scan_folder(tmp_path, val_fraction=0.25, test_fraction=0.25)
    assert {part: facts["samples"] for part, facts in written.items()} == {"train": 32, "val": 16, "test": 16}
    parts = [{group_of(Path(p)) for p in load_manifest(facts["path"]).paths} for facts in written.values()]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 16
    one = tmp_path / "one"
    shutil.copytree(
        tmp_path / "Archery", one / "Archery", ignore=lambda _, names: [n for n in names if "_g01_" not in n]
    )
    assert set(scan_folder(one, val_fraction=0.2)) == {"train"}  # nothing would be left to train on
