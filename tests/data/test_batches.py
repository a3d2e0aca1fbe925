"""Batches decoded as a whole: the same as those read clip by clip, whatever the decoder refuses; DALI where it is."""

import dataclasses
import logging
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from vjepa_fast.data import ClipLoader, read_image
from vjepa_fast.data.decoders import DECODERS, BatchDecoder, Facts
from vjepa_fast.data.decoders.api import VideoInfo
from vjepa_fast.data.decoders.dali import Dali, DaliBatches
from vjepa_fast.data.decoders.pyav import PyAV
from vjepa_fast.data.views.augment import View, apply_view
from vjepa_fast.errors import ConfigError


class Whole(PyAV):
    """Decodes batches with PyAV, and is wrong in the ways that tests ask for."""

    made: "list[Batches]" = []

    def batches(self, device, size, threads):
        self.made.append(Batches(self))
        return self.made[-1]


class Batches(BatchDecoder):
    refuses: tuple[str, ...] = ()  # paths
    lacks: tuple[str, ...] = ()  # paths that it takes and does not decode
    wrong = False

    def __init__(self, decoder):
        self.decoder, self.sizes, self.verdict = decoder, [], {}

    def look(self, path, kind):
        if path in self.refuses:
            return None
        if kind == "image":
            height, width, _ = read_image(path).shape
            return Facts(VideoInfo(frames=1, fps=1, height=height, width=width, codec="png"), "image")
        with self.decoder.open(path) as video:
            return Facts(video.info, "video", video.times)

    def decode(self, requests, size):
        self.sizes.append(len(requests))
        return [None if r.path in self.lacks else self.one(r, size) for r in requests]

    def one(self, r, size):
        assert len(r.data) > 100 and r.data.dtype == np.uint8
        if r.image:
            frames = read_image(r.path)[None]
        else:
            with self.decoder.open(r.path) as video:
                frames = video.read(r.numbers, None)
        return apply_view(255 - frames if self.wrong else frames, View(*r.box, r.flip), size)

    def doubts(self, request):
        return request.kind not in self.verdict

    def compare(self, request, clip, usual):
        same = torch.equal(clip, usual)
        if same:  # else it goes on being in doubt
            self.verdict[request.kind] = True
        return same

    def close(self):
        self.decoder = None


@pytest.fixture
def whole(monkeypatch):
    monkeypatch.setattr(DECODERS, "_entries", dict(DECODERS))
    monkeypatch.setattr(Whole, "made", [])
    DECODERS.add("whole", Whole)
    return Whole.made


def take(cfg, number, **options):
    with ClipLoader(cfg, **options) as loader:
        return [next(loader) for _ in range(number)], loader


def named(cfg, decoder, **settings):
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, decoder=decoder, **settings))


def clips_of(batches):
    return [(p, c) for b in batches for g in b.groups for p, c in zip(g.paths, g.clip)]


def equal(a, b):
    pairs = list(zip(clips_of(a), clips_of(b), strict=True))
    return all(p == q and torch.equal(c, d) for (p, c), (q, d) in pairs)


@pytest.fixture
def mixture(tiny_suites, make_config):
    manifests = tiny_suites["motion8"]["train"], tiny_suites["objects"]["train"], tiny_suites["motion8"]["val"]
    return make_config(*manifests, dataset_fpcs=(8, 8, 4), datasets_weights=(0.4, 0.3, 0.3), batch_size=6)


def test_whole_batches_are_what_clips_read_one_by_one_are(whole, mixture):
    plain, _ = take(mixture, 6)
    for workers in (0, 2):
        assert equal(plain, take(named(mixture, "whole", num_workers=workers), 6)[0])
    assert equal(plain[4:], take(named(mixture, "whole"), 2, start_step=4)[0])
    halves = [take(named(mixture, "whole", batch_size=3), 2, rank=r, world=2)[0] for r in (0, 1)]
    joined = Counter(c.numpy().tobytes() for half in halves for _, c in clips_of(half))
    assert joined == Counter(c.numpy().tobytes() for _, c in clips_of(plain[:2]))
    assert max(whole[0].sizes) > 1 and whole[0].decoder is None  # they were decoded together, and it was closed


def test_what_is_refused_or_wrong_is_read_in_the_usual_way(whole, mixture, monkeypatch):
    plain, loader = take(mixture, 4)
    paths = loader.manifests[0].paths
    monkeypatch.setattr(Batches, "refuses", tuple(paths[::3]))
    monkeypatch.setattr(Batches, "lacks", tuple(paths[1::3]))
    assert equal(plain, take(named(mixture, "whole"), 4)[0])
    monkeypatch.setattr(Batches, "wrong", True)
    assert equal(plain, take(named(mixture, "whole"), 4)[0])  # each was compared, and found wrong


