"""`vjepa-fast features`, `vjepa_fast.features` and `encoder.features`: evaluation's numbers, with names beside them."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import vjepa_fast
from tests.evaluation.cases import error_of, small_run, tiny_encoder
from vjepa_fast import cli
from vjepa_fast.data import load_manifest
from vjepa_fast.errors import ConfigError, DataError, UserError
from vjepa_fast.evaluation import VideoFeatures, extract_features, extract_tokens, pool_tokens
from vjepa_fast.evaluation.extract.features import POOLINGS
from vjepa_fast.models import load_encoder

FRAMES = {"num_frames": 4, "crop_size": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_suites):
    """Five videos, one of them in a folder below, and one file that is no video."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "below").mkdir()
    for number, path in enumerate(load_manifest(tiny_suites["motion8"]["train"]).paths[:5]):
        shutil.copy(path, folder / ("below" if number == 4 else "") / f"{number}.mp4")
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    return folder


def rows(folder):
    return [str(folder / f"{i}.mp4") for i in range(4)] + [str(folder / "below" / "4.mp4")]


@pytest.mark.parametrize("level", ["last", "all"])
def test_numbers_are_those_of_extract_features(tiny_suites, level):
    encoder, path = tiny_encoder(), tiny_suites["motion8"]["test"]
    for pooling in POOLINGS:
        wanted = extract_features(encoder, load_manifest(path), pooling=pooling, level=level, **FRAMES)
        found = encoder.features(path, pooling=pooling, level=level, **FRAMES)
        assert np.array_equal(found.x.flatten(1).numpy(), wanted.x)
        assert found.labels.tolist() == wanted.y.tolist() and found.videos == load_manifest(path).paths
        assert found.x.shape[1:-1] == ((2,) if pooling == "time" else ())


def test_tokens_clips_and_levels(tiny_suites):
    encoder, path = tiny_encoder(), tiny_suites["motion8"]["test"]
    how = {"clips": 2, "crops": 2, **FRAMES}
    wanted = extract_tokens(encoder, load_manifest(path), level="all", storage="float32", **how).rows(range(8))
    every = encoder.features([path], pooling="none", level="all", over_clips="keep", **how).x
    assert every.shape == (8, 4, 2, 4, 4, 48) and torch.equal(every.flatten(2, 4), wanted)
    first = encoder.features([path], pooling="none", level=0, over_clips="keep", **how).x
    assert torch.equal(first, every[..., :24])
    swapped = encoder.features([path], pooling="none", level=[1, 0], over_clips="keep", **how).x
    assert torch.equal(swapped, torch.cat([every[..., 24:], every[..., :24]], -1))
    mean = encoder.features([path], pooling="meanstd", level=0, **how).x
    pooled = pool_tokens(first.flatten(0, 1).flatten(1, 3), (2, 4, 4), "meanstd").unflatten(0, (8, 4))
    assert torch.allclose(mean, pooled.mean(1), atol=1e-6)
    half = encoder.features([path], storage="bfloat16", **FRAMES).x
    assert torch.equal(half, encoder.features([path], **FRAMES).x.bfloat16())


def test_one_video_a_folder_and_the_package_function(folder):
    encoder = tiny_encoder()
    names = rows(folder)
    found = vjepa_fast.features(encoder, folder, max_bad=0.2, **FRAMES)
    assert sorted(found.videos) == sorted(names) and found.labels is None
    assert [path for path, _ in found.skipped] == [str(folder / "broken.mp4")] and found.skipped[0][1]
    for name in (names[0], names[4]):  # rows and names belong together
        one = encoder.features(name, **FRAMES)
        assert one.videos == [name] and torch.allclose(one.x[0], found.x[found.videos.index(name)], atol=1e-6)
    seen = []
    encoder.features(names, on_progress=lambda done, total: seen.append((done, total)), batch_size=2, **FRAMES)
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_too_many_unreadable_and_nothing_to_read(folder):
    encoder = tiny_encoder()
    with pytest.raises(DataError, match=r"1 of . samples.*accepted share \(--max-bad\) 0.05.*broken.mp4"):
        encoder.features(folder, **FRAMES)
    with pytest.raises(DataError, match="no readable video; the first: .*broken.mp4"):
        encoder.features(folder / "broken.mp4", max_bad=1, **FRAMES)
    with pytest.raises(DataError, match="nowhere.mp4: No such file"):
        encoder.features(folder / "nowhere.mp4", **FRAMES)
    with pytest.raises(ConfigError, match=r"level \[2\]: this encoder has the levels 0 to 1 \(blocks 0, 1\)"):
        encoder.features(folder, level=[2])
    for bad in ({"pooling": "max"}, {"over_clips": "max"}, {"storage": "int8"}, {"clips": 0}, {"images": "no"}):
        with pytest.raises(UserError):
            encoder.features(folder, **bad)
    with torch.no_grad():
        encoder.norms_block[-1].bias[0] = float("nan")
    with pytest.raises(DataError, match="features are not finite"):
        encoder.features(rows(folder), **FRAMES)


