"""Fast copies: what they show, how they are coded, and that an interrupted conversion goes on."""

import os
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.video.frame import PictureType

from tests.data.dying import square
from tests.data.trees import film, numbers_of, painted
from vjepa_fast.data import index_of, load_manifest, read_clip
from vjepa_fast.data.decoders.index_cache import IndexCache
from vjepa_fast.data.decoders.rows import open_rows, write_rows
from vjepa_fast.data.manifests.check import check_manifest
from vjepa_fast.data.media import ReadOptions
from vjepa_fast.data.prepare import CopyForm, Request, prepare, run
from vjepa_fast.data.prepare.copy import CopyTask, make_copy
from vjepa_fast.data.prepare.inspect import Facts
from vjepa_fast.data.processes import each
from vjepa_fast.data.synthetic.write import write_video
from vjepa_fast.errors import DataError, UserError

VARYING = np.cumsum([0, *([40, 40, 120, 33, 17, 80] * 8)])  # ms


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    return {
        "25": film(folder / "25.mp4", frames=50, fps=25, gop=12),
        "30": film(folder / "30.avi", frames=60, fps=30, codec="mpeg4"),
        "12": film(folder / "12.webm", frames=20, fps=12, codec="libvpx"),
        "ntsc": film(folder / "ntsc.mp4", frames=40, fps=Fraction(30000, 1001)),
        "varying": film(folder / "varying.mkv", frames=len(VARYING), times=VARYING),
    }


def copied(source, folder, **form):
    form = CopyForm(**form)
    target = folder / f"copy{form.suffix}"
    facts = make_copy(CopyTask(str(source), target), form, ReadOptions())
    assert facts.problem == ""
    return target, facts


def nearest(times, fps):
    """By search, the frame shown nearest to each n / fps; of two, the earlier one."""
    last = times[-1]
    return [int(np.argmin(np.abs(times - n / fps).round(9))) for n in range(int(last * fps + 1e-6) + 1)]


CASES = [
    ("25", {"fps": Fraction(8)}, 8.0),
    ("25", {"fps": Fraction(5)}, 5.0),
    ("30", {"fps": Fraction(15, 2)}, 7.5),
    ("12", {"fps": Fraction(24)}, 12.0),  # no frame is made up
    ("ntsc", {"fps": Fraction(8)}, 8.0),
    ("ntsc", {"step": 2}, 15000 / 1001),
    ("30", {"step": 3}, 10.0),
    ("varying", {"fps": Fraction(10)}, 10.0),
    ("varying", {}, None),
]


@pytest.mark.parametrize(("name", "form", "fps"), CASES)
def test_a_copy_shows_at_a_time_what_the_film_shows_then(films, tmp_path, name, form, fps):
    source = index_of(films[name])
    target, facts = copied(films[name], tmp_path, **form, quality=12)
    fps = fps or source.rate
    index = index_of(target)
    assert index.constant
    assert index.rate == pytest.approx(fps, rel=1e-4)
    assert np.abs(np.diff(index.times) - 1 / fps).max() < 1e-3
    if "step" in form:
        expected = list(range(0, source.frames, form["step"]))
    else:
        expected = nearest(source.times if not source.constant else np.arange(source.frames) / source.rate, fps)
    shown = numbers_of(read_clip(target, index.frames, start=0))
    assert shown == expected
    assert facts.frames == len(expected)


def test_the_copy_is_h264_with_a_key_frame_every_16_and_no_b_frames(films, tmp_path):
    target, facts = copied(films["25"], tmp_path)
    assert (facts.codec, facts.gop, facts.frames) == ("h264", 16, 50)
    with av.open(str(target)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert stream.codec_context.pix_fmt == "yuv420p"
    assert [i for i, frame in enumerate(frames) if frame.key_frame] == [0, 16, 32, 48]
    assert PictureType.B not in {frame.pict_type for frame in frames}
    settings = target.read_bytes()
    assert b"cabac=0" in settings  # what fastdecode leaves out
    assert b"deblock=0" in settings
    for start in range(0, 40, 7):  # any start
        assert numbers_of(read_clip(target, 8, start=start)) == list(range(start, start + 8))


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((240, 320), 256, (240, 320)),
        ((720, 1280), 256, (256, 456)),
        ((1280, 720), 64, (114, 64)),
        ((33, 35), 99, (32, 36)),
    ],
)
def test_short_side_is_scaled_never_up_and_sides_are_even(size, side, expected):
    assert CopyForm(short_side=side).size(*size) == expected


