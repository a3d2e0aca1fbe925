"""What `data check` says of a data set: kinds of file, and speed."""

import shutil

import av
import numpy as np
import pytest

from vjepa_fast.cli import main
from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data import load_manifest
from vjepa_fast.data.decoders import DECODERS, Decoder
from vjepa_fast.data.manifests.check import check_manifest
from vjepa_fast.data.survey import kinds, speeds
from vjepa_fast.data.synthetic.write import write_video


@pytest.fixture
def films(tmp_path, broken):
    still = np.random.default_rng(0).integers(0, 255, (1, 32, 48, 3), dtype=np.uint8).repeat(24, 0)
    write_video(tmp_path / "a.mp4", still, fps=25, gop=6)
    write_video(tmp_path / "b.mp4", still[:20], fps=8, gop=12)
    with av.open(str(tmp_path / "c.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 48, 32, "yuv420p", 9
        for frame in still:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    shutil.copy(broken["garbage"], tmp_path / "d.mp4")
    (tmp_path / "train.csv").write_text("a.mp4 0\nb.mp4 0\nc.avi 1\nc.avi 1\nd.mp4 1\n")
    return tmp_path / "train.csv"


def test_kinds_of_file(films):
    manifest = load_manifest(films)
    bad = [path for path, _ in check_manifest(manifest)]
    h264, mpeg4 = kinds(manifest, bad)
    assert (h264.codec, h264.container, h264.files) == ("h264", ".mp4", 2)
    assert h264.bytes == sum((films.parent / f"{n}.mp4").stat().st_size for n in "ab")
    assert (h264.size, h264.rate, h264.frames, h264.gop) == ((32, 32), (8.0, 25.0), (20, 24), (6, 12))
    assert (mpeg4.codec, mpeg4.container, mpeg4.files, mpeg4.gop) == ("mpeg4", ".avi", 1, (9, 9))


def test_speed_of_each_decoder(films, tiny_suites):
    found = speeds(load_manifest(films), DataConfig(dataset_fpcs=(4,), crop_size=32), 0.01)
    assert next(s for s in found if s.decoder == "pyav").clips_per_s > 0
    assert all((s.clips_per_s > 0) != bool(s.why) for s in found)
    too_long = speeds(load_manifest(films), DataConfig(dataset_fpcs=(99,), crop_size=32), 0.01)
    assert all(s.why for s in too_long)
    (images,) = speeds(load_manifest(tiny_suites["objects"]["train"]), DataConfig(crop_size=32), 0.01)
    assert images.decoder == "pillow" and images.clips_per_s > 0


def test_the_command_prints_them(films, capsys):
    assert main(["data", "check", str(films), "--frames", "4", "--crop-size", "32", "--speed", "0.01"]) == 2
    out = capsys.readouterr().out
    assert "mpeg4" in out and "8 to 25" in out and "6 to 12" in out
    assert "pyav: " in out and "5 samples takes at least" in out
    main(["data", "check", str(films), "--speed", "0"])
    assert "clips/s" not in capsys.readouterr().out


def test_a_decoder_that_fails_is_named(films, monkeypatch):
    class Broken(Decoder):
        def open(self, path):
            raise ZeroDivisionError("no good")

    monkeypatch.setattr(DECODERS, "_entries", {**dict(DECODERS), "broken": Broken})
    found = {s.decoder: s for s in speeds(load_manifest(films), DataConfig(dataset_fpcs=(4,), crop_size=32), 0.01)}
    assert found["broken"].why == "no good" and found["pyav"].clips_per_s > 0
