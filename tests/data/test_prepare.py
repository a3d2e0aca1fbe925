"""`vjepa-fast prepare`: lists in their official forms to manifests; what is wrong in them, and with the files."""

import json
import os
import re
import tarfile
from pathlib import Path

import pytest

from tests.data.trees import Trees
from vjepa_fast import cli
from vjepa_fast.data import load_manifest
from vjepa_fast.data.decoders.index_cache import IndexCache
from vjepa_fast.data.prepare import DATA_SETS, Request, prepare
from vjepa_fast.data.prepare.find import Files
from vjepa_fast.errors import DataError, UserError
from vjepa_fast.evaluation.fewshot.leakage import class_names


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    return Trees(tmp_path_factory.mktemp("trees"))


def run(name, source, out, **more):
    """(report, manifest by part, rows of the quarantine list)."""
    report = prepare(name, Request(source=source, out=out, **more))
    manifests = {part: load_manifest(facts["manifest"]) for part, facts in report.parts.items()}
    rows = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    return report, manifests, rows


def names(manifest):
    return [os.path.basename(path) for path in manifest.paths]


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_data_set_says_what_it_reads_and_refuses_an_empty_folder(name, tmp_path):
    data_set = DATA_SETS[name]()
    assert data_set.title
    assert data_set.unpacked
    assert DATA_SETS[name].__doc__
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        data_set.read(Request(source=tmp_path / "empty", out=tmp_path / "out"))
    assert str(tmp_path / "empty") in str(caught.value)
    with pytest.raises(DataError, match="nowhere"):
        data_set.read(Request(source=tmp_path / "nowhere", out=tmp_path / "out"))


@pytest.mark.parametrize("flat", [False, True])
def test_ucf101(trees, tmp_path, flat):
    root = trees.ucf101(tmp_path / "ucf", flat=flat)
    report, manifests, bad = run("ucf101", root, tmp_path / "out", splits=(1, 3))
    assert {part: len(m) for part, m in manifests.items()} == {"train1": 4, "test1": 4, "train3": 6, "test3": 2}
    assert names(manifests["test3"]) == ["v_Biking_g03_c01.avi", "v_HandStandPushups_g03_c01.avi"]
    assert manifests["test3"].labels.tolist() == [0, 1]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["Biking", "HandstandPushups"]
    assert (report.files, report.missing, report.bad, report.classes, bad) == (8, 0, 0, 2, [])
    assert report.hours == pytest.approx(8 / 3600)
    rows = [json.loads(line) for line in (tmp_path / "out" / "test3.info.jsonl").read_text().splitlines()]
    facts = {"codec": "mpeg4", "width": 64, "height": 32, "frames": 10, "fps": 10.0, "gop": 5, "status": "ok"}
    assert facts.items() <= rows[1].items()
    assert rows[1]["where"].endswith("testlist03.txt:2")
    assert rows[1]["seconds"] == 1
    fresh = IndexCache()  # what an epoch of training looks into
    fresh.use(tmp_path / "out" / "test3.csv")
    assert fresh.known(manifests["test3"].paths[0]).frames == 10


def test_hmdb51(trees, tmp_path):
    report, manifests, _ = run("hmdb51", trees.hmdb51(tmp_path / "hmdb"), tmp_path / "out")
    assert {part: m.labels.tolist() for part, m in manifests.items()} == {
        "train1": [0, 0, 0, 1, 1, 1],
        "test1": [0, 0, 1, 1],
    }
    assert names(manifests["test1"])[0] == "(Rad)Schlag_die_Bank! #3_brush_hair_f_cm_np1_le_med_3.avi"
    assert report.classes == 2


