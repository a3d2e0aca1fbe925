"""`vjepa-fast prepare`: lists and tables with wrong lines are refused with the line."""

import pytest

from tests.data.trees import Trees
from vjepa_fast.data.prepare import Request, prepare
from vjepa_fast.errors import DataError


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    return Trees(tmp_path_factory.mktemp("trees"))


def run(name, source, out, **more):
    return prepare(name, Request(source=source, out=out, **more))


def change(path, old, new, count=1):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


LISTS = {
    "unknown class": (
        "ucfTrainTestlist/trainlist01.txt",
        "Biking/",
        "Bikinf/",
        r"trainlist01.txt:1: class 'Bikinf'.*Biking",
    ),
    "another number": (
        "ucfTrainTestlist/trainlist01.txt",
        ".avi 1",
        ".avi 2",
        r"trainlist01.txt:1: .* has number 2, but 1",
    ),
    "no class": ("ucfTrainTestlist/testlist01.txt", "Biking/v_", "", r"testlist01.txt:1: expected '<class>/<video>'"),
    "in both": (
        "ucfTrainTestlist/testlist01.txt",
        "g01_c01",
        "g02_c01",
        r"testlist01.txt:1: .* is in train1 as well .*:1",
    ),
    "gap": ("ucfTrainTestlist/classInd.txt", "2 Hand", "3 Hand", r"classInd.txt: classes are not numbered 1 to 2"),
    "no number": ("ucfTrainTestlist/classInd.txt", "1 Biking", "x Biking", r"classInd.txt:1: the number is 'x'"),
}


@pytest.mark.parametrize("what", LISTS)
def test_wrong_lists_are_named_with_their_line(trees, tmp_path, what):
    file, old, new, message = LISTS[what]
    root = trees.ucf101(tmp_path / "ucf")
    change(root / file, old, new)
    with pytest.raises(DataError, match=message) as caught:
        run("ucf101", root, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "train1.csv").exists()


def test_other_lists_with_wrong_lines(trees, tmp_path):
    hmdb = trees.hmdb51(tmp_path / "hmdb")
    change(hmdb / "testTrainMulti_7030_splits" / "cartwheel_test_split1.txt", ".avi 2", ".avi 3")
    with pytest.raises(DataError, match=r"cartwheel_test_split1.txt:4: expected '<video> 0', 1 or 2"):
        run("hmdb51", hmdb, tmp_path / "out")
    (hmdb / "testTrainMulti_7030_splits" / "cartwheel_test_split2.txt").unlink()
    with pytest.raises(DataError, match=r"no cartwheel_test_split2.txt; unpack"):
        run("hmdb51", hmdb, tmp_path / "out", splits=(2,))
    ssv2 = trees.ssv2(tmp_path / "ssv2")
    change(ssv2 / "labels" / "train.json", "Putting [something] on", "Putting [something] in")
    with pytest.raises(DataError, match=r"train.json: entry 1: class 'Putting something in something'.*did you mean"):
        run("ssv2", ssv2, tmp_path / "out")
    change(ssv2 / "labels" / "train.json", '"id"', '"idx"')
    with pytest.raises(DataError, match=r"train.json: entry 1: has no 'id'"):
        run("ssv2", ssv2, tmp_path / "out")
    (ssv2 / "labels" / "train.json").write_text('[{"id": 1,\n')
    with pytest.raises(DataError, match=r"train.json:2: is not JSON"):
        run("ssv2", ssv2, tmp_path / "out")
    diving = trees.diving48(tmp_path / "diving")
    change(diving / "Diving48_V2_test.json", '"label": 1', '"label": 7')
    with pytest.raises(DataError, match=r"V2_test.json: entry 3: label 7 is none of the 2"):
        run("diving48", diving, tmp_path / "out")
    k400 = trees.kinetics400(tmp_path / "k400")
    change(k400 / "annotations" / "val.csv", ",validate,", ",valid,")
    with pytest.raises(DataError, match=r"val.csv:2: split 'valid'"):
        run("kinetics400", k400, tmp_path / "out")
    change(k400 / "annotations" / "val.csv", "time_start", "start")
    with pytest.raises(DataError, match=r"val.csv:1: has no column time_start"):
        run("kinetics400", k400, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4,1\na.mp4,2\n", r"t.csv:2: a.mp4 has label 2, but 1 at .*t.csv:1"),
        ("a.mp4,1\nb.mp4\n", r"t.csv:2: has 1 columns"),
        ("a.mp4 1\n", r"t.csv:1: expected a path and a label"),
        ("a.mp4,3,1\n", r"t.csv:1: 3 columns, which are path and label is not clear"),
        ("a.mp4,\n", r"t.csv:1: the label is empty"),
        ("a.mp4,0\nb.mp4,-1\n", r"t.csv:2: the label '-1' is no number, others are"),
        ("a.mp4,cat\nb.mp4,2\nc.mp4,10\nd.mp4,dog\n", r"t.csv:1: the label 'cat' is no number"),
        ("path,label\n", r"t.csv: the table has a head and no rows"),
        ("none.mp4,1\nno.mp4,1\n", r"t.csv:1: none.mp4 is not below .*any other of the 2"),
        ("", r"t.csv:1: expected a path|is empty"),
        (b"a.mp4,caf\xe9\n", r"t.csv: byte 9 is not UTF-8"),
        ('"a.mp4,1\n', r"t.csv"),
    ],
)
def test_wrong_tables(trees, tmp_path, text, message):
    trees.film(tmp_path / "a.mp4")
    (tmp_path / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        run("csv", tmp_path / "t.csv", tmp_path / "out")
