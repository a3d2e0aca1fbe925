import json

import numpy as np
import pytest
import torch

from tests.evaluation.cases import Toy
from vjepa_fast.errors import CheckpointError, DataError, TrainingError, UserError
from vjepa_fast.evaluation import ClipSet, Features, extract_features, pixel_features, pool_tokens, train_supervised


def clip_set(n=10, seed=0, name="toy", images=False):
    g = torch.Generator().manual_seed(seed)
    clips = torch.randint(0, 256, (n, 3, 8, 16, 16), dtype=torch.uint8, generator=g)
    return ClipSet(clips, np.arange(n) % 3, f"hash{seed}", name, images)


def test_poolings_hand_computed():
    z = torch.arange(12.0).reshape(1, 6, 2)  # T=3, H=1, W=2
    assert pool_tokens(z, (3, 1, 2), "mean").tolist() == [[5.0, 6.0]]
    assert pool_tokens(z, (3, 1, 2), "time").tolist() == [[1.0, 2.0, 5.0, 6.0, 9.0, 10.0]]
    spread = float(np.std([0, 2, 4, 6, 8, 10]))
    assert pool_tokens(z, (3, 1, 2), "meanstd")[0].tolist() == pytest.approx([5.0, 6.0, spread, spread])
    with pytest.raises(UserError, match="unknown pooling 'max'.*mean, time, meanstd"):
        pool_tokens(z, (3, 1, 2), "max")


def test_features_do_not_depend_on_the_batch_and_keep_the_order():
    clips, encoder = clip_set(), Toy()
    a = extract_features(encoder, clips, batch_size=3)
    b = extract_features(encoder, clips, batch_size=10)
    assert a.x.shape == (10, 4 * 6) and a.x.dtype == np.float32 and a.y.tolist() == clips.labels.tolist()
    assert np.allclose(a.x, b.x, atol=1e-6)
    one = extract_features(encoder, ClipSet(clips.clips[4:5], clips.labels[4:5], "x"), batch_size=3)
    assert np.allclose(one.x[0], a.x[4], atol=1e-6)


def test_levels_images_and_clip_settings():
    clips, encoder = clip_set(images=True), Toy()
    last, every = (extract_features(encoder, clips, pooling="mean", level=level) for level in ("last", "all"))
    assert np.allclose(every.x, np.c_[last.x, last.x + 1], atol=1e-5)
    single = extract_features(encoder, clips, pooling="time", images="single")
    assert single.x.shape == (10, 6)  # one frame: one time step
    encoder.clip_settings = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    assert not np.allclose(extract_features(encoder, clips, pooling="mean").x, last.x, atol=1e-3)
    for bad in ({"level": "first"}, {"images": "none"}, {"pooling": "max"}):
        with pytest.raises(UserError):
            extract_features(encoder, clips, **bad)


def test_training_mode_is_restored_and_no_gradient_is_kept():
    encoder = Toy().train()
    extract_features(encoder, clip_set())
    assert encoder.training and encoder.proj.weight.grad is None


def test_cache_serves_the_same_and_only_the_same(tmp_path):
    clips, encoder = clip_set(), Toy()
    first = extract_features(encoder, clips, cache_dir=tmp_path)
    calls = encoder.calls
    again = extract_features(encoder, clips, cache_dir=tmp_path)
    assert encoder.calls == calls and np.array_equal(first.x, again.x) and np.array_equal(first.y, again.y)
    # another checkpoint, other data, other settings: each computes its own
    other = extract_features(Toy(seed=1), clips, cache_dir=tmp_path)
    assert not np.allclose(other.x, first.x)
    with torch.no_grad():
        encoder.proj.bias += 1
    assert not np.allclose(extract_features(encoder, clips, cache_dir=tmp_path).x, first.x)
    assert not np.allclose(extract_features(Toy(), clip_set(seed=5), cache_dir=tmp_path).x, first.x)
    assert extract_features(Toy(), clips, pooling="mean", cache_dir=tmp_path).x.shape == (10, 6)
    assert len(list(tmp_path.glob("*.safetensors"))) == 5 and not list(tmp_path.glob("*.tmp"))