def test_tokens_that_do_not_fit_the_memory_are_refused(folder, monkeypatch):
    monkeypatch.setattr("vjepa_fast.evaluation.extract.shards.os.sysconf", lambda name: 100)
    with pytest.raises(UserError, match="its tokens take .* GB, the free memory has .*; pool them, name fewer"):
        tiny_encoder().features(rows(folder), pooling="none", **FRAMES)


def test_images_are_standing_clips_or_single(tiny_suites):
    encoder, path = tiny_encoder(), tiny_suites["objects"]["test"]
    for images in ("repeat", "single"):
        wanted = extract_features(encoder, load_manifest(path), pooling="mean", images=images, **FRAMES)
        assert np.array_equal(encoder.features(path, images=images, clips=3, **FRAMES).x.numpy(), wanted.x)
    with pytest.raises(DataError, match="8 videos beside 8 images; give them in two calls"):
        encoder.features([path, tiny_suites["motion8"]["test"]])


def test_the_command_writes_what_load_file_reads(folder, tmp_path, capsys, caplog):
    (tmp_path / "run").mkdir()
    run, out = small_run(tmp_path / "run"), tmp_path / "f.safetensors"
    argv = ["features", str(folder), rows(folder)[0], "--encoder", str(run), "--out", str(out), "--device", "cpu"]
    assert cli.main([*argv, "--max-bad", "0.2", "--pooling", "meanstd", "--level", "1,3"]) == 0
    said = capsys.readouterr()
    assert f"{out}: features [6, 96] float32 of 6 videos, 1 left out, meanstd" in said.out
    assert "broken.mp4" in said.err + caplog.text  # the log goes where the first command of this process set it up
    encoder = load_encoder(run)
    again = encoder.features([folder, rows(folder)[0]], pooling="meanstd", level=[1, 3], max_bad=0.2)
    tensors = load_file(out)
    assert set(tensors) == {"features"} and torch.equal(tensors["features"], again.x)
    with safe_open(out, "pt") as file:
        held = {k: v if k == "format" else json.loads(v) for k, v in file.metadata().items()}
    assert held["videos"] == again.videos and held["skipped"] == [list(pair) for pair in again.skipped]
    assert held["encoder"] == {"sha256": encoder.checkpoint_hash, "path": str(run), "which": "target_encoder"}
    wanted = {"pooling": "meanstd", "levels": [1, 3], "blocks": [1, 3], "num_frames": 4, "crop_size": 32, "clips": 1}
    assert wanted.items() <= held["settings"].items() and held["versions"]["vjepa_fast"] == vjepa_fast.__version__
    loaded = VideoFeatures.load(out)
    assert torch.equal(loaded.x, again.x) and loaded.skipped == again.skipped and loaded.settings == again.settings
    assert len(loaded) == 6 and loaded.labels is None
    assert cli.main(argv) == 2 and "over the accepted share (--max-bad) 0.05" in error_of(capsys)
    assert cli.main([*argv[:-3], str(tmp_path / "f.pt")]) == 2 and "ends in .safetensors" in error_of(capsys)


def test_names_that_are_not_utf8_come_back(folder, tmp_path):
    name = os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9.mp4")
    shutil.copy(rows(folder)[0], name)
    tiny_encoder().features(name, **FRAMES).save(tmp_path / "f.safetensors")
    assert VideoFeatures.load(tmp_path / "f.safetensors").videos == [name]


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(DataError, match="holds no features of videos"):
        VideoFeatures.load(tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        VideoFeatures.load(tmp_path / "text.safetensors")


@pytest.mark.parametrize("kind", ["fair", "hf", "safetensors"])
def test_encoders_of_other_files(folder, tmp_path, kind):
    """What `vjepa-fast export` writes for others gives the same features."""
    pytest.importorskip("transformers") if kind == "hf" else None
    from vjepa_fast.export import export_encoder

    (tmp_path / "run").mkdir()
    own = load_encoder(small_run(tmp_path / "run"))
    out = tmp_path / {"fair": "f.pt", "hf": "hf", "safetensors": "f.safetensors"}[kind]
    export_encoder(own, kind, out)
    extra = {"num_heads": 2} if kind == "fair" else {}
    other = load_encoder(out, **extra)
    wanted, found = own.features(rows(folder), **FRAMES), other.features(rows(folder), frame_step=2, **FRAMES)
    assert torch.allclose(found.x, wanted.x, atol=1e-5)
