"""The frame index: packed and unpacked, kept beside the manifest, made anew when a file changes; damage and limits."""

import dataclasses
import os
import shutil
import time

import numpy as np
import pytest

from benchmarks.films import KINDS, encode, number_of, plain_decode
from vjepa_fast.cli import main
from vjepa_fast.data import ClipLoader, load_manifest, read_clip
from vjepa_fast.data.decoders import choose_decoder, index_cache
from vjepa_fast.data.decoders.ffmpeg import Film
from vjepa_fast.data.decoders.index import FROM_START, FrameIndex, even_out, rate_of
from vjepa_fast.data.decoders.index_cache import IndexCache, index_of
from vjepa_fast.data.decoders.scan import scan
from vjepa_fast.data.manifests.check import check_manifest
from vjepa_fast.data.media import ReadOptions
from vjepa_fast.errors import DataError

KEEP = ReadOptions(corrupt="keep")


def same(a: FrameIndex, b: FrameIndex) -> bool:
    names = [f.name for f in dataclasses.fields(FrameIndex)]
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)


@pytest.fixture
def film(tmp_path):
    return KINDS["h264 mp4, B-frames"](tmp_path)


@pytest.fixture
def scans(monkeypatch):
    """Paths that were scanned, by a cache that knows nothing at first."""
    paths = []

    def counted(path, *args, **kwargs):
        paths.append(path)
        return scan(path, *args, **kwargs)

    monkeypatch.setattr(index_cache, "scan", counted)
    monkeypatch.setattr(index_cache.INDICES, "__dict__", IndexCache().__dict__)
    return paths


def test_packing(film):
    index = index_of(film)
    packed = index.pack()
    assert same(FrameIndex.unpack(packed), index) and len(packed) < 400
    for other in (packed[:-5], b"", packed[:40] + bytes(10) + packed[50:]):
        with pytest.raises(ValueError, match=r"."):
            FrameIndex.unpack(other)


def test_decoding_gives_the_index_that_the_packets_gave(film):
    assert same(scan(str(film), ReadOptions(), decode=True), index_of(film))


def test_seek_points_are_keys_that_later_frames_do_not_reach_behind(film):
    index = index_of(film)
    rows = [index.seek_point(n) for n in range(index.frames)]
    assert rows[0] == FROM_START and rows == sorted(rows)
    for number, row in enumerate(rows):
        if row != FROM_START:
            assert index.order[number:].min() >= index.key[row]
    # a frame shown after the second key frame that is in a packet before it: that key proves nothing
    order = index.order.copy()
    order[[3, 14]] = order[[14, 3]]
    broken = dataclasses.replace(index, order=order)
    assert broken.seek_point(13) == FROM_START


def test_kept_beside_the_manifest(film, scans, write_manifest, make_config, capsys):
    manifest = write_manifest([film])
    for _ in range(2):
        read_clip(film, 4)
    assert scans == [str(film)]  # in memory
    assert main(["data", "check", manifest, "--speed", "0"]) == 0 and len(scans) == 1
    assert os.path.exists(manifest.replace(".csv", ".frames"))
    index_cache.INDICES.__dict__.update(IndexCache().__dict__)  # as in a new process
    with ClipLoader(make_config(manifest, batch_size=2)) as loader:
        next(loader)
    assert len(scans) == 1  # from the disk
    os.utime(film, ns=(1, time.time_ns()))
    index_cache.INDICES.__dict__.update(IndexCache().__dict__)
    load_manifest(manifest)
    read_clip(film, 4)
    assert len(scans) == 2  # the file has changed


def test_a_folder_can_move_and_a_damaged_file_counts_for_nothing(film, scans, tmp_path):
    (tmp_path / "a").mkdir()
    shutil.copy2(film, tmp_path / "a")
    manifest = tmp_path / "a" / "m.csv"
    manifest.write_text(f"{film.name} 0\n")
    assert main(["data", "check", str(manifest), "--speed", "0"]) == 0 and len(scans) == 1
    shutil.move(tmp_path / "a", tmp_path / "b")
    for content in (None, b"", b"PK\x03\x04 no", (tmp_path / "b" / "m.frames").read_bytes()[:-30]):
        if content is not None:
            (tmp_path / "b" / "m.frames").write_bytes(content)
        index_cache.INDICES.__dict__.update(IndexCache().__dict__)
        read_clip(load_manifest(tmp_path / "b" / "m.csv").paths[0], 4)
        assert len(scans) == 1 + (content is not None)
        scans[1:] = []