def test_ssv2(trees, tmp_path):
    root = trees.ssv2(tmp_path / "ssv2")
    report, manifests, _ = run("ssv2", root, tmp_path / "out")
    assert names(manifests["train"]) == [f"{i}.webm" for i in range(1, 7)]
    assert manifests["val"].labels.tolist() == [0, 0, 1, 1]
    assert "no labels" in report.notes[0]
    (root / "labels" / "test-answers.csv").write_text("3;Pulling something from left to right\n")
    with pytest.raises(DataError, match=r"test-answers.csv:1: 3 is in train as well .*entry 3"):
        run("ssv2", root, tmp_path / "out")
    trees.film(root / "20bn-something-something-v2" / "77.webm")
    (root / "labels" / "test-answers.csv").write_text("77;Pulling something from left to right\n")
    assert run("ssv2", root, tmp_path / "out")[1]["test"].labels.tolist() == [1]


def test_diving48(trees, tmp_path):
    root = trees.diving48(tmp_path / "diving")
    _, manifests, _ = run("diving48", root, tmp_path / "out")
    assert {part: m.labels.tolist() for part, m in manifests.items()} == {
        "train": [0, 0, 0, 1, 1, 1],
        "test": [0, 0, 1, 1],
    }
    assert json.loads((tmp_path / "out" / "classes.json").read_text())[1] == "Back+15som+15Twis+FREE"
    for part in ("train", "test"):
        (root / f"Diving48_V2_{part}.json").rename(root / f"Diving48_{part}.json")
    with pytest.raises(DataError, match=r"Diving48_train.json: .*first version.*V2"):
        run("diving48", root, tmp_path / "out")


def test_kinetics400(trees, tmp_path):
    root = trees.kinetics400(tmp_path / "k400")
    train = sorted((root / "train").iterdir())
    train[0].write_bytes(b"damaged")
    replacement = root / "replacement" / "replacement_for_corrupted_k400"
    trees.film(replacement / train[0].name)
    train[1].unlink()  # no longer on YouTube
    train[2].rename(root / "train" / f"{train[2].stem[:11]}.mp4")  # named by the id alone
    known = ["abseiling", "air drumming", "zumba"]
    report, manifests, bad = run("kinetics400", root, tmp_path / "out", known=known)
    assert len(manifests["train"]) == 5
    assert manifests["train"].paths[0] == str(replacement / train[0].name)
    assert names(manifests["train"])[1] == f"{train[2].stem[:11]}.mp4"
    assert [(row["status"], row["name"], row["where"][-11:]) for row in bad] == [
        ("missing", train[1].stem, "train.csv:3")
    ]
    assert bad[0]["reason"].startswith("not below")
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == known
    assert any("1 files are read from the replacement" in note for note in report.notes)
    assert any("1 of 3 classes" in note for note in report.notes)
    assert (report.files, report.missing) == (9, 1)


def test_a_part_that_is_not_here_has_no_manifest(trees, tmp_path):
    root = trees.kinetics400(tmp_path / "k400")
    for path in (root / "train").iterdir():
        path.unlink()
    report, manifests, bad = run("kinetics400", root, tmp_path / "out")
    assert [*manifests] == ["val"]
    assert len(bad) == 6
    assert any("train: none of its 6 files" in note for note in report.notes)
    for path in (root / "val").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"quarantine.jsonl: none of the files can be used; the first: .*not below"):
        run("kinetics400", root, tmp_path / "out")


def test_imagenet100(trees, tmp_path):
    root = trees.imagenet100(tmp_path / "in")
    wnids = ["n01558993", "n01692333"]
    for more in ({"known": wnids}, {"lists": root / "classes.txt"}):
        report, manifests, _ = run("imagenet100", root, tmp_path / "out", **more)
        assert {p: (m.kind, m.labels.tolist()) for p, m in manifests.items()} == {
            "train": ("image", [0, 0, 0, 1, 1, 1]),
            "val": ("image", [0, 0, 1, 1]),
        }
    assert report.codecs == {"jpeg 64 x 32": 10}
    assert not (tmp_path / "out" / "train.frames").exists()
    with pytest.raises(DataError, match="--lists"):
        run("imagenet100", root, tmp_path / "out")