def test_a_rate_for_every_film_and_no_endless_copies():
    assert CopyForm().frames(2, 1e-5, None)[1] > 0
    assert CopyForm(fps=Fraction(8)).frames(2, 2 / 3600, np.array([0.0, 3600.0]))[0].shape == (28801,)
    broken = Facts(codec="h264", width=320, height=240, frames=300, fps=300 / 36_000_000, constant=False)
    assert "time stamps seem to be damaged" in CopyForm(fps=Fraction(8)).objection("a.mp4", broken)
    assert CopyForm(fps=Fraction(8)).objection("a.mp4", replace(broken, fps=2.3)) == ""
    assert CopyForm().objection("a.mp4", replace(broken, problem="bad")) == "bad"


def test_colours_come_back(tmp_path):
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [128, 128, 128]], np.uint8)
    clip = np.repeat(np.repeat(colours[None, None], 12, 0), 32, 1).repeat(16, 2)
    write_video(tmp_path / "source.mp4", clip, crf=1)
    for form in ({"quality": 10}, {"coding": "rows", "quality": 95}, {"coding": "raw"}):
        target, _ = copied(tmp_path / "source.mp4", tmp_path, **form)
        error = np.abs(read_clip(target, 12).astype(int) - clip)[:, :, 4::16]
        assert error.mean() < 4, form


@pytest.mark.parametrize("coding", ["rows", "raw"])
def test_row_stores_are_read_whatever_the_decoder(films, tmp_path, coding):
    target, facts = copied(films["25"], tmp_path, fps=Fraction(5), coding=coding, quality=90)
    assert (facts.frames, facts.fps, facts.gop, facts.codec) == (
        10,
        5.0,
        1,
        f"rows, {'raw' if coding == 'raw' else 'jpeg'}",
    )
    expected = [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]
    assert numbers_of(read_clip(target, 10)) == expected
    assert numbers_of(read_clip(target, 3, start=6, size=(16, 32))) == expected[6:9]
    with open_rows(str(target), ReadOptions()) as video:
        assert numbers_of(video.read(np.array([0, 0, 9]), None)) == [0, 0, 45]
    (tmp_path / "m.csv").write_text(f"{target} 0\n")
    assert check_manifest(load_manifest(tmp_path / "m.csv"), num_frames=4, full=True) == []


