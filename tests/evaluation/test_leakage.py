"""Leakage between pretraining data and novel classes; split lists; the published splits."""

import json
import os

import numpy as np
import pytest

from vjepa_fast.data import load_manifest
from vjepa_fast.errors import ConfigError, DataError
from vjepa_fast.evaluation.fewshot.leakage import class_keys, class_names, find_leakage, source_ids
from vjepa_fast.evaluation.fewshot.splits import class_split, manifest_from_list, read_list, select_part, split_names


def manifest(folder, rows, classes=None, name="list"):
    """A manifest of (path, label); files that do not exist get their own path as content, unless listed as absent."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, _ in rows:
        file = folder / path
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(str(file))
    (folder / f"{name}.csv").write_text("".join(f"{path} {label}\n" for path, label in rows))
    if classes:
        (folder / "classes.json").write_text(json.dumps(classes))
    return load_manifest(folder / f"{name}.csv")


def kinds(leakage):
    return {(o.kind, o.manifest.split("/")[0]): (o.samples, o.distinct, o.names) for o in leakage.overlaps}


def test_clean_data_is_said_to_be_clean(tmp_path):
    novel = manifest(tmp_path / "novel", [("a/1.mp4", 0), ("a/2.mp4", 0), ("b/1.mp4", 1)], ["jumping", "waving"])
    pretrain = manifest(tmp_path / "pre", [("x/1.mp4", 0), ("y/2.mp4", 1)], ["sitting", "falling"])
    found = find_leakage(novel, [pretrain])
    assert not found.found and found.gaps == ()
    assert found.statement == (
        "Leakage of novel/list.csv (3 samples, 2 classes) against pre/list.csv: "
        "no shared file, source video or class name found."
    )


def test_no_manifests_is_not_clean(tmp_path):
    novel = manifest(tmp_path / "novel", [("a/1.mp4", 0), ("b/1.mp4", 1)])
    found = find_leakage(novel, [], gaps=["k400.csv is not here"])
    assert "no pretraining manifests given: leakage not checked" in found.statement
    assert "k400.csv is not here" in found.statement
    assert found.to_dict()["checked"] == () and found.to_dict()["statement"] == found.statement


def test_the_same_file_by_path_link_or_content(tmp_path):
    rows = [(f"{c}/{i}.mp4", y) for y, c in enumerate("ab") for i in range(4)]
    novel = manifest(tmp_path / "novel", rows, ["p", "q"])
    pre = tmp_path / "pre"
    pre.mkdir()
    os.symlink(tmp_path / "novel" / "a", pre / "linked")  # a linked folder: path
    os.symlink(tmp_path / "novel" / "b" / "0.mp4", pre / "link.mp4")  # a linked file: path
    (pre / "copy.mp4").write_bytes((tmp_path / "novel" / "b" / "1.mp4").read_bytes())  # a copy: content
    size = len((tmp_path / "novel" / "b" / "2.mp4").read_bytes())
    (pre / "other.mp4").write_bytes(b"x" * size)  # of equal size only: nothing
    pretrain = manifest(pre, [("linked/3.mp4", 0), ("link.mp4", 0), ("copy.mp4", 1), ("other.mp4", 1)], ["r", "s"])
    assert kinds(find_leakage(novel, [pretrain])) == {
        ("path", "pre"): (2, 2, ("0.mp4", "3.mp4")),
        ("content", "pre"): (1, 1, ("copy.mp4",)),
    }
    assert set(kinds(find_leakage(novel, [pretrain], content=False))) == {("path", "pre")}
    text = find_leakage(novel, [pretrain]).statement
    assert "2 samples (25.0 %) are the same file of pre/list.csv; 2 files: 0.mp4, 3.mp4" in text
    assert "found; pretraining reads no labels, but these are not novel" in text


def test_files_that_are_not_here_are_said_not_to_be_compared(tmp_path):
    novel = manifest(tmp_path / "novel", [("a/1.mp4", 0), ("b/1.mp4", 1)], ["p", "q"])
    pretrain = manifest(tmp_path / "pre", [("a/1.mp4", 0), ("b/1.mp4", 1), ("b/2.mp4", 1)], ["r", "s"])
    for path in pretrain.paths[:2]:
        os.remove(path)
    os.remove(novel.paths[0])
    gaps = find_leakage(novel, [pretrain]).gaps
    assert gaps == (
        "pre/list.csv: 2 files are not here, so their content is not compared",
        "novel/list.csv: 1 files are not here, so their content is not compared",
    )
    assert find_leakage(novel, [pretrain], content=False).gaps == ()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("k400/val/archery/-3B32lodo2M_000059_000069.mp4", ("youtube", "-3B32lodo2M")),
        ("k400/archery/_a_lowercase_000059_000069.mp4", None),
        ("diving48/rgb/2x00Lgox0sA_00123.mp4", ("youtube", "2x00Lgox0sA")),
        ("kinetics/2x00Lgox0sA.webm", ("youtube", "2x00Lgox0sA")),
        ("clips/train_clips_00012.mp4", None),
        ("clips/Clip_000012.mp4", None),
        ("ucf/v_Archery_g07_c03.avi", ("ucf101", "v_Archery_g07")),
        ("hmdb/catch/Faith_Rewarded_catch_f_nm_np1_fr_med_5.avi", ("hmdb51", "Faith_Rewarded")),
        ("ssv2/78687.webm", ("ssv2", "78687")),
        ("20bn-something-something-v2/78687.webm", ("ssv2", "78687")),
        ("frames/78687.webm", None),
        ("motion8/test/00001.mp4", None),
    ],
)
def test_ids_of_source_videos(path, expected):
    assert source_ids(path) == ({expected} if expected else set())


def test_cuts_of_the_same_video(tmp_path):
    rows = [("v_Archery_g01_c02.avi", 0), ("v_Archery_g09_c01.avi", 0), ("v_Diving_g01_c01.avi", 1)]
    novel = manifest(tmp_path / "novel", rows)
    ucf = manifest(tmp_path / "ucf", [("v_Archery_g01_c05.avi", 0), ("v_Archery_g02_c01.avi", 0)])
    assert kinds(find_leakage(novel, [ucf], content=False))["video", "ucf"] == (1, 1, ("v_Archery_g01",))
    novel = manifest(tmp_path / "k", [("AbCdEfGhIjK_000010_000020.mp4", 0), ("ZbCdEfGhIjK_000010_000020.mp4", 1)])
    other = manifest(tmp_path / "diving", [("AbCdEfGhIjK_00003.mp4", 0)])
    found = find_leakage(novel, [ucf, other], content=False)
    assert kinds(found) == {("video", "diving"): (1, 1, ("AbCdEfGhIjK",))}
    assert "come from the same source video as one of diving/list.csv; 1 videos: AbCdEfGhIjK" in found.statement


def test_classes_of_the_same_name(tmp_path):
    rows = [("a/1.mp4", 0), ("a/2.mp4", 0), ("b/1.mp4", 3), ("c/1.mp4", 7)]  # labels with gaps
    novel = manifest(tmp_path / "novel", rows, ["archery", "-", "-", "riding a horse", "-", "-", "-", "yoga"])
    ucf = manifest(tmp_path / "ucf", [("Archery/1.avi", 0), ("HorseRiding/1.avi", 1), ("YoYo/1.avi", 2)])  # by folder
    found = find_leakage(novel, [ucf], content=False)
    assert kinds(found) == {("class", "ucf"): (3, 2, ("archery = Archery", "riding a horse = HorseRiding"))}
    bare = manifest(tmp_path / "flat", [("1.avi", 0), ("2.avi", 1)])
    assert find_leakage(novel, [bare], content=False).gaps == (
        "flat/list.csv: class names unknown (no classes.json, no class folders), so not compared",
    )


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("HulaHoop", "hula hooping", True),
        ("CliffDiving", "diving cliff", True),
        ("ride_horse", "HorseRiding", True),
        ("PullUps", "pullup", True),
        ("Hitting something with [something]", "hitting something with something", True),
        ("massaging person's head", "massaging persons head", True),
        ("Pulling something from left to right", "Pulling something from right to left", False),
        ("test1", "test11", False),
        ("playing guitar", "playing drums", False),
        ("Punch", "BoxingPunchingBag", False),
    ],
)
def test_spellings(a, b, same):
    assert bool(class_keys(a) & class_keys(b)) == same


def test_class_names_of_a_manifest(tmp_path):
    m = manifest(tmp_path, [("x/1.mp4", 0), ("x/2.mp4", 1)], ["one", "two"], name="own_test")
    assert class_names(m) == {0: "one", 1: "two"}
    (tmp_path / "own_classes.json").write_text('["first", "second"]')
    assert class_names(m) == {0: "first", 1: "second"}
    (tmp_path / "own_classes.json").write_text('["first"]')
    with pytest.raises(DataError, match="own_classes.json: 1 class names, but own_test.csv has label 1"):
        class_names(m)
    (tmp_path / "own_classes.json").write_text('{"first": 0}')
    with pytest.raises(DataError, match="expected a JSON list of class names"):
        class_names(m)


# ---------------------------------------------------------------- splits


def test_published_splits():
    sizes = {name: tuple(len(class_split(name)[part]) for part in ("train", "val", "test")) for name in split_names()}
    assert sizes == {
        "kinetics100": (64, 12, 24),
        "ssv2_small": (64, 12, 24),
        "ssv2_full": (64, 12, 24),
        "ucf101": (70, 10, 21),
        "hmdb51": (31, 10, 10),
    }
    for name in split_names():
        parts = class_split(name)
        assert len(set(parts["train"]) | set(parts["val"]) | set(parts["test"])) == sum(sizes[name])
    assert "hula hooping" in class_split("kinetics100")["test"]
    with pytest.raises(ConfigError, match="unknown few-shot split 'k400'"):
        class_split("k400")


def test_list_formats(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("blasting sand/AbCdEfGhIjK\n\ntrain8/78687\ntest0//dir/class/file.mp4\n")
    expected = [("blasting sand", "AbCdEfGhIjK"), ("train8", "78687"), ("test0", "/dir/class/file.mp4")]
    assert read_list(file) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a/1\nnothing\n", "list.txt:2: expected '<class>/<video>', found 'nothing'"),
        ("\n", "is empty"),
        ("a/\n", "list.txt:1"),
        ("/a\n", "list.txt:1"),
        ("a//\n", "list.txt:1"),
        (None, "no such few-shot list"),
    ],
)
def test_bad_lists(tmp_path, text, message):
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_list(tmp_path / "list.txt")


def test_videos_of_a_list(tmp_path):
    root = tmp_path / "videos"
    for name in (
        "busking/AbCdEfGhIjK_000001_000011.mp4",
        "deep/er/78687.webm",
        "dir/class/file.mp4",
        "a b/same.mp4",
        "c/same.mp4",
        "c/notes.txt",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    file = tmp_path / "list.txt"
    file.write_text(
        "busking/AbCdEfGhIjK\ntrain8/78687\ntest0//dir/class/file.mp4\na b/same\nc/same\n"
        f"abs/{root / 'dir/class/file.mp4'}\n"
    )
    found, names = manifest_from_list(file, root)
    assert names == ["a b", "abs", "busking", "c", "test0", "train8"]
    assert [names[y] for y in found.labels] == ["busking", "train8", "test0", "a b", "c", "abs"]
    assert [os.path.relpath(p, root) for p in found.paths] == [
        "busking/AbCdEfGhIjK_000001_000011.mp4",
        "deep/er/78687.webm",
        "dir/class/file.mp4",
        "a b/same.mp4",
        "c/same.mp4",
        "dir/class/file.mp4",
    ]
    file.write_text("x/78687\nx/12\nx/same\nx/notes\n")  # not there; two of the name; no video
    with pytest.raises(DataError, match="3 of 4 videos are not below .*: x/12, x/same, x/notes"):
        manifest_from_list(file, root)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        manifest_from_list(file, tmp_path / "nowhere")


def test_a_published_split_of_a_manifest(tmp_path):
    parts = class_split("hmdb51")
    names = sorted([*parts["train"], *parts["val"], *parts["test"], "yodelling"])
    rows = [(f"{i}_{k}.avi", i) for i in range(len(names)) for k in range(2)]
    whole = manifest(tmp_path / "all", rows, names)
    novel = select_part(whole, "hmdb51", "test")
    assert {names[y] for y in novel.labels} == set(parts["test"]) and len(novel) == 20
    assert all(p == whole.paths[2 * y] or p == whole.paths[2 * y + 1] for p, y in zip(novel.paths, novel.labels))
    assert len(select_part(whole, "hmdb51", "train")) == 62
    few = manifest(tmp_path / "few", [r for r in rows if names[r[1]] not in ("kick", "run")], names)
    with pytest.raises(DataError, match="2 of 10 classes of hmdb51 test are missing: kick, run"):
        select_part(few, "hmdb51", "test")
    with pytest.raises(DataError, match="class names unknown"):
        select_part(manifest(tmp_path / "bare", [("1.avi", 0), ("2.avi", 1)]), "hmdb51")
    with pytest.raises(ConfigError, match="'novel'; choose from train, val, test"):
        select_part(whole, "hmdb51", "novel")


def test_camel_case_and_folders_meet_a_split(tmp_path):
    parts = class_split("ucf101")
    folders = [name.lower() for name in parts["test"]]
    found = select_part(manifest(tmp_path, [(f"{n}/v.avi", i) for i, n in enumerate(folders)]), "ucf101")
    assert len(np.unique(found.labels)) == 21
