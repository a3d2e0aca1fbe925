"""Every start of every kind of film gives the frames that a decode from the beginning shows, to the last bit."""

import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks.films import KINDS, Lacking, number_of, plain_decode
from benchmarks.frame_starts import page, wrong_starts
from vjepa_fast.data import Sampling, read_clip
from vjepa_fast.data.decoders.index import FROM_START
from vjepa_fast.data.decoders.index_cache import index_of

LOOK_TWICE = {"mjpeg avi, frames repeated"}  # a number comes three times
FILMS = Path(os.environ.get("VJEPA_FAST_FILMS") or "none")


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """``film(kind)`` -> its path, made once."""
    made = {}

    def make(kind: str) -> Path:
        if kind not in made:
            try:
                made[kind] = KINDS[kind](tmp_path_factory.mktemp("film"))
            except Lacking as reason:
                pytest.skip(f"this FFmpeg cannot write it: {reason}")
        return made[kind]

    return make


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_start(film, kind):
    path = film(kind)
    frames, wrong = wrong_starts(path)
    assert not wrong
    turned = "turned" in kind or "wide" in kind  # the squares are elsewhere
    numbers = [] if turned else [number_of(picture) for picture in plain_decode(path)]
    assert frames > 5 and (kind in LOOK_TWICE or all(a < b for a, b in zip(numbers, numbers[1:])))


def test_long_steps_and_held_ends(film):
    for kind in ("h264 mp4, B-frames", "mpeg2 ts", "mjpeg avi", "gif"):
        shown = plain_decode(film(kind))
        for sampling in (Sampling(9), Sampling(spread="whole"), Sampling(14, short="hold")):
            numbers = sampling.indices("x", 30, 25.0, 4, 1 if sampling.short == "refuse" else 0, None)
            clip = read_clip(film(kind), 4, sampling=sampling, start=1 if sampling.short == "refuse" else 0)
            assert np.array_equal(clip, np.stack([shown[n] for n in numbers])), (kind, sampling)


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("h264 mp4, B-frames", "time"),
        ("h264 mp4, cut by an edit list", "time"),
        ("hevc mp4, RASL", "time"),
        ("vp8 webm of a browser", "time"),
        ("mpeg4 avi, packed B-frames", "time"),
        ("h264 ts", "bytes"),
        ("mpeg2 mpg", "time"),
        ("gif", "none"),
        ("raw avi, palette", "none"),
    ],
)
def test_reading_begins_near_the_frame(film, kind, way):
    """Not at the start of the file, which is right as well but slow; and at the start where the state begins there."""
    index = index_of(film(kind))
    row = index.seek_point(index.frames - 1)
    assert index.seek == way
    assert (row == FROM_START) if way == "none" else index.key[row] >= 10


@pytest.mark.parametrize(
    ("kind", "rate", "constant"),
    [
        ("h264 mp4, last frame held", 25.0, True),
        ("h264 avi, B-frames", 25.0, True),
        ("mpeg4 avi, packed B-frames", 25.0, True),
        ("h264 ts, two joined", 25.0, True),
        ("h264 stream", 25.0, True),
        ("h264 mp4, variable rate", 29 / 3.4, False),
        ("vp8 webm of a browser", 29.65, False),
    ],
)
def test_rates(film, kind, rate, constant):
    index = index_of(film(kind))
    assert index.rate == pytest.approx(rate, abs=0.01) and index.constant == constant
    assert np.all(np.diff(index.times) > 0)


def test_clips_go_by_time_where_the_rate_varies(film):
    path = film("h264 mp4, variable rate")  # 15 frames 40 ms apart, 15 frames 200 ms apart
    assert [number_of(p) for p in read_clip(path, 6, 2, start=10)] == [10, 12, 14, 16, 18, 20]
    assert [number_of(p) for p in read_clip(path, 6, fps=10, start=0)] == [0, 2, 5, 7, 10, 12]
    assert [number_of(p) for p in read_clip(path, 6, fps=10, start=14)] == [14, 15, 16, 16, 17, 17]
    assert [number_of(p) for p in read_clip(path, 4, duration=1.6, start=15)] == [15, 17, 19, 21]
    times = index_of(path).times
    draws = (Sampling(fps=2).indices("x", 30, 8.5, 5, "random", np.random.default_rng(i), times) for i in range(300))
    firsts = {draw[0] for draw in draws}
    assert firsts == set(range(20))  # 2 s from the first frame on: frame 19 is shown at 1.4 of 3.4 s


@pytest.mark.skipif(not FILMS.is_dir(), reason="VJEPA_FAST_FILMS names no folder (python benchmarks/fetch_films.py)")
@pytest.mark.parametrize("path", sorted(FILMS.iterdir()) if FILMS.is_dir() else [], ids=lambda path: path.name)
def test_real_films(path):
    assert wrong_starts(path, every=23)[1] == []


def test_the_table_of_the_page_is_what_was_recorded():
    docs = Path(__file__).parents[2] / "docs" / "data.md"
    text = docs.read_text(encoding="utf-8")
    assert page(text) == text and "| h264 ts | 30 | 29 of 29 |" in text