def test_little_is_kept_in_memory(monkeypatch, film, tmp_path):
    monkeypatch.setattr(index_cache, "_PACKED", 1000)
    monkeypatch.setattr(index_cache, "_READY", 100)
    cache = IndexCache()
    for i in range(9):
        shutil.copy(film, tmp_path / f"{i}.mp4")
        cache.get(str(tmp_path / f"{i}.mp4"), ReadOptions())
    assert cache.known(str(tmp_path / "8.mp4")) is not None and cache.known(str(tmp_path / "0.mp4")) is None


def test_a_wrong_index_is_found_out_and_made_by_decoding(film):
    shown = plain_decode(film)
    index = index_of(film)
    order = np.delete(index.order, 20)
    wrong = dataclasses.replace(index, order=order, pts=index.pts[:-1])
    index_cache.INDICES._keep(str(film), index_cache._stamp(str(film)), wrong)
    assert np.array_equal(read_clip(film, 4, start=18), np.stack(shown[18:22]))
    assert index_of(film).frames == 30


def test_joined_times_and_rates():
    pts = np.array([0, 10, 20, 30, 5000, 5010, 5020, 7, 17])
    assert even_out(pts, 100).tolist() == list(range(0, 90, 10))
    assert even_out(pts[:4], np.inf).tolist() == [0, 10, 20, 30]
    assert rate_of(np.arange(0, 60000, 1001), 1 / 30000, [21.7, 30000 / 1001]) == (30000 / 1001, True)
    assert rate_of(np.round(np.arange(300) * 1001 / 30), 1e-3, [])[0] == pytest.approx(30000 / 1001)
    assert rate_of(np.array([0, 40, 80, 280]), 1e-3, [25.0]) == (pytest.approx(3 / 0.28), False)
    assert rate_of(np.array([5]), 1e-3, [25.0]) == (25.0, True)


@pytest.fixture(scope="module")
def hurt(tmp_path_factory):
    """A film with 16 damaged bytes in one P-frame, which the decoder paints over, and its true frames."""
    path = encode(tmp_path_factory.mktemp("hurt") / "a.mp4", "libx264", {"bf": "2", "g": "10", "qp": "8"})
    shown = plain_decode(path)
    index, data = index_of(path), bytearray(path.read_bytes())
    import av

    with av.open(str(path)) as film:
        packets = [(p.pos, p.size, p.is_keyframe) for p in film.demux(video=0) if p.size]
    number, (at, _, _) = max(
        ((n, p) for n, p in enumerate(packets) if not p[2] and 10 < n < 20), key=lambda item: item[1][1]
    )
    data[at + 20 : at + 36] = np.random.default_rng(0).bytes(16)
    path = path.with_name("b.mp4")
    path.write_bytes(data)
    return path, shown, int(index.place[number])


def test_clips_that_refer_to_damage_are_refused(hurt, write_manifest):
    path, shown, at = hurt
    refused = []
    for start in range(27):
        try:
            clip = read_clip(path, 3, start=start)
            assert np.array_equal(clip, np.stack(shown[start : start + 3]))
        except DataError:
            refused.append(start)
    assert at in refused and refused == list(range(12, 20))  # up to the next key frame, and B-frames before
    with pytest.raises(DataError, match=f"{path}: damaged video, frame {at} of 30 is painted over"):
        read_clip(path, 3, start=at)
    manifest = load_manifest(write_manifest([path]))
    assert len(check_manifest(manifest, full=True)) == 1
    assert check_manifest(manifest, full=True, options=KEEP) == []
    kept = choose_decoder(options=KEEP).read_video(str(path), 10**9)
    assert kept.frames.shape == (30, 48, 64, 3) and np.array_equal(kept.frames[:8], np.stack(shown[:8]))


