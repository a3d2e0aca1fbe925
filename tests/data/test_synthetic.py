"""Suites: what the classes mean in pixels, appearance apart from motion, and real files from a seed."""

import dataclasses
import filecmp
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import vjepa_fast
from vjepa_fast.cli import main
from vjepa_fast.data import load_manifest, probe_video, read_clip, read_image
from vjepa_fast.data.synthetic import (
    SUITES,
    Dive,
    Motion8,
    Order,
    Suite,
    TextureConfig,
    raster,
    render_clip,
    render_suite,
)
from vjepa_fast.data.synthetic.suites import COLOURS
from vjepa_fast.errors import ConfigError, DataError, UserError


def clips(suite, label, number=1, size=64, frames=16, seed=0):
    return [render_clip(suite, np.random.default_rng([seed, i]), size, frames, label=label)[0] for i in range(number)]


@pytest.mark.parametrize("name", list(SUITES))
def test_every_suite_keeps_its_promises(name, tmp_path):
    suite = SUITES[name]
    assert suite.name == name and json.dumps(dataclasses.asdict(suite)) and hash(suite) is not None
    clip, label, attributes = render_clip(name, np.random.default_rng(1), size=48, frames=6)
    assert clip.shape == (6 if suite.modality == "video" else 1, 48, 48, 3) and clip.dtype == np.uint8
    assert attributes["class"] == suite.classes[label] and json.dumps(attributes)
    assert len(set(suite.classes)) == len(suite.classes)
    again, same_label, _ = render_clip(suite, np.random.default_rng(1), size=48, frames=6)
    assert np.array_equal(clip, again) and label == same_label
    labels = {render_clip(name, np.random.default_rng(i), 32, 2)[1] for i in range(4 * len(suite.classes))}
    assert len(labels) >= 0.9 * len(suite.classes)  # 98 % of them are expected
    assert len(set(suite.factors)) == len(suite.factors) == len(suite.classes)  # factors name the class
    with pytest.raises(ValueError, match="label 999"):
        render_clip(name, np.random.default_rng(1), label=999)
    for split in ("train", "val", "test"):
        assert set(suite.split_labels(split)) <= set(range(len(suite.classes))) and suite.split_labels(split)
    manifest = load_manifest(render_suite(name, tmp_path, splits={"train": 2}, size=32, frames=4)["train"])
    assert manifest.kind == suite.modality and manifest.labels.tolist() == list(suite.split_labels("train")[:2])


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("motion8", [5405, -12939, 18589, -499, -5061, -7201]),
        ("dive", [-682, -16882, 4478, -1954, -6290, 12914]),
        ("order", [8250, -21216, -4752, 6436, -4522, 7176]),
        ("objects", [15104, -16106, -3518, 11366, -4102, 1276]),
        ("fewshot", [2706, -24688, 7462, 8012, -6966, 7946]),
        ("fewmotion", [14472, -21338, 1348, 15692, -4946, 7174]),
    ],
)
def test_clips_are_as_they_always_were(name, figures):
    """Sums of the pixels with random signs; an FFT or sine of another machine may turn single grey levels."""
    clip, _, _ = render_clip(name, np.random.default_rng(7), 32, 6, label=5)
    signs = np.random.default_rng(0).choice([-1, 1], (6, clip.size))
    assert np.abs(signs @ clip.reshape(-1).astype(np.int64) - figures).max() <= 8


@dataclasses.dataclass(frozen=True)
class Stripes(Suite):
    """A suite from elsewhere."""

    shade: float = 0.7
    name = "stripes"

    @property
    def classes(self):
        return ("rows", "columns")

    def render(self, rng, size, frames, label):
        image = np.zeros((size, size, 3))
        image[::2] = self.shade * rng.random()
        return np.repeat((image if label == 0 else image.swapaxes(0, 1))[None], frames, 0), {}


