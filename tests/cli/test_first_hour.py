"""What a new user does: a folder of videos as they come, `train --videos`, then the features, then the page."""

import os
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SETS = ("data.num_workers=0", "runtime.dtype=float32", "data.batch_size=4")
SMALL = ["--device", "cpu", *(word for text in SETS for word in ("--set", text))]


def write(path, codec, frames=40, rate=30, times=None, turned=False, size=(48, 64)):
    """A square that moves over a fixed picture; ``times`` in ms make the rate vary, ``turned``: by a display matrix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)))
    ground = rng.integers(0, 255, (*size, 3), dtype=np.uint8) // 3
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000 if times is not None else rate)
        for i in range(frames):
            picture = ground.copy()
            picture[10:26, i % 48 : i % 48 + 16] = (220, 60, 40)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts = i if times is None else times[i]
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if turned:
        blob = bytearray(path.read_bytes())
        at = blob.index(b"tkhd") + 4 + 40  # version and flags, times, ids; then the matrix
        blob[at : at + 36] = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
        path.write_bytes(bytes(blob))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """mp4, avi, webm, one turned, one of varying rate; and a broken, a hidden and a short file and an image."""
    folder = tmp_path_factory.mktemp("first") / "my videos"
    write(folder / "a phone clip.mp4", "libx264")
    write(folder / "turned.mp4", "libx264", turned=True)
    write(folder / "old" / "camera.avi", "mpeg4")
    write(folder / "web" / "page.webm", "libvpx")
    write(folder / "web" / "screen.mp4", "libx264", times=[40 * i + 17 * (i % 3) for i in range(40)])
    write(folder / "web" / "deep" / "more.mp4", "libx264")
    for place in ("old/again.mp4", "old/once more.mp4", "old/last.mp4", "web/other.mp4"):
        shutil.copy(folder / "web" / "deep" / "more.mp4", folder / place)
    write(folder / "short.mp4", "libx264", frames=3)
    (folder / "broken.mp4").write_bytes((folder / "turned.mp4").read_bytes()[:700])
    (folder / ".hidden.mp4").write_bytes(b"hidden")
    from PIL import Image

    Image.new("RGB", (32, 32), "red").save(folder / "thumb.jpg")
    return folder


def command(*words, cwd):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "vjepa_fast", *map(str, words)],
        cwd=cwd,
        env=env,
        text=True,
        capture_output=True,
        timeout=200,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout, done.stderr


def test_from_a_folder_of_videos_to_a_page(videos, tmp_path, monkeypatch, capsys):
    """The first command in a process of its own; the others, which would only import the same again, in this one."""
    from vjepa_fast import cli

    def go_on(*words):
        capsys.readouterr()
        assert cli.main([*map(str, words)]) == 0
        return capsys.readouterr()

    out, err = command(
        "train", "--videos", videos, "--out", "run", "--minutes", "0.02", "--steps", "3", *SMALL, cwd=tmp_path
    )
    assert "10 videos" in err and "broken.mp4: " in err and "short.mp4: " in err and "1 image" in err
    [chosen] = [line for line in err.splitlines() if line.startswith("chosen for ")]
    assert re.search(r": ViT-\w+, \d+ px, 8 frames, 3 steps of 4 clips, about .+ on this CPU$", chosen)  # by its speed
    assert "M parameters trained" in err and "tokens per clip; 3 steps of 4 clips; run" in err
    assert out.startswith("step 3: run")
    listed = [line.rsplit(" ", 1)[0].strip('"') for line in (tmp_path / "run/data/train.csv").read_text().splitlines()]
    names = {"a phone clip.mp4", "turned.mp4", "camera.avi", "page.webm", "screen.mp4", "more.mp4"}
    assert names < {os.path.basename(path) for path in listed} and len(listed) == 10

    monkeypatch.chdir(tmp_path)
    _, err = go_on("train", "--videos", videos, "--out", "run", *SMALL)
    assert "chosen for" not in err, "the same command goes on and measures nothing"

    go_on("data", "manifest", videos, "--val-fraction", "0.25", "--out", "clips.csv")
    parts = ("--train", "clips.csv", "--test", "clips_val.csv", "--probe", "knn")
    out, _ = go_on("probe", "run", *parts, "--which", "target_encoder", "--device", "cpu")
    assert "target_encoder" in out and "random init" in out

    out, _ = go_on("show", "run", "--out", "page.html", "--clips", "2", "--device", "cpu")
    assert out.startswith("page.html: ") and "2 clips, 2 with nearest ones" in out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(f'id="{part}"' in page for part in ("curves", "masks", "maps", "nearest"))


def test_the_run_of_other_videos_is_not_gone_on_with(videos, tmp_path):
    from vjepa_fast import cli

    run = tmp_path / "run"
    (run / "data").mkdir(parents=True)
    (run / "config.yaml").write_text("folder: run\n")
    (run / "data" / "own_videos.json").write_text('{"videos": "/other"}')
    assert cli.main(["train", "--videos", str(videos), "--out", str(run)]) == 2


def test_where_nothing_can_be_trained_on_nothing_is_left(tmp_path, capsys):
    from vjepa_fast import cli

    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "x.mp4").write_bytes(b"x" * 999)
    assert cli.main(["train", "--videos", str(tmp_path / "videos"), "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "none of the files can be used; the first: " in err and "quarantine" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["videos"]
