"""Frame-exact reading, frame sampling, and one-line errors for files that are no use."""

import itertools

import numpy as np
import pytest

from vjepa_fast.data import Sampling, load_manifest, probe_video, read_clip, read_image
from vjepa_fast.errors import DataError


def test_every_start_and_step_is_frame_exact(counter_video, numbers):
    for start, step in itertools.product(range(0, 26, 3), (1, 2, 3)):
        if start + 4 * step < 40:
            clip = read_clip(counter_video, 5, step, start=start)
            assert numbers(clip) == [start + i * step for i in range(5)]
    assert clip.shape == (5, 32, 48, 3) and clip.dtype == np.uint8


def test_center_and_random_starts(counter_video, numbers):
    assert numbers(read_clip(counter_video, 16, 2, start="center")) == list(range(4, 36, 2))
    starts = {numbers(read_clip(counter_video, 39, generator=np.random.default_rng(i)))[0] for i in range(20)}
    assert starts == {0, 1}  # both places that fit occur
    again = [read_clip(counter_video, 8, generator=np.random.default_rng(3)) for _ in range(2)]
    assert np.array_equal(*again)


@pytest.mark.parametrize(
    ("fps", "video_fps", "step"),
    [(16, 25.0, 1), (16, 29.97, 1), (10, 29.97, 3), (8, 25.0, 3), (30, 24.0, 1), (12, 24.0, 2), (4, 29.97, 7)],
)
def test_step_of_a_frame_rate(fps, video_fps, step):
    assert Sampling(fps=fps).step(video_fps, 16) == step


def test_duration_and_fps_reach_the_frames(counter_video, numbers):
    assert numbers(read_clip(counter_video, 4, fps=8, start=0)) == [0, 3, 6, 9]  # 25 // 8
    assert numbers(read_clip(counter_video, 4, duration=0.8, start=2)) == [2, 7, 12, 17]  # 0.8 s x 25 / 4
    with pytest.raises(DataError, match="one of frame_step, fps and duration"):
        read_clip(counter_video, 4, 2, fps=8)


def test_published_spread():
    frames = Sampling(2, spread="published").indices("x", 100, 25.0, 16, 10, None)
    assert frames.tolist() == [10, 12, 14, 16, 18, 20, 22, 24, 27, 29, 31, 33, 35, 37, 39, 41]
    assert Sampling(1, spread="published").indices("x", 16, 25.0, 16, "random", None).tolist() == list(range(16))


def test_size_scales(counter_video):
    assert read_clip(counter_video, 2, start=0, size=20).shape == (2, 20, 20, 3)
    assert read_clip(counter_video, 2, start=0, size=(20, 30)).shape == (2, 20, 30, 3)


def test_other_containers_and_b_frames(tmp_path, numbers):
    import av

    frames = np.broadcast_to(6 * np.arange(30, dtype=np.uint8)[:, None, None, None], (30, 32, 32, 3)).copy()
    for suffix, codec, options in (
        (".mkv", "libx264", {"crf": "1", "bf": "3", "g": "10"}),
        (".avi", "mjpeg", {"qmin": "1", "qmax": "1"}),
        (".webm", "libvpx-vp9", {"crf": "4"}),
    ):
        path = tmp_path / f"film{suffix}"
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=10)
            stream.height = stream.width = 32
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.options = options
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        assert probe_video(path)["frames"] == 30
        for start in (0, 7, 17):
            assert numbers(read_clip(path, 5, 2, start=start)) == list(range(start, start + 10, 2)), suffix


def test_sound_longer_than_the_picture(tmp_path, numbers):
    """Matroska tells a duration only: some 50 frames by the sound, 20 in truth. Every clip drawn must be readable, and
    the cache must draw the same."""
    import av

    from vjepa_fast.data.source import SourceReader

    path = str(tmp_path / "film.mkv")
    frames = np.broadcast_to(6 * np.arange(20, dtype=np.uint8)[:, None, None, None], (20, 32, 32, 3)).copy()
    with av.open(path, "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.height, video.width, video.pix_fmt, video.options = 32, 32, "yuv420p", {"crf": "1"}
        sound = container.add_stream("aac", rate=16000, layout="mono")
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode())
        for _ in range(78):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    assert probe_video(path)["frames"] > 45
    starts = set()
    cached, plain = SourceReader(Sampling(), cache_mb=10), SourceReader(Sampling())
    for seed in range(30):
        clip = plain.read(path, "video", 4, "random", np.random.default_rng(seed))
        first = numbers(clip)[0]
        assert numbers(clip) == list(range(first, first + 4))
        assert np.array_equal(clip, cached.read(path, "video", 4, "random", np.random.default_rng(seed)))
        starts.add(first)
    assert len(starts) > 8
    with pytest.raises(DataError, match="has 20 frames"):
        read_clip(path, 30)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("zero", "empty"),
        ("truncated", "truncated"),
        ("cut", "truncated"),
        ("garbage", "unreadable"),
        ("text", "unreadable"),
        ("audio", "sound but no video"),
        ("short", "has 10 frames.*needs 16"),
        ("disguised", "is an image"),
        ("image", "is an image"),
        ("missing", "No such file"),
    ],
)
def test_broken_videos(broken, kind, reason):
    with pytest.raises(DataError, match=reason) as caught:
        read_clip(broken[kind], 16, start="center")
    assert str(caught.value).startswith(broken[kind]) and "\n" not in str(caught.value)


def test_short_by_one_step(counter_video):
    assert len(read_clip(counter_video, 14, 3)) == 14  # frames 0 to 39
    with pytest.raises(DataError, match="has 40 frames, a clip of 15 frames at step 3 needs 43"):
        read_clip(counter_video, 15, 3)


def test_images(tiny_suites, broken, counter_video, tmp_path):
    path = load_manifest(tiny_suites["objects"]["train"]).paths[0]
    image = read_image(path)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8 and image.std() > 5
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(open(path, "rb").read()[:400])
    for bad, reason in (
        (counter_video, "is a video, an image is meant"),
        (broken["zero"], "empty"),
        (str(cut), "damaged|not a readable"),
        (str(tmp_path / "none.jpg"), "No such file"),
        (str(tmp_path), "is a folder"),
    ):
        with pytest.raises(DataError, match=reason) as caught:
            read_image(bad)
        assert "\n" not in str(caught.value) and bad in str(caught.value)
