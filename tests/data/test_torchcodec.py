"""torchcodec's frames are held against the index: real ones where it is installed, and a module that is wrong."""

import sys
import types

import numpy as np
import pytest
import torch

from benchmarks.films import KINDS, Lacking
from vjepa_fast.data import Sampling, index_of, read_clip
from vjepa_fast.data.decoders import choose_decoder
from vjepa_fast.data.decoders.torchcodec import TorchCodec, TorchCodecCuda
from vjepa_fast.errors import DataError


class FakeDecoder:
    """Frames of the index, grey, a number of frames later than asked for."""

    late, fails = 0, False
    devices: list[str] = []
    cpu_fallback = ""

    def __init__(self, path, *, dimension_order, device, seek_mode):
        assert (dimension_order, seek_mode) == ("NHWC", "exact")
        if self.fails:
            raise RuntimeError("not a film")
        self.index = index_of(path)
        self.devices.append(device)

    def get_frames_at(self, numbers):
        at = np.array(numbers) + self.late
        shape = (len(at), self.index.height, self.index.width, 3)
        seconds = torch.from_numpy(self.index.pts[at] * self.index.time_base)
        return types.SimpleNamespace(data=torch.full(shape, 7, dtype=torch.uint8), pts_seconds=seconds)


@pytest.fixture
def fake(monkeypatch):
    package, decoders = types.ModuleType("torchcodec"), types.ModuleType("torchcodec.decoders")
    decoders.VideoDecoder = FakeDecoder
    package.decoders = decoders
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    monkeypatch.setattr(FakeDecoder, "devices", [])
    return FakeDecoder


def test_only_the_frames_asked_for_count(fake, counter_video, monkeypatch):
    numbers = Sampling(20, short="hold")
    assert (TorchCodec().read_clip(counter_video, 5, numbers, 0) == 7).all()
    assert TorchCodecCuda().read_clip(counter_video, 5, numbers, 0).shape == (5, 32, 48, 3)
    assert fake.devices == ["cpu", "cuda"]
    right = read_clip(counter_video, 5, start=3)
    for name, value in (("late", 1), ("late", 100), ("fails", True)):
        with monkeypatch.context() as patch:
            patch.setattr(fake, name, value)
            decoder = TorchCodec()
            assert np.array_equal(decoder.read_clip(counter_video, 5, Sampling(), 3), right)
            assert decoder.refused == {counter_video}
        assert np.array_equal(decoder.read_clip(counter_video, 5, Sampling(), 3), right)  # and is not tried again
    scaled = TorchCodec().read_clip(counter_video, 5, Sampling(), 3, size=(16, 24))
    assert np.array_equal(scaled, read_clip(counter_video, 5, start=3, size=(16, 24)))


def test_a_fall_back_to_the_cpu_is_reported(fake, counter_video, monkeypatch, caplog):
    monkeypatch.setattr(fake, "cpu_fallback", "NVDEC does\nnot take it")
    TorchCodec().read_clip(counter_video, 5, Sampling(), 0)
    assert not caplog.records
    decoder = TorchCodecCuda()
    for _ in range(2):
        decoder.read_clip(counter_video, 5, Sampling(), 0)
    assert [r.getMessage().split(": ", 1)[1] for r in caplog.records] == [
        "not decoded by the GPU but on the CPU (NVDEC does not take it), as may be others"
    ]


def test_limits_hold(fake, counter_video):
    import dataclasses

    decoder = TorchCodec()
    decoder.options = dataclasses.replace(decoder.options, max_clip_mb=0)
    with pytest.raises(DataError, match="max_clip_mb"):
        decoder.read_clip(counter_video, 5, Sampling(), 0)


@pytest.mark.parametrize(
    "kind",
    ["h264 mp4, open GOP", "h264 avi, B-frames", "h264 ts", "mpeg2 mpg", "h264 mp4, edit list of two parts",
     "h264 mp4, turned by a quarter", "h264 mp4, variable rate", "raw avi, palette", "vp9 webm, hidden frames"],
)  # fmt: skip
def test_every_start_is_pyavs(kind, tmp_path):
    if reasons := TorchCodec.objections():
        pytest.skip("; ".join(reasons))
    try:
        path = str(KINDS[kind](tmp_path))
    except Lacking as reason:
        pytest.skip(str(reason))
    decoder = choose_decoder("torchcodec")
    for start in range(0, index_of(path).frames - 3, 2):
        assert np.array_equal(decoder.read_clip(path, 3, Sampling(), start), read_clip(path, 3, start=start)), start