def test_damaged_row_stores_are_seen(tmp_path):
    path = tmp_path / "x.rows"
    write_rows(path, iter(painted(range(4))), count=4, size=(32, 64), fps=8)
    content = path.read_bytes()
    table = 16 + int.from_bytes(content[8:16], "little") + 8
    for damaged, message in (
        (content[:-9], "cut short"),
        (content[:30], "damaged"),
        (b"VJROWS99" + content[8:], "no row store"),
        (content[:8] + b"\xff" * 8 + content[16:], "no row store"),
        (content.replace(b'"frames": 4', b'"frames": 9'), "damaged"),
        (content.replace(b'"coding"', b'"codung"'), "damaged"),
        (content[:-400] + bytes(400), "row of frame 3"),
        (content[:table] + bytes([0xFF] * 6) + content[table + 6 :], "damaged"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            read_clip(path, 4)
    with pytest.raises(ValueError, match="expected 5"):
        write_rows(path, iter(painted(range(4))), count=5, size=(32, 64), fps=8)
    assert path.read_bytes() == damaged  # what was there stays


# ---------------------------------------------------------------- whole folders


@pytest.fixture
def source(tmp_path, films):
    for name in ("a/one", "a/two", "b/three", "b/four"):
        path = tmp_path / "source" / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(films["25"].read_bytes())
    return tmp_path / "source"


def go(source, out, **more):
    return prepare("folder", Request(source=source, out=out), form=CopyForm(fps=Fraction(5), short_side=16), **more)


def test_a_second_run_makes_only_what_is_missing(source, tmp_path, monkeypatch):
    made = []

    def count(task, **more):
        made.append(Path(task.source).name)
        if len(made) == 3:
            raise KeyboardInterrupt
        return make_copy(task, **more)

    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.rglob("*.mp4")}
    monkeypatch.setattr(run, "make_copy", count)
    with pytest.raises(KeyboardInterrupt):
        go(source, tmp_path / "out")
    folder = tmp_path / "out" / "h264-5fps-16px-q20"
    assert len(list(folder.rglob("*.mp4"))) == 2
    assert not (tmp_path / "out" / "train.csv").exists()
    report = go(source, tmp_path / "out")
    assert len(made) == 5
    assert set(made) == {"one.mp4", "two.mp4", "three.mp4", "four.mp4"}
    assert report.parts["train"]["samples"] == 4
    manifest = load_manifest(tmp_path / "out" / "train.csv")
    assert manifest.labels.tolist() == [0, 0, 1, 1]
    assert all(Path(path).is_relative_to(folder) for path in manifest.paths)
    go(source, tmp_path / "out")
    assert len(made) == 5
    now = time.time() + 5
    os.utime(source / "a" / "one.mp4", (now, now))  # a newer source is copied again
    go(source, tmp_path / "out")
    assert made[5:] == ["one.mp4"]
    os.utime(source / "b" / "three.mp4", (1, 1))  # another file put there, older than the copy of the first
    go(source, tmp_path / "out")
    assert made[6:] == ["three.mp4"]
    (folder / "sources.json").unlink()  # what an earlier version wrote has none: the times are compared
    os.utime(source / "a" / "one.mp4", (1, 1))
    go(source, tmp_path / "out")
    assert len(made) == 7
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    assert all(after[path][1] == before[path][1] for path in before)


def test_a_film_that_breaks_midway_is_quarantined_and_leaves_nothing(source, tmp_path, films):
    content = bytearray(films["25"].read_bytes())
    begin = content.index(b"mdat") + len(content) // 3
    content[begin : begin + 2000] = bytes(2000)
    (source / "b" / "four.mp4").write_bytes(content)
    report = go(source, tmp_path / "out")
    assert (report.parts["train"]["samples"], report.bad) == (3, 1)
    assert "four.mp4" in (tmp_path / "out" / "quarantine.jsonl").read_text()
    left = {p.name for p in (tmp_path / "out" / "h264-5fps-16px-q20").rglob("*") if p.is_file()}
    assert left == {"one.mp4", "two.mp4", "three.mp4", "sources.json"}


def test_files_that_differ_in_their_suffix_alone_have_two_copies(source, tmp_path, films):
    (source / "a" / "one.avi").write_bytes(films["30"].read_bytes())
    assert go(source, tmp_path / "out").parts["train"]["samples"] == 5
    names = sorted(p.name for p in (tmp_path / "out" / "h264-5fps-16px-q20" / "a").iterdir())
    assert names == ["one.avi.mp4", "one.mp4.mp4", "two.mp4"]


def test_too_little_room_is_seen_before_the_first_copy(source, tmp_path, monkeypatch):
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: SimpleNamespace(free=900))
    with pytest.raises(DataError, match=r"4 videos take about .* are free; choose another disk with --out"):
        go(source, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.mp4"))


def test_a_full_disk_ends_the_run_in_place_of_the_film(source, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    read = av.open
    monkeypatch.setattr(av, "open", lambda *args, **more: full() if "w" in args else read(*args, **more))
    with pytest.raises(UserError, match="No space left"):
        go(source, tmp_path / "out")


def test_images_are_not_copied(tmp_path):
    from PIL import Image

    (tmp_path / "source" / "a").mkdir(parents=True)
    Image.fromarray(painted([1])[0]).save(tmp_path / "source" / "a" / "1.png")
    with pytest.raises(DataError, match="images are not copied"):
        go(tmp_path / "source", tmp_path / "out")


# ---------------------------------------------------------------- processes


def test_an_item_that_ends_its_process_costs_itself_alone():
    assert dict(each(square, range(6), 2)) == {0: 0, 1: 1, 2: 4, 3: None, 4: 16, 5: 25}


def test_processes_make_the_same_copies(source, tmp_path):
    go(source, tmp_path / "one")
    go(source, tmp_path / "two", workers=2)
    assert (tmp_path / "one" / "train.csv").read_text() == (tmp_path / "two" / "train.csv").read_text()
    fresh = IndexCache()
    fresh.use(tmp_path / "two" / "train.csv")
    assert all(fresh.known(path).frames == 10 for path in load_manifest(tmp_path / "two" / "train.csv").paths)
    for one, two in zip(*(load_manifest(tmp_path / out / "train.csv").paths for out in ("one", "two"))):
        assert numbers_of(read_clip(one, 10)) == numbers_of(read_clip(two, 10)) == list(range(0, 50, 5))


def test_copies_of_other_forms_are_elsewhere():
    forms = [CopyForm(fps=Fraction(30000, 1001)), CopyForm(fps=Fraction(2997, 100)), CopyForm(fps=Fraction(30))]
    forms += [replace(form, deinterlaced=True) for form in forms]
    assert len({form.folder for form in forms}) == len(forms) and not any("/" in form.folder for form in forms)


def test_a_row_store_that_is_gone_is_a_bad_sample(tmp_path):
    path = tmp_path / "a.rows"
    write_rows(path, [np.zeros((4, 4, 3), np.uint8)] * 2, count=2, size=(4, 4), fps=5.0, coding="raw")
    with open_rows(str(path), ReadOptions()) as video:
        path.unlink()
        with pytest.raises(DataError, match="a.rows: "):
            video.read(np.arange(2), None)