def test_folder_with_parts_and_with_fractions(trees, tmp_path):
    for name in ("a b", "ü"):
        for i in range(4):
            trees.film(tmp_path / "own" / name / f"{i} x.mp4")
    _, manifests, _ = run("folder", tmp_path / "own", tmp_path / "out", test_fraction=0.5)
    assert {part: m.labels.tolist() for part, m in manifests.items()} == {"train": [0, 0, 1, 1], "test": [0, 0, 1, 1]}
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["a b", "ü"]


def test_csv_by_names_by_numbers_and_with_a_head(trees, tmp_path):
    for i in range(3):
        trees.film(tmp_path / "own" / f"film, {i}.mp4")
    table = tmp_path / "own" / "films.csv"
    table.write_bytes(b'\xef\xbb\xbf"film, 0.mp4",cat\r\n"film, 1.mp4",ant\r\n\r\n"film, 2.mp4",cat\r\n')
    _, manifests, _ = run("csv", table, tmp_path / "out")
    assert manifests["films"].labels.tolist() == [1, 0, 1]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["ant", "cat"]
    table.write_text("frames\tlabel\tpath\n10\t1\tfilm, 0.mp4\n10\t0\tfilm, 2\n")
    _, manifests, _ = run("csv", tmp_path / "own", tmp_path / "out", lists=table)
    assert names(manifests["films"]) == ["film, 0.mp4", "film, 2.mp4"]
    assert manifests["films"].labels.tolist() == [1, 0]
    table.write_text("id,y\nfilm 0,10\n".replace("film 0", '"film, 0.mp4"'))  # numbers stay what they are
    _, manifests, _ = run("csv", tmp_path / "own", tmp_path / "out", lists=table)
    assert manifests["films"].labels.tolist() == [10]


def test_class_names_beside_a_table(trees, tmp_path):
    trees.film(tmp_path / "own" / "a.mp4")
    table, beside = tmp_path / "own" / "t.csv", tmp_path / "own" / "classes.json"
    table.write_text("a.mp4,cat\n")
    beside.write_text('["dog", "cat"]')
    assert run("csv", table, tmp_path / "out")[1]["t"].labels.tolist() == [1]
    for text, message in (
        ('["dog"]', "class 'cat' is none of the 1"),
        ('["cat", 1]', "array of different class names"),
        ('["cat", "cat"]', "array of different class names"),
        ('{"cat": 0}', "expected a JSON array"),
    ):
        beside.write_text(text)
        with pytest.raises(DataError, match=message):
            run("csv", table, tmp_path / "out")
    table.write_text("a.mp4,2\n")
    beside.write_text('["dog", "cat"]')
    with pytest.raises(DataError, match="2 class names, but the table has label 2"):
        run("csv", table, tmp_path / "out")