def test_cut_off_films(tmp_path):
    """An .mp4 that lists what is missing is refused; what a decoder can still show of it is kept where asked."""
    path = encode(tmp_path / "a.mp4", "libx264", {"bf": "0", "g": "10"}, container={"movflags": "faststart"})
    shown = plain_decode(path)
    path.write_bytes(path.read_bytes()[: int(0.7 * path.stat().st_size)])
    with pytest.raises(DataError, match=r"truncated video, the file ends before the last \d+ of 30 frames"):
        read_clip(path, 2, start=0)
    clip = choose_decoder(options=KEEP).read_video(str(path), 10**9).frames
    assert 10 < len(clip) < 30 and np.array_equal(clip[:10], np.stack(shown[:10]))


def test_limits_make_bad_samples(film, make_config, write_manifest, tmp_path, monkeypatch):
    for key, value in (("max_pixels", 64 * 48 - 1), ("max_clip_mb", 1), ("max_seconds", 1e-9)):
        if key == "max_clip_mb":
            film = encode(tmp_path / "wide.mp4", "libx264", size=(640, 480), numbers=range(8))
        cfg = make_config(write_manifest([film] * 3), max_bad_fraction=1.0, **{key: value})
        with pytest.raises(DataError, match=rf"data\.{key}"), ClipLoader(cfg) as loader:
            next(loader)
    # the size is looked at before anything is decoded
    monkeypatch.setattr(Film, "decode", None)
    with pytest.raises(DataError, match="data.max_pixels"):
        index_cache.IndexCache().get(str(film), ReadOptions(max_pixels=10))


def test_no_memory_makes_a_bad_sample(film, monkeypatch):
    monkeypatch.setattr(np, "empty", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(DataError, match=r"b.mp4: no memory for its frames.*data.max_clip_mb"):
        read_clip(film, 4)


def test_a_full_check_takes_no_more_memory_for_a_longer_film(tmp_path, write_manifest):
    """Each frame of these takes 0.9 MB, and the array of a clip would be the largest thing by far."""
    import tracemalloc

    path = encode(tmp_path / "long.mp4", "libx264", {"preset": "ultrafast"}, size=(640, 480), numbers=range(60))
    manifest, shares = load_manifest(write_manifest([path])), []
    tracemalloc.start()
    assert check_manifest(manifest, num_frames=1, full=True, workers=1, on_progress=shares.append) == []
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
    assert shares == sorted(shares) and shares[-1] == 1.0 and 0 < shares[1] < 1


def test_numbers_are_the_truth_without_painting(film):
    assert [number_of(p) for p in read_clip(film, 5, 3, start=11)] == [11, 14, 17, 20, 23]


@pytest.mark.parametrize(
    "kind",
    ["h264 mp4, B-frames", "h264 mkv", "h264 ts", "mpeg4 avi, B-frames", "mpeg2 mpg", "vp9 webm, hidden frames", "gif"],
)
def test_mutated_films(tmp_path, kind):
    """They are refused, or read; clips of H.264 and MPEG that are read are consecutive true frames, but for a few."""
    path = KINDS[kind](tmp_path)
    true = np.stack(plain_decode(path)).astype(np.int16)
    data, wrong, read = path.read_bytes(), 0, 0
    for seed in range(12):
        generator, hurt = np.random.default_rng(seed), bytearray(data)
        at = int(generator.integers(len(data) // 8, len(data) - 16))
        if seed % 2:
            hurt[at] ^= 1 << int(generator.integers(8))
        else:
            hurt[at : at + 16] = generator.bytes(16)
        other = path.with_name(f"{seed}{path.suffix}")
        other.write_bytes(hurt)
        for start in range(0, 26, 5):
            try:
                clip = read_clip(other, 3, start=start).astype(np.int16)
            except DataError as error:
                assert str(error).startswith(str(other))  # noqa: PT017  # whether it raises depends on the damage
                continue
            read += 1
            if clip.shape[1:] == true.shape[1:]:
                errors = [np.abs(clip - true[first : first + 3]).mean() for first in range(28)]
                wrong += min(errors) > 8
    assert read > 5
    assert kind[:2] not in ("h2", "mp") or wrong <= 0.1 * read