def test_a_suite_is_rendered_by_name(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(SUITES, "_entries", dict(SUITES))
    SUITES.add("stripes", Stripes())
    sizes = ["--train", "2", "--val", "0", "--test", "1", "--size", "32", "--frames", "4", "--workers", "1"]
    assert main(["synthetic", "stripes", str(tmp_path), *sizes]) == 0
    assert "stripes test: 1 clips" in capsys.readouterr().out
    assert read_clip(load_manifest(tmp_path / "train.csv").paths[1], 4).shape == (4, 32, 32, 3)
    with pytest.raises(TypeError, match="so named"):
        SUITES.add("dots", Stripes())


def test_number_of_classes():
    known = {"motion8": 8, "dive": 6, "order": 12, "objects": 48, "fewshot": 216, "fewmotion": 36}
    assert {name: len(SUITES[name].classes) for name in known} == known
    assert len(Dive(rotation_senses=2).classes) == 12


def displacement(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Shift (y, x) of b against a by phase correlation, to half a pixel."""
    window = np.hanning(a.shape[0])[:, None] * np.hanning(a.shape[1])
    fa, fb = (np.fft.fft2((x - x.mean()) * window) for x in (a.mean(2), b.mean(2)))
    peak = np.fft.ifft2(np.conj(fa) * fb / (np.abs(fa * fb) ** 0.5 + 1e-9)).real
    y, x = np.unravel_index(peak.argmax(), peak.shape)
    return np.array([(y + 32) % 64 - 32, (x + 32) % 64 - 32], float)


def test_motion8_moves_everything_where_its_label_says():
    for label, name in enumerate(SUITES["motion8"].classes):
        want = np.array([np.sin(label * np.pi / 4), np.cos(label * np.pi / 4)])
        assert (want[0] > 0.1) == ("S" in name) and (want[1] > 0.1) == ("E" in name)
        for index in range(3):
            rng = np.random.default_rng([7, index])
            clip, _, attributes = render_clip("motion8", rng, label=label)
            for f in (0, 6, 12):  # steadily, sprites and all
                moved = displacement(clip[f].astype(float), clip[f + 3].astype(float))
                assert np.abs(moved - 3 * attributes["speed"] * want).max() <= 1.0, (name, index, f, moved)
            assert 1.5 <= attributes["speed"] <= 3.5


def test_motion8_frame_content_does_not_depend_on_the_label():
    first = [clips("motion8", label)[0][0] for label in range(8)]
    assert all(np.array_equal(first[0], f) for f in first)  # same generator: same appearance whatever the label
    last = [clips("motion8", label)[0][-1] for label in range(8)]
    assert not any(np.array_equal(last[0], f) for f in last[1:])


@pytest.mark.parametrize("name", ["motion8", "dive", "order"])
def test_single_frames_do_not_tell_the_label(name):
    """Ridge regression on the pixels of one middle frame stays at chance on held-out clips."""
    classes = min(8, len(SUITES[name].classes))
    frames, labels = [], []
    for i in range(480):
        clip, label, _ = render_clip(name, np.random.default_rng([3, i]), 16, 16, label=i % classes)
        frames.append(clip[8].reshape(-1) / 255.0 - 0.5)
        labels.append(label)
    x, y = np.array(frames), np.array(labels)
    target = np.eye(classes)[y] - 1 / classes
    train, test = slice(0, 320), slice(320, 480)
    dual = np.linalg.solve(x[train] @ x[train].T + 10 * np.eye(320), target[train])
    accuracy = ((x[test] @ x[train].T @ dual).argmax(1) == y[test]).mean()
    assert accuracy < 1 / classes + 3.5 * np.sqrt((1 - 1 / classes) / classes / 160)


def test_order_reverses_into_the_reversed_pair():
    suite = Order()
    for label, pair in enumerate(suite.pairs):
        times = np.array([0.27, 0.72])
        forward = suite.pose(pair, times, 16)
        backward = suite.pose(pair[::-1], 1 - times[::-1], 16)
        for event in pair:
            np.testing.assert_allclose(forward[event][::-1], backward[event], atol=1e-12)
        assert suite.classes.index(">".join(pair[::-1])) != label
    still = Order(time_jitter=0.0)  # then whole clips reverse, to the pixel
    for label, pair in enumerate(still.pairs):
        reverse = still.pairs.index(pair[::-1])
        difference = clips(still, label)[0][::-1].astype(int) - clips(still, reverse)[0]
        assert np.abs(difference).max() <= 1


def test_order_events_happen_in_turn():
    suite = SUITES["order"]
    for label in range(len(suite.classes)):
        bumps = suite.pose(suite.pairs[label], np.array([0.25, 0.75]), 16)
        first, second = (bumps[e] for e in suite.pairs[label])
        assert first.argmax() < 6 and second.argmax() > 9 and (first * second).max() < 1e-9


def test_dive_primitives_follow_the_label(monkeypatch):
    """The pose handed to the drawing changes in one way at a time, in the order of the triple."""
    seen = {}
    monkeypatch.setattr(
        raster,
        "draw",
        lambda clip, shape, centre, radius, angle, *a, **k: seen.update(
            translate=np.abs(np.diff(centre, axis=0)).sum(1),
            scale=np.abs(np.diff(radius)),
            rotate=np.abs(np.diff(angle)),
            turn=np.diff(angle).sum(),
        ),
    )
    suite = Dive(rotation_senses=2)
    for label, triple in enumerate(suite.triples):
        render_clip(suite, np.random.default_rng(label), label=label, frames=32)
        middles = [np.average(np.arange(31), weights=seen[name.split("-")[0]]) for name in triple]
        assert middles == sorted(middles) and middles[1] - middles[0] > 8 and middles[2] - middles[1] > 8
        assert (seen["turn"] > 0) == ("rotate-cw" in triple)
        assert abs(abs(seen["turn"]) - np.radians(suite.rotate)) < 1e-6


def test_objects_show_their_colour_and_pattern():
    suite = SUITES["objects"]
    plain = dataclasses.replace(suite, background=TextureConfig(contrast=0.0), colour_jitter=0.0)
    for label, (_, name, colour) in enumerate(suite.combinations):
        image = clips(plain, label)[0][0] / 255.0
        paint = np.array(COLOURS[colour])
        lit = (np.abs(image - paint).max(-1) < 0.02).mean()
        dark = (np.abs(image - 0.25 * paint).max(-1) < 0.02).mean()
        assert lit > 0.02 and (dark > 0.004) == (name != "solid"), suite.classes[label]


def test_what_is_only_trained_on_is_as_colourful_as_what_is_read_and_shows_no_novel_appearance():
    few, objects = SUITES["fewshot"], SUITES["objects"]
    names = ("fewshot", "motion8", "objects")  # below: grey levels between the channels
    read, *trained = (np.mean([np.ptp(c[0].astype(int), axis=-1) for c in clips(n, 0, 24)]) for n in names)
    assert min(trained) > 0.9 * read > 50
    novel = {few.classes[label].rsplit("-", 1)[0] for part in ("val", "test") for label in few.split_labels(part)}
    assert novel.isdisjoint(f"{shape}-{colour}" for shape, _, colour in objects.combinations)
    assert len({colour for *_, colour in objects.combinations}) == len(COLOURS)


def test_few_shot_parts_share_no_appearance():
    suite = SUITES["fewshot"]
    parts = {s: suite.split_labels(s) for s in ("train", "val", "test")}
    assert [len(p) for p in parts.values()] == [108, 36, 72]
    looks = {s: {suite.classes[i].rsplit("-", 1)[0] for i in p} for s, p in parts.items()}
    assert len(set.union(*looks.values())) == 36 == sum(map(len, looks.values()))
    assert sorted(sum(parts.values(), ())) == list(range(216))


@pytest.mark.parametrize("name", ["fewshot", "fewmotion"])
def test_every_factor_is_in_every_part(name):
    """A novel class is a new combination: nothing that it is made of is new."""
    suite = SUITES[name]
    assert suite.few_shot and not SUITES["order"].few_shot
    for column in range(len(suite.factors[0])):
        seen = [{suite.factors[label][column] for label in suite.split_labels(s)} for s in ("train", "val", "test")]
        assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 6


def test_few_motion_moves_where_it_says_and_changes_as_it_says():
    """Displacement and growth of the sprite, measured in the pixels."""
    suite = dataclasses.replace(SUITES["fewmotion"], background=TextureConfig(contrast=0.0, grey=True))
    inside = {name: clips(suite, label)[0] for label, name in enumerate(suite.classes)}
    masks = {name: np.abs(clip.astype(int) - clip[0, 0, 0]).max(-1) > 40 for name, clip in inside.items()}
    centres = {n: np.array([[c.mean() for c in np.nonzero(f)] for f in m[[0, -1]]]) for n, m in masks.items()}
    for name in inside:
        degrees, change = name.split("-", 1)
        angle = np.radians(float(degrees))
        moved = centres[name][1] - centres[name][0]
        assert np.abs(moved - 20 * np.array([np.sin(angle), np.cos(angle)])).max() < 2.5, name
        growth = masks[name][-1].sum() / masks[name][0].sum()
        wanted = {"grow": 4.0, "shrink": 0.25}.get(change, 1.0)
        assert wanted / 1.25 < growth < wanted * 1.25, name
    middle = masks["0-pulse"].sum((1, 2))
    assert middle[4] > 2 * middle[8] and middle[12] > 2 * middle[8]  # twice there and back


def test_sub_pixel_motion_is_smooth():
    canvas = raster.texture(np.random.default_rng(0), 64, 32, 8, 0.2)
    offsets = np.stack([np.linspace(0, 2, 21), np.zeros(21)], 1)
    steps = np.abs(np.diff(raster.pan(canvas, offsets, 32), axis=0)).mean((1, 2, 3))
    assert steps.min() > 0.5 * steps.max()  # whole-pixel motion would give zeros and jumps
    np.testing.assert_array_equal(raster.pan(canvas, offsets[[20]], 32)[0], canvas[2:34, :32])


def test_textures_are_band_limited_and_periodic():
    field = raster.texture(np.random.default_rng(0), 64, coarse=32, fine=8, contrast=0.05)
    power = np.abs(np.fft.fft2(field - field.mean((0, 1)), axes=(0, 1))) ** 2
    f = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)[None])
    inside = (f >= 1 / 32) & (f <= 1 / 8)
    assert power[inside].sum() > 0.999 * power.sum()


def test_files_match_the_seed_and_the_parameters(tmp_path):
    splits = {"train": 40, "val": 3, "test": 3}
    first = render_suite("motion8", tmp_path / "a", splits=splits, size=32, frames=4, seed=3)
    second = render_suite("motion8", tmp_path / "b", splits=splits, size=32, frames=4, seed=3, workers=2)
    other = render_suite("motion8", tmp_path / "c", splits={"train": 2}, size=32, frames=4, seed=4)
    assert list(first) == ["train", "val", "test"] and list(other) == ["train"]
    for split, number in splits.items():
        a, b = load_manifest(first[split]), load_manifest(second[split])
        assert len(a) == number and a.labels.tolist() == [i % 8 for i in range(number)]
        assert all(filecmp.cmp(x, y, shallow=False) for x, y in zip(a.paths, b.paths))
        assert len(json.loads((tmp_path / "a" / f"{split}_attributes.json").read_text())) == number
    contents = [Path(p).read_bytes() for s in splits for p in load_manifest(first[s]).paths]
    assert len(set(contents)) == 46  # no clip twice, no clip in two splits
    assert Path(load_manifest(other["train"]).paths[0]).read_bytes() not in contents
    assert json.loads((tmp_path / "a" / "classes.json").read_text()) == list(Motion8().classes)
    assert json.loads((tmp_path / "a" / "suite.json").read_text())["seed"] == 3


def test_videos_are_h264_and_close_to_what_was_drawn(tiny_suites):
    path = load_manifest(tiny_suites["motion8"]["train"]).paths[0]
    assert probe_video(path) == {"frames": 16, "fps": 8.0, "height": 64, "width": 64, "codec": "h264"}
    import zlib

    rng = np.random.default_rng([0, zlib.crc32(b"motion8"), zlib.crc32(b"train"), 0])
    drawn = render_clip("motion8", rng, label=0)[0].mean(-1)
    assert np.abs(read_clip(path, 16, start=0).mean(-1) - drawn).mean() < 4
    image = load_manifest(tiny_suites["objects"]["train"]).paths[0]
    assert image.endswith(".jpg") and read_image(image).shape == (64, 64, 3)


def test_interrupted_rendering_is_completed(tmp_path):
    options = dict(size=32, frames=4, seed=1)
    paths = render_suite("motion8", tmp_path, splits={"train": 6}, **options)
    manifest = load_manifest(paths["train"])
    before = [Path(p).read_bytes() for p in manifest.paths]
    os.remove(manifest.paths[4])
    Path(manifest.paths[5]).write_bytes(b"")  # as a power cut may leave it
    os.remove(paths["train"])
    kept = os.stat(manifest.paths[0]).st_mtime_ns
    render_suite("motion8", tmp_path, splits={"train": 9}, **options)  # and more clips than before
    after = load_manifest(paths["train"])
    assert len(after) == 9 and [Path(p).read_bytes() for p in after.paths[:6]] == before
    assert os.stat(after.paths[0]).st_mtime_ns == kept  # not rendered again
    assert not [f for _, _, files in os.walk(tmp_path) for f in files if ".tmp" in f]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_rendering_leaves_no_process_and_is_completed(tmp_path):
    code = (
        "import sys; from vjepa_fast.data.synthetic import render_suite\n"
        "if __name__ == '__main__': render_suite('dive', sys.argv[1], splits={'train': 100000}, size=32, frames=4,"
        " workers=2)"
    )
    (tmp_path / "job.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(Path(vjepa_fast.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, str(tmp_path / "job.py"), str(tmp_path / "dive")], env=environment)
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("dive/train/*.mp4"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        workers = [p for p in children(process.pid) if "spawn_main" in command(p)]
        assert len(workers) == 2
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "dive" / "train.csv").exists()
    deadline = time.monotonic() + 20
    while any("spawn_main" in command(p) for p in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [p for p in workers if "spawn_main" in command(p)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
    paths = render_suite("dive", tmp_path / "dive", splits={"train": 5}, size=32, frames=4)
    assert all(len(read_clip(p, 4)) == 4 for p in load_manifest(paths["train"]).paths)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_worker_is_one_line_and_the_same_call_goes_on(tmp_path):
    def kill(done, total):
        for pid in children(os.getpid()):
            if "spawn_main" in command(pid):
                os.kill(pid, signal.SIGKILL)

    how = {"splits": {"train": 200}, "size": 32, "frames": 4, "workers": 2}
    with pytest.raises(UserError, match="dive: a worker process was killed, .*the same command goes on") as error:
        render_suite("dive", tmp_path / "dive", **how, on_progress=kill)
    assert "\n" not in str(error.value) and not (tmp_path / "dive" / "train.csv").exists()
    left = sorted((tmp_path / "dive" / "train").glob("[!.]*.mp4"))
    assert 0 < len(left) < 200 and all(len(read_clip(str(p), 4)) == 4 for p in left)
    manifest = load_manifest(render_suite("dive", tmp_path / "dive", **how)["train"])
    assert len(manifest) == 200


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_refusals_leave_the_folder_alone(tmp_path):
    options = dict(splits={"train": 2}, size=32, frames=4)
    render_suite("motion8", tmp_path / "a", seed=1, **options)
    with pytest.raises(DataError, match="another seed"):
        render_suite("motion8", tmp_path / "a", seed=2, **options)
    with pytest.raises(DataError, match="another suite_parameters"):
        render_suite(Motion8(sprites=3), tmp_path / "a", seed=1, **options)
    with pytest.raises(DataError, match="another suite"):
        render_suite("dive", tmp_path / "a", seed=1, **options)
    for change, message in (
        (dict(size=33), "even"),
        (dict(size=8), "size is 8"),
        (dict(frames=1), "frames is 1"),
        (dict(splits={"train": -1}), "train is -1"),
    ):
        with pytest.raises(DataError, match=message):
            render_suite("motion8", tmp_path / "b", **(options | change))
    with pytest.raises(ConfigError, match="'moton8'.*did you mean motion8"):
        render_suite("moton8", tmp_path / "b", **options)
    with pytest.raises(DataError, match="has the splits"):
        render_suite("fewshot", tmp_path / "b", splits={"extra": 3})
    assert not (tmp_path / "b").exists()


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write the suite.*Not a directory"):
        render_suite("motion8", tmp_path / "file" / "suite", splits={"train": 1}, size=32, frames=4)


def test_full_disk_leaves_no_manifest_and_is_completed_later(tmp_path, monkeypatch):
    from vjepa_fast.data.synthetic import write

    real, calls = write.write_video, []

    def full_after_three(path, clip, **options):
        calls.append(path)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        real(path, clip, **options)

    monkeypatch.setattr(write, "write_video", full_after_three)
    with pytest.raises(DataError, match="No space left on device"):
        render_suite("motion8", tmp_path, splits={"train": 6}, size=32, frames=4)
    assert not (tmp_path / "train.csv").exists()
    monkeypatch.setattr(write, "write_video", real)
    paths = render_suite("motion8", tmp_path, splits={"train": 6}, size=32, frames=4)
    assert all(map(os.path.isfile, load_manifest(paths["train"]).paths))


def test_grey_textures_have_the_same_first_statistics():
    fields = [raster.texture(np.random.default_rng(i), 64, 24, 8, 0.2, grey=True) for i in range(5)]
    for field in fields:
        assert np.array_equal(field[..., 0], field[..., 1]) and np.array_equal(field[..., 0], field[..., 2])
        assert abs(field.mean() - 0.5) < 0.01 and abs(field.std() - 0.2) < 0.02
    coloured = [raster.texture(np.random.default_rng(i), 64, 24, 8, 0.2).mean((0, 1)) for i in range(5)]
    assert np.std(coloured) > 0.05