def test_webdataset_shards_are_unpacked_once(trees, tmp_path):
    root = trees.shards(tmp_path / "shards")
    report, manifests, _ = run("webdataset", root, tmp_path / "out")
    assert {part: m.labels.tolist() for part, m in manifests.items()} == {"train": [0, 1] * 3, "val": [0, 1] * 3}
    first = tmp_path / "out" / "files" / "train-000000" / "000000.mp4"
    assert manifests["train"].paths[0] == str(first)
    assert "files/train-000000/000000.mp4 0" in (tmp_path / "out" / "train.csv").read_text()
    assert any("unpacked" in note for note in report.notes)
    before = first.stat().st_mtime_ns
    run("webdataset", root, tmp_path / "out")
    assert first.stat().st_mtime_ns == before
    content = (root / "val-000000.tar").read_bytes()
    (root / "val-000000.tar").write_bytes(content[: len(content) // 2])
    _, manifests, bad = run("webdataset", root, tmp_path / "again")
    assert 0 < len(manifests["val"]) < 6
    assert "ends early" in bad[0]["reason"]
    assert "val-000000.tar" in bad[0]["name"]
    with tarfile.open(root / "evil.tar", "w") as archive:
        archive.add(first, "../../evil.mp4")
    _, _, bad = run("webdataset", root, tmp_path / "third")
    assert any("leads out" in row["reason"] for row in bad)
    assert not (tmp_path / "evil.mp4").exists()


def test_samples_of_shards_with_captions_and_several_films(trees, tmp_path):
    film = trees.film(tmp_path / "a.mp4")
    shards = tmp_path / "latest-shards"  # "test" is in its name, and no word of it
    shards.mkdir()
    with tarfile.open(shards / "000.tar", "w") as archive:
        for number, label in ((0, "7"), (1, "10")):
            for name, content in ((f"{number}.cls", label), (f"{number}.txt", "a caption")):
                (tmp_path / name).write_text(content)
                archive.add(tmp_path / name, name)
            for name in (f"{number}.left.mp4", f"{number}.right.mp4"):
                archive.add(film or tmp_path / "a.mp4", name)
    _, manifests, bad = run("webdataset", shards, tmp_path / "out")
    assert set(manifests) == {"train"} and manifests["train"].labels.tolist() == [7, 10] and not bad
    assert [Path(path).name for path in manifests["train"].paths] == ["0.left.mp4", "1.left.mp4"]


FORMS = {  # list by part, as published: a line, the video's file, the class's name
    "CMN": {
        "train.list": ("air drumming/-VtLx-mcPds_000012_000022", "train/-VtLx-mcPds_000012_000022.mp4", "air drumming"),
        "val.list": ("baking cookies/-514AQUrSow_000058_000068", "val/-514AQUrSow.mp4", "baking cookies"),
        "test.list": ("blasting sand/-kYzxMKp514_000086_000096", "-kYzxMKp514_000086_000096.mp4", "blasting sand"),
    },
    "TRX": {
        "trainlist03.txt": ("kick/Ball_kick_f_cm_np1_ba_bad_8", "kick/Ball_kick_f_cm_np1_ba_bad_8.avi", "kick"),
        "vallist03.txt": ("climb/A.B_climb_f_cm_np1_ba_bad_8", "climb/A.B_climb_f_cm_np1_ba_bad_8.avi", "climb"),
        "testlist03.txt": ("fencing/1899_fencing_f_cm_np2_le_med_0", "1899_fencing_f_cm_np2_le_med_0.avi", "fencing"),
    },
    "TRX, numbers only": {
        "trainlist07.txt": ("train8/78687", "78687.webm", "train8"),
        "vallist07.txt": ("val2/188509", "188509.webm", "val2"),
        "testlist07.txt": ("test18/195025", "195025.webm", "test18"),
    },
    "HyRSM": {
        "train_few_shot.txt": ("train0//videos/kick/a_kick_0.avi", "hmdb/videos/kick/a_kick_0.avi", "kick"),
        "val_few_shot.txt": ("val0//videos/climb/(x)!_climb_0.avi", "climb/(x)!_climb_0.avi", "climb"),
        "test_few_shot.txt": ("test0//train_256/a_b/-514AQUrSow.mp4", "a_b/-514AQUrSow_000001_000011.mp4", "a_b"),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_fewshot_lists(trees, tmp_path, form):
    (tmp_path / "lists").mkdir()
    for name, (line, file, _) in FORMS[form].items():
        (tmp_path / "lists" / name).write_text(f"{line}\n")
        trees.film(tmp_path / "videos" / file)
    _, manifests, bad = run("fewshot", tmp_path / "videos", tmp_path / "out", lists=tmp_path / "lists")
    assert bad == []
    for part, (_, file, name) in zip(("base", "val", "novel"), FORMS[form].values()):
        assert manifests[part].paths == [str(tmp_path / "videos" / file)]
        assert json.loads((tmp_path / "out" / f"{part}_classes.json").read_text()) == [name]
        assert class_names(manifests[part]) == {0: name}


def test_fewshot_parts_share_no_class(trees, tmp_path):
    (tmp_path / "lists").mkdir()
    for part, video in (("train", "one"), ("test", "two")):
        (tmp_path / "lists" / f"{part}.list").write_text(f"kick/{video}\n")
        trees.film(tmp_path / "videos" / f"{video}.mp4")
    with pytest.raises(DataError, match="class 'kick' is in novel as well"):
        run("fewshot", tmp_path / "videos", tmp_path / "out", lists=tmp_path / "lists")


# ---------------------------------------------------------------- what is wrong


def test_files_that_cannot_be_used_are_quarantined_and_the_rest_goes_on(trees, tmp_path, broken):
    root = trees.ucf101(tmp_path / "ucf", groups=6)
    folder = root / "UCF-101" / "Biking"
    for group, kind in (("01", "text"), ("02", "zero"), ("04", "cut"), ("06", "audio")):
        (folder / f"v_Biking_g{group}_c01.avi").write_bytes(Path(broken[kind]).read_bytes())
    (folder / "v_Biking_g05_c01.avi").unlink()
    report, manifests, bad = run("ucf101", root, tmp_path / "out")
    assert names(manifests["train1"])[:1] == ["v_Biking_g03_c01.avi"]
    assert (report.missing, report.bad) == (1, 4)
    reasons = {row.get("path", "")[-7:-4] + row["name"][-11:-8]: row["reason"] for row in bad}
    assert len(reasons) == 5
    text = " ".join(reasons.values())
    for word in ("not below", "0 bytes", "truncated", "sound but no video"):
        assert word in text
    assert all(row["where"].count("list01.txt:") == 1 for row in bad)
    info = [json.loads(line) for line in (tmp_path / "out" / "train1.info.jsonl").read_text().splitlines()]
    assert {row["status"] for row in info} == {"ok", "bad", "missing"}
    assert len(info) == 8


def test_equal_lines_count_once_and_any_name_but_one_of_two_lines_round_trips(trees, tmp_path):
    odd = [" a.mp4", "b\u2028c.mp4", 'd "e".mp4', "f,1.mp4", "g::2.mp4", "caf\udce9.mp4", "ü 3.mp4"]
    for name in [*odd, "two\nlines.mp4"]:
        trees.film(tmp_path / "own" / "class" / name)
    listed = [name for name in odd if name[0] != " " and "\udce9" not in name]
    table = "".join('"{}",0\n'.format(name.replace('"', '""')) for name in listed)
    (tmp_path / "own" / "class" / "t.csv").write_text(table + 'ü 3.mp4,0\n"two\nlines.mp4",0\n')
    report, manifests, bad = run("csv", tmp_path / "own" / "class" / "t.csv", tmp_path / "out")
    (tmp_path / "own" / "class" / "two\nlines.mp4").unlink()
    assert sorted(names(manifests["t"])) == sorted(listed)
    assert any("1 lines repeat" in note for note in report.notes)
    assert "rename it" in bad[0]["reason"]
    _, manifests, bad = run("folder", tmp_path / "own", tmp_path / "out")
    assert sorted(names(manifests["train"])) == sorted(odd)
    assert bad == []


def test_hidden_and_half_written_files_are_not_data_and_links_in_circles_end(trees, tmp_path):
    root = trees.ucf101(tmp_path / "ucf")
    video = root / "UCF-101" / "Biking" / "v_Biking_g01_c01.avi"
    for other in (
        "__MACOSX/Biking/._v_Biking_g01_c01.avi",
        ".cache/v_Biking_g01_c01.avi",
        "v_Biking_g01_c01.avi.7.tmp",
    ):
        (root / other).parent.mkdir(parents=True, exist_ok=True)
        (root / other).write_bytes(b"x")
    (root / "UCF-101" / "again").symlink_to(root, target_is_directory=True)
    _, manifests, bad = run("ucf101", root, tmp_path / "out")
    assert bad == []
    assert manifests["test1"].paths[0] == str(video)


def test_of_several_files_of_a_name_the_folders_decide(tmp_path):
    for name in ("a_b/x.mp4", "c/x.mp4", "deep/c/y.mp4", "e/y.mp4", "e/id________A_000001_000011.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files = Files(tmp_path)
    for name, within, found in (
        ("c/x.mp4", "", "c/x.mp4"),
        ("x", "a b", "a_b/x.mp4"),
        ("root/c/y.avi", "", "deep/c/y.mp4"),
        ("id________A", "", "e/id________A_000001_000011.mp4"),
        (f"{tmp_path}/e/y.mp4", "c", "e/y.mp4"),
    ):
        assert files.find(name, within) == (str(tmp_path / found), "")
    path, problem = files.find("x.mp4")
    assert path is None
    assert problem.startswith("2 files have this name: ")
    assert files.find("z.mp4") == (None, f"not below {tmp_path}")
    for name in ("d/z.mp4", "deep/f/w.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files = Files(tmp_path)
    for name, within in (("c/z.mp4", ""), ("z.mp4", "c"), ("x/A B/z", "")):  # of another class, whose folder is there
        path, problem = files.find(name, within)
        assert path is None and problem.endswith(f"a file of this name is {tmp_path / 'd/z.mp4'}")
    assert files.find("elsewhere/z.mp4") == (str(tmp_path / "d/z.mp4"), "")  # the download has other folders
    assert files.find("deep/w.mp4") == (str(tmp_path / "deep/f/w.mp4"), "")
    assert files.find("/")[0] is None


def test_two_lists_of_a_name_are_not_guessed(trees, tmp_path):
    root = trees.ucf101(tmp_path / "ucf")
    detection = root / "UCF101_Action_detection_splits"
    detection.mkdir()
    (detection / "trainlist01.txt").write_text("Biking/v_Biking_g01_c01.avi 1\n")
    with pytest.raises(DataError, match="trainlist01.txt has the same name; .*--lists"):
        run("ucf101", root, tmp_path / "out")
    assert len(run("ucf101", root, tmp_path / "out", lists=root / "ucfTrainTestlist")[1]["train1"]) == 4


def test_videos_and_images_in_one_part_are_refused(trees, tmp_path):
    trees.film(tmp_path / "own" / "a" / "1.mp4")
    (tmp_path / "own" / "t.csv").write_text("a/1.mp4,0\nb.jpg,0\n")
    (tmp_path / "own" / "b.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="1 videos and 1 images"):
        run("csv", tmp_path / "own" / "t.csv", tmp_path / "out")


def test_command(trees, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = trees.ucf101(tmp_path / "ucf")
    (root / "UCF-101" / "Biking" / "v_Biking_g03_c01.avi").unlink()
    assert cli.main(["prepare", "ucf101", "ucf", "--split", "1", "2", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "train1: 3 samples of 2 classes (1 missing), prepared/ucf101/train1.csv" in out
    assert "7 files found, 1 missing, 0 bad; 2 classes" in out
    assert "quarantine.jsonl" in out
    for argv, message in (
        (["ucf10", "ucf"], "unknown data set 'ucf10'.*did you mean ucf101"),
        (["ucf101", "ucf", "--split", "4"], "--split 4: ucf101 has 3 official splits"),
        (["ssv2", "ucf", "--split", "1"], "has no official splits"),
        (["ucf101", "ucf", "--fps", "8"], "--fps: is for copies; add --convert"),
        (["ucf101", "ucf", "--convert", "--fps", "0"], "--fps.* 0 is not a number"),
        (["ucf101", "ucf", "--convert", "--fps", "8", "--frame-step", "2"], "give one of them"),
        (["ucf101", "ucf", "--convert", "--quality", "60"], "crf goes to 51"),
        (["ucf101", "ucf", "--convert", "av1"], "--convert"),
        (["ucf101", "ucf", "--test-fraction", "0.1"], "has parts of its own"),
        (["folder", "ucf", "--test-fraction", "1.5"], "fractions"),
        (["ucf101", "nowhere"], "nowhere"),
    ):
        assert cli.main(["prepare", *argv]) == 2
        assert re.search(message, capsys.readouterr().err), argv


def test_nothing_is_written_where_it_cannot_be(trees, tmp_path):
    root = trees.ucf101(tmp_path / "ucf")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="--out"):
        run("ucf101", root, tmp_path / "file")
