"""Every registered decoder: exact frames, whole videos, one-line errors; and what PyAV says of files of no use."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from vjepa_fast.cli import main
from vjepa_fast.data import ClipLoader, Sampling, load_manifest, probe_video, read_clip, read_image
from vjepa_fast.data.decoders import DECODERS, Decoder, choose_decoder
from vjepa_fast.data.decoders.pyav import PyAV
from vjepa_fast.errors import ConfigError, DataError


@pytest.fixture(params=list(DECODERS))
def decoder(request):
    """Each decoder that can be used on this machine."""
    if reasons := DECODERS[request.param].objections():
        pytest.skip(f"{request.param}: {'; '.join(reasons)}")
    return choose_decoder(request.param)


def test_every_start_and_step_is_frame_exact(decoder, counter_video, numbers):
    for start, step in itertools.product(range(0, 26, 3), (1, 2, 3)):
        if start + 4 * step < 40:
            clip = decoder.read_clip(counter_video, 5, Sampling(step), start)
            assert numbers(clip) == [start + i * step for i in range(5)]
    assert clip.shape == (5, 32, 48, 3) and clip.dtype == np.uint8
    assert decoder.read_clip(counter_video, 2, Sampling(), 0, size=(20, 30)).shape == (2, 20, 30, 3)
    held = decoder.read_clip(counter_video, 4, Sampling(13, short="hold"), 0)
    assert numbers(held) == [0, 13, 26, 39]
    assert numbers(decoder.read_clip(counter_video, 5, Sampling(20, short="hold"), 0)) == [0, 20, 39, 39, 39]


def test_header_whole_video_and_threads(decoder, counter_video):
    info = decoder.probe(counter_video)
    assert (info["frames"], info["fps"], info["height"], info["width"]) == (40, 25.0, 32, 48)
    assert decoder.read_video(counter_video, max_bytes=40 * 32 * 48 * 3 - 1) is None
    whole = decoder.read_video(counter_video, max_bytes=40 * 32 * 48 * 3)
    shares = []
    decoder.verify(counter_video, shares.append)
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1

    def both(seed):
        args = (counter_video, 6, Sampling(fps=8), "random")
        one, two = (f(*args, np.random.default_rng(seed)) for f in (decoder.read_clip, whole.clip))
        return one, np.array_equal(one, two)

    alone = [both(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(both, range(8)))
    assert all(same for _, same in alone + together)
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(alone, together))


def test_files_of_no_use_are_data_errors_of_one_line(decoder, broken):
    for path in broken.values():
        with pytest.raises(DataError) as caught:
            decoder.read_clip(path, 16, Sampling(), "center")
        if path != broken["short"]:
            with pytest.raises(DataError):
                decoder.verify(path, lambda share: None)
        assert str(caught.value).startswith(path) and "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is counted on Linux")
def test_memory_does_not_grow_with_clips(decoder, counter_video, tiny_suites):
    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    paths = [counter_video, *load_manifest(tiny_suites["motion8"]["train"]).paths[:3]]
    read = [decoder.read_clip(paths[i % 4], 8, Sampling(), generator=np.random.default_rng(i)).shape for i in range(40)]
    before = resident()
    read += [
        decoder.read_clip(paths[i % 4], 8, Sampling(), generator=np.random.default_rng(i)).shape for i in range(400)
    ]
    assert len(read) == 440 and resident() - before < 4  # a decoder or file left open takes 0.1 MB and more


class Negative(PyAV):
    """Black is white."""

    usable = True

    @classmethod
    def objections(cls):
        return [] if cls.usable else ["the lamp is off"]

    def read_clip(self, *args, **kwargs):
        return 255 - super().read_clip(*args, **kwargs)

    def read_video(self, *args):
        return None


@pytest.fixture
def negative(monkeypatch):
    monkeypatch.setattr(DECODERS, "_entries", dict(DECODERS))
    DECODERS.add("negative", Negative)


def test_a_decoder_is_used_by_name(negative, counter_video, make_config, write_manifest, capsys, monkeypatch):
    manifest = write_manifest([counter_video])
    clips = []
    for name in ("auto", "pyav", "negative"):
        with ClipLoader(make_config(manifest, batch_size=1, decoder=name)) as loader:
            clips.append(next(loader).groups[0].clip)
    assert (clips[0] == clips[1]).all() and (clips[2].int() - (255 - clips[0].int())).abs().max() <= 1
    assert np.array_equal(
        read_clip(counter_video, 4, start=2, decoder="negative"), 255 - read_clip(counter_video, 4, start=2)
    )
    assert main(["data", "check", manifest, "--decoder", "negative", "--speed", "0"]) == 0
    monkeypatch.setattr(Negative, "usable", False)
    with pytest.raises(ConfigError, match="data.decoder: .*negative.*the lamp is off; usable: auto, .*pyav"):
        ClipLoader(make_config(manifest, decoder="negative"))
    capsys.readouterr()
    assert main(["data", "check", manifest, "--decoder", "pyavv"]) == 2
    assert "--decoder: unknown decoder 'pyavv'" in capsys.readouterr().err


def test_only_decoders_are_registered():
    with pytest.raises(TypeError, match="derived from"):
        DECODERS.add("thing", object())
    with pytest.raises(TypeError):
        Decoder()


def test_center_and_random_starts(counter_video, numbers):
    assert numbers(read_clip(counter_video, 16, 2, start="center")) == list(range(4, 36, 2))
    starts = {numbers(read_clip(counter_video, 39, generator=np.random.default_rng(i)))[0] for i in range(20)}
    assert starts == {0, 1}  # both places that fit occur
    again = [read_clip(counter_video, 8, generator=np.random.default_rng(3)) for _ in range(2)]
    assert np.array_equal(*again)
    assert read_clip(counter_video, 2, start=0, size=20).shape == (2, 20, 20, 3)


def test_duration_and_fps_reach_the_frames(counter_video, numbers):
    assert numbers(read_clip(counter_video, 4, fps=8, start=0)) == [0, 3, 6, 9]  # 25 // 8
    assert numbers(read_clip(counter_video, 4, duration=0.8, start=2)) == [2, 7, 12, 17]  # 0.8 s x 25 / 4
    with pytest.raises(DataError, match="one of frame_step, fps and duration"):
        read_clip(counter_video, 4, 2, fps=8)


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
    """Matroska gives a duration only: some 50 frames by the sound, 20 in truth. They are counted, every clip drawn is
    readable, and the cache draws the same."""
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
    assert probe_video(path)["frames"] == 20
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
    with pytest.raises(DataError, match=reason):
        read_clip(broken[kind], 16, start="center")


def test_short_by_one_step(counter_video):
    assert len(read_clip(counter_video, 14, 3)) == 14  # frames 0 to 39
    with pytest.raises(DataError, match="has 40 frames, a clip of 15 frames at step 3 needs 43"):
        read_clip(counter_video, 15, 3)


def test_images(tiny_suites, broken, counter_video, tmp_path):
    path = load_manifest(tiny_suites["objects"]["train"]).paths[0]
    image = read_image(path)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8 and image.std() > 5
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(Path(path).read_bytes()[:400])
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