def test_bad_files_are_replaced_by_the_same_ones(whole, tiny_suites, broken, write_manifest, make_config):
    from vjepa_fast.data import load_manifest

    good = load_manifest(tiny_suites["motion8"]["train"]).paths
    manifest = write_manifest([*good[:6], *(broken[k] for k in ("zero", "cut", "garbage", "missing", "image"))])
    cfg = make_config(manifest, max_bad_fraction=1.0)
    (plain, one), (batches, two) = take(cfg, 4), take(named(cfg, "whole", num_workers=2), 4)
    assert equal(plain, batches) and one.bad.count
    assert [path for path, _ in one.bad.samples] == [path for path, _ in two.bad.samples]


def film(path, codec, options, size=(96, 64), fmt="yuv420p", frames=24):
    """A film of squares that move, two pixels a frame."""
    import av

    x, y = np.arange(size[0]), np.arange(size[1])[:, None]
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=Fraction(25), options=options)
        stream.width, stream.height, stream.pix_fmt = *size, fmt
        for i in range(frames):
            wave = 120 + 60 * np.sin((x + 5 * i) / 6) * np.sin((y + i) / 5)
            picture = np.stack([wave, 255 - wave, np.full_like(wave, 10 * i)], -1).astype(np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    return str(path)


def test_dali_gives_the_frames_and_boxes_of_pyav(tmp_path, write_manifest, make_config, caplog):
    if reasons := Dali.objections():
        pytest.skip("; ".join(reasons))
    slow = {"g": "10", "lag-in-frames": "8", "auto-alt-ref": "1", "cpu-used": "8", "b": "400k"}
    films = [
        film(tmp_path / "a.webm", "libvpx-vp9", slow),
        film(tmp_path / "b.webm", "libvpx", slow, size=(80, 80)),
        film(tmp_path / "c.avi", "mjpeg", {"qmin": "2", "qmax": "3"}, fmt="yuvj420p"),
        film(tmp_path / "d.mp4", "libx264", {"g": "10"}),
        film(tmp_path / "e.webm", "libvpx-vp9", slow, size=(64, 48)),
    ]
    manifest = write_manifest(films)
    cfg = make_config(manifest, batch_size=5, crop_size=48, frame_sample_rate=2, num_workers=0)
    plain, _ = take(cfg, 4)
    with caplog.at_level(logging.WARNING):
        batches, loader = take(named(cfg, "dali", num_workers=2), 4)
    pairs = list(zip(clips_of(plain), clips_of(batches), strict=True))
    assert all(p == q for (p, _), (q, _) in pairs)
    off = {p: (c.int() - d.int()).abs() for (p, c), (_, d) in pairs}
    worst = {p[-6:]: (x.float().mean().item(), x.max().item()) for p, x in off.items() if p != films[3]}
    assert all(0 < mean < 3 and most <= 24 for mean, most in worst.values()), worst
    assert off[films[3]].max() == 0 and loader._batches.refused == {"h264 is not decoded on the CPU": 1}
    assert [r.message for r in caplog.records if films[3] in r.message][0].startswith(f"{films[3]}: not for DALI")
    again, _ = take(named(cfg, "dali", num_workers=1), 2, start_step=2)
    assert equal(batches[2:], again)


def test_dali_compares_kinds_before_it_trusts_them():
    batches = DaliBatches(PyAV(), "cpu", 2, 1)
    generator = np.random.default_rng(0)
    moving = torch.from_numpy(generator.integers(0, 256, (3, 6, 8, 8), dtype=np.uint8))
    still, request = moving[:, :1].expand(-1, 6, -1, -1), lambda kind: type("R", (), {"kind": kind, "path": kind})
    assert batches.compare(request("a"), still, still) and batches.doubts(request("a"))  # any frame would have passed
    assert batches.compare(request("a"), moving, moving) and not batches.doubts(request("a"))
    assert not batches.compare(request("b"), moving[:, 1:], moving[:, :-1])
    assert batches.doubts(request("b")) and not batches.compare(request("b"), moving, moving)  # it is found out
    slow = torch.arange(0, 24, 4, dtype=torch.uint8).view(1, 6, 1, 1).expand(3, 6, 8, 8)
    assert not batches.compare(request("c"), slow[:, 1:], slow[:, :-1])  # little off, but less off beside
    assert batches.decode([request("b")], 8) == [None]
    assert list(batches.refused.values()) == [2]


def test_dali_that_is_not_there_is_one_clear_line(monkeypatch, tiny_suites, make_config):
    from vjepa_fast.data.decoders import dali

    cfg = make_config(tiny_suites["motion8"]["train"], decoder="dali")
    monkeypatch.setattr(dali, "_found", lambda name: name != "nvidia.dali")
    with pytest.raises(ConfigError, match="data.decoder: decoder dali .*pip install nvidia-dali-cuda130.*usable: auto"):
        ClipLoader(cfg)
    monkeypatch.setattr(dali, "_found", lambda name: name not in ("optree", "gast"))
    with pytest.raises(ConfigError, match="DALI needs optree, gast"):
        ClipLoader(cfg)