def test_a_cache_of_another_checkpoint_is_refused(tmp_path):
    extract_features(Toy(), clip_set(), cache_dir=tmp_path)
    meta = next(tmp_path.glob("*.json"))
    stored = json.loads(meta.read_text())
    stored["key"]["encoder"] = "0" * 64
    meta.write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="another checkpoint; delete it"):
        extract_features(Toy(), clip_set(), cache_dir=tmp_path)


@pytest.mark.parametrize("harm", ["truncate", "flip", "no json", "bad json"])
def test_a_damaged_cache_is_computed_again(tmp_path, harm):
    first = extract_features(Toy(), clip_set(), cache_dir=tmp_path)
    blob, meta = next(tmp_path.glob("*.safetensors")), next(tmp_path.glob("*.json"))
    if harm == "truncate":
        blob.write_bytes(blob.read_bytes()[:-9])
    elif harm == "flip":
        content = bytearray(blob.read_bytes())
        content[-200] ^= 255
        blob.write_bytes(bytes(content))
    elif harm == "no json":
        meta.unlink()
    else:
        meta.write_text("{")
    encoder = Toy()
    assert np.array_equal(extract_features(encoder, clip_set(), cache_dir=tmp_path).x, first.x) and encoder.calls
    assert np.array_equal(extract_features(encoder, clip_set(), cache_dir=tmp_path).x, first.x)


def test_unwritable_cache_is_a_user_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        extract_features(Toy(), clip_set(), cache_dir=blocked / "cache")


def test_unequal_lengths_are_refused():
    with pytest.raises(DataError, match="n labels"):
        Features(np.zeros((3, 2)), np.zeros(4))


def test_pixel_features_hand_computed():
    clips = torch.zeros(2, 3, 8, 16, 16, dtype=torch.uint8)
    clips[1, 0, :2, :2, :2] = 255
    f = pixel_features(ClipSet(clips, np.array([0, 1]), "h"), frames=4, size=8)
    assert f.x.shape == (2, 3 * 4 * 64) and f.x[0].max() == 0
    assert f.x[1, 0] == 1.0 and f.x[1].sum() == 1.0


def test_supervised_learns_a_planted_colour_and_reads_test_once():
    def colours(n, seed):
        g = torch.Generator().manual_seed(seed)
        clips = torch.randint(0, 60, (n, 3, 8, 16, 16), dtype=torch.uint8, generator=g)
        labels = np.arange(n) % 3
        clips[torch.arange(n), torch.as_tensor(labels)] += 120
        return ClipSet(clips, labels, str(seed))

    train, val, test = colours(48, 0), colours(24, 1), colours(60, 2)
    start = Toy()
    r = train_supervised(start, train, val, test, steps=60, batch_size=8, lr=1e-2)
    assert r.result.accuracy > 0.95 and r.losses[-1] < 0.5 * r.losses[0] and not start.training
    other = ClipSet(test.clips, (test.labels + 1) % 3, "x")
    again = train_supervised(Toy(), train, val, other, steps=60, batch_size=8, lr=1e-2)
    assert again.losses == r.losses and again.val_accuracy == r.val_accuracy  # test labels change nothing but the score
    assert again.result.accuracy < 0.05


def test_supervised_refuses_gaps_and_a_loss_that_is_not_finite():
    good = ClipSet(torch.zeros(12, 3, 8, 16, 16, dtype=torch.uint8), np.arange(12) % 3, "a", "good")
    gap = ClipSet(good.clips, np.arange(12) % 3 * 2, "b", "gap")
    none = ClipSet(good.clips[:0], good.labels[:0], "c", "none")
    for parts, message in (
        ((gap, good), "gap: no sample of label 1, 3; number"),
        ((good, gap), "gap: label 4 is none of the"),
        ((good, none), "none: no samples"),
        ((good, good, none), "none: no samples"),
    ):
        with pytest.raises(DataError, match=message):
            train_supervised(Toy(), *parts, steps=2)
    broken = Toy()
    broken.proj.weight.data.fill_(torch.nan)
    with pytest.raises(TrainingError, match="good: the supervised loss is nan in step 1"):
        train_supervised(broken, good, good, steps=2)
