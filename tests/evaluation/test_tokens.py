import json
import shutil

import numpy as np
import pytest
import torch

from tests.evaluation.cases import Toy
from vjepa_fast import data
from vjepa_fast.errors import CheckpointError, DataError, UserError
from vjepa_fast.evaluation import ClipSet, extract_tokens, open_tokens
from vjepa_fast.evaluation.extract import features as module


def clip_set(n=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    clips = torch.randint(0, 256, (n, 3, 4, 16, 16), dtype=torch.uint8, generator=g)
    return ClipSet(clips, np.arange(n) % 3, f"hash{seed}", "toy")


def test_tokens_are_the_encoders_in_order_and_any_subset(tmp_path):
    clips, encoder = clip_set(), Toy()
    memory = extract_tokens(encoder, clips, storage="float32", batch_size=3)
    disk = extract_tokens(encoder, clips, storage="float32", batch_size=4, cache_dir=tmp_path, shard_bytes=1)
    expected = module.encode(encoder, clips.clips)[0]
    assert memory.rows(range(10)).shape == (10, 1, 8, 6) and memory.grid == (2, 2, 2) and memory.dim == 6
    torch.testing.assert_close(memory.rows(range(10))[:, 0], expected)
    torch.testing.assert_close(disk.rows([7, 0, 3, 7])[:, 0], expected[[7, 0, 3, 7]])
    part = disk.take(np.array([9, 4, 1])).take(np.array([2, 0]))
    torch.testing.assert_close(part.rows([1, 0])[:, 0], expected[[9, 1]])
    assert part.y.tolist() == [1, 0] and len(disk.shards) == 3
    both = extract_tokens(encoder, clips, level="all", storage="float16")
    assert both.dim == 12 and both.rows([0]).dtype == torch.float16


def test_cache_serves_without_the_encoder_and_only_the_same(tmp_path):
    clips, encoder = clip_set(), Toy()
    first = extract_tokens(encoder, clips, cache_dir=tmp_path)
    calls = encoder.calls
    again = extract_tokens(encoder, clips, cache_dir=tmp_path)
    assert encoder.calls == calls and torch.equal(first.rows(range(10)), again.rows(range(10)))
    assert first.rows([0]).dtype == torch.bfloat16
    extract_tokens(Toy(seed=1), clips, cache_dir=tmp_path)
    extract_tokens(Toy(), clip_set(seed=5), cache_dir=tmp_path)
    extract_tokens(Toy(), clips, level="all", cache_dir=tmp_path)
    extract_tokens(Toy(), clips, storage="float32", cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 5 and not list(tmp_path.rglob("*.tmp"))


def test_a_cache_of_another_checkpoint_is_refused(tmp_path):
    clips, encoder = clip_set(), Toy()
    extract_tokens(encoder, clips, cache_dir=tmp_path)
    folder = next(tmp_path.iterdir())
    assert torch.isfinite(open_tokens(folder, encoder=encoder, source=clips).rows([0])).all()
    with pytest.raises(CheckpointError, match="another checkpoint; delete it"):
        open_tokens(folder, encoder=Toy(seed=1))
    with pytest.raises(CheckpointError, match=r"other settings \(data\)"):
        open_tokens(folder, source=clip_set(seed=3))
    index = json.loads((folder / "index.json").read_text())
    del index["sha256"]  # as of before 0.2
    index["key"]["encoder"] = "0" * 64
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="another checkpoint"):
        extract_tokens(encoder, clips, cache_dir=tmp_path)
    with pytest.raises(CheckpointError, match="no finished token cache"):
        open_tokens(tmp_path)


@pytest.mark.parametrize("change", ["labels", "grid", "file", "other"])
def test_a_changed_index_is_noticed(tmp_path, change):
    clips, encoder = clip_set(), Toy()
    right = extract_tokens(encoder, clips, cache_dir=tmp_path)
    folder = next(tmp_path.iterdir())
    index = json.loads((folder / "index.json").read_text())
    if change == "labels":
        index["shards"][0]["labels"][0] += 1
    elif change == "grid":
        index["grid"][0] += 1
    elif change == "file":
        del index["sha256"]
        index["shards"][0]["file"] = "../00000.safetensors"
    (folder / "index.json").write_text(json.dumps(index) if change != "other" else "[" * 100_000)
    with pytest.raises(CheckpointError, match="no finished token cache"):
        open_tokens(folder)
    again = extract_tokens(encoder, clips, cache_dir=tmp_path)  # made anew
    assert np.array_equal(again.y, right.y) and torch.equal(again.rows([0]), right.rows([0]))


def test_a_stopped_extraction_goes_on(tmp_path, monkeypatch):
    clips = clip_set()
    whole = extract_tokens(Toy(), clips, batch_size=2).rows(range(10))
    encoder, encode = Toy(), module.encode

    def stops(*args, **kw):
        if encoder.calls == 3:
            raise KeyboardInterrupt
        return encode(*args, **kw)

    monkeypatch.setattr(module, "encode", stops)
    with pytest.raises(KeyboardInterrupt):
        extract_tokens(encoder, clips, batch_size=2, cache_dir=tmp_path, shard_bytes=1)
    with pytest.raises(CheckpointError, match="not complete"):
        open_tokens(next(tmp_path.iterdir()))
    monkeypatch.setattr(module, "encode", encode)
    encoder = Toy()
    done = extract_tokens(encoder, clips, batch_size=2, cache_dir=tmp_path, shard_bytes=1)
    assert encoder.calls == 2 and torch.equal(done.rows(range(10)), whole)  # three of five batches were kept


def test_damage_is_noticed(tmp_path):
    clips = clip_set()
    whole = extract_tokens(Toy(), clips, batch_size=2, cache_dir=tmp_path, shard_bytes=1).rows(range(10))
    shard = next(tmp_path.iterdir()) / "00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-300] ^= 255
    shard.write_bytes(bytes(content))  # the same size, another content: found when it is read
    flipped = extract_tokens(Toy(), clips, cache_dir=tmp_path)
    assert torch.equal(flipped.rows([0, 5]), whole[[0, 5]])
    with pytest.raises(CheckpointError, match="00003.safetensors: this token cache is damaged"):
        flipped.rows([0, 6])
    shard.unlink()  # a missing or truncated one and those after it are taken anew
    encoder = Toy()
    again = extract_tokens(encoder, clips, batch_size=2, cache_dir=tmp_path, shard_bytes=1)
    assert encoder.calls == 2 and torch.equal(again.rows(range(10)), whole)


def test_features_that_are_not_finite_are_refused(tmp_path):
    encoder = Toy()
    with torch.no_grad():
        encoder.proj.bias[2] = float("nan")
    with pytest.raises(DataError, match="toy: features are not finite"):
        extract_tokens(encoder, clip_set(), cache_dir=tmp_path)
    with torch.no_grad():
        encoder.proj.bias[2] = 1e6
    with pytest.raises(DataError, match="too large for float16"):
        extract_tokens(encoder, clip_set(), storage="float16")
    assert extract_tokens(encoder, clip_set(), storage="bfloat16").rows([0]).max() > 9e5


def test_bad_arguments(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="unknown storage 'int8'"):
        extract_tokens(Toy(), clip_set(), storage="int8")
    with pytest.raises(UserError, match="2 x 3 views need the video files"):
        extract_tokens(Toy(), clip_set(), clips=2, crops=3)
    with pytest.raises(DataError, match="no readable sample"):
        extract_tokens(Toy(), clip_set(0))
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        extract_tokens(Toy(), clip_set(), cache_dir=blocked)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(UserError, match="its tokens take 0.0 GB, the disk of .* has 0.0 GB; take fewer views"):
        extract_tokens(Toy(), clip_set(), cache_dir=tmp_path)


def test_views_of_videos_and_the_one_view_is_the_centre(tiny_suites, tmp_path):
    manifest, encoder = data.load_manifest(tiny_suites["motion8"]["test"]), Toy()
    view = {"num_frames": 4, "crop_size": 32, "frame_step": 2, "storage": "float32"}
    one = extract_tokens(encoder, manifest, **view)
    clips = torch.cat([c for c, _, _ in data.eval_batches(manifest, 4, 32, 4, frame_step=2)])
    torch.testing.assert_close(one.rows(range(8))[:, 0], module.encode(encoder, clips)[0])
    many = extract_tokens(encoder, manifest, clips=3, crops=2, cache_dir=tmp_path, batch_size=13, **view)
    assert many.views == (3, 2) and many.rows([0]).shape == (1, 6, 32, 6) and many.y.tolist() == one.y.tolist()
    x = many.rows(range(8))
    assert not torch.allclose(x[:, 0], x[:, 2])  # another time
    torch.testing.assert_close(x[:, 2], x[:, 3])  # square pictures have one crop of the whole side
    batches = data.eval_views(manifest, 4, 32, 3, clips=3, crops=2, first=5, frame_step=2)
    clip, label, index = next(batches)
    assert clip.shape == (3, 6, 3, 4, 32, 32) and index.tolist() == [5, 6, 7]
    torch.testing.assert_close(module.encode(encoder, clip[1])[0], x[6])
