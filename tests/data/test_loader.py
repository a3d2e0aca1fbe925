"""Batches: groups, determinism, resuming, sharding, replacement of bad samples, images."""

import dataclasses

import numpy as np
import pytest
import torch

from vjepa_fast.config.schema import AugmentConfig, DataConfig
from vjepa_fast.data import ClipLoader, eval_batches, eval_clip, load_manifest, read_clip, read_image
from vjepa_fast.errors import ConfigError, DataError


def take(cfg, number, **options):
    with ClipLoader(cfg, **options) as loader:
        return [next(loader) for _ in range(number)], loader


def same(a, b) -> bool:
    return all(
        torch.equal(x.clip, y.clip)
        and x.paths == y.paths
        and torch.equal(x.labels, y.labels)
        and x.first_sample == y.first_sample
        for s, t in zip(a, b)
        for x, y in zip(s.groups, t.groups)
    )


def test_batch_of_one_dataset(tiny_suites, make_config):
    (batch,), loader = take(make_config(tiny_suites["motion8"]["train"]), 1)
    (group,) = batch.groups
    assert group.clip.shape == (4, 3, 8, 32, 32) and group.clip.dtype == torch.uint8 and group.clip.is_contiguous()
    assert (batch.step, group.fpc, group.modality, group.first_sample) == (0, 8, "video", 0)
    manifest = loader.manifests[0]
    assert group.labels.tolist() == [int(manifest.labels[manifest.paths.index(p)]) for p in group.paths]
    assert group.labels.dtype == group.dataset.dtype == torch.int64


def test_clips_are_the_files_frames(tiny_suites, make_config):
    whole = AugmentConfig(random_resize_scale=(1.0, 1.0), random_resize_aspect_ratio=(1.0, 1.0), horizontal_flip=0.0)
    (batch,), _ = take(make_config(tiny_suites["motion8"]["train"], aug=whole, crop_size=64, dataset_fpcs=(16,)), 1)
    for clip, path in zip(batch.groups[0].clip, batch.groups[0].paths):
        assert np.array_equal(clip.numpy(), read_clip(path, 16, start=0).transpose(3, 0, 1, 2))


def test_threads_cache_and_resuming_change_nothing(tiny_suites, make_config):
    manifests = tiny_suites["motion8"]["train"], tiny_suites["objects"]["train"]
    cfg = make_config(*manifests, frame_sample_rate=1)
    plain, _ = take(cfg, 6)
    for settings in ({"num_workers": 1}, {"num_workers": 3}, {"cache_mb": 50}, {"cache_mb": 1, "num_workers": 2}):
        other, _ = take(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **settings)), 6)
        assert same(plain, other), settings
    resumed, _ = take(cfg, 2, start_step=4)
    assert same(plain[4:], resumed) and [b.step for b in resumed] == [4, 5]
    seeded, _ = take(dataclasses.replace(cfg, seed=6), 6)
    assert not same(plain, seeded)


def test_frame_numbers_are_those_of_the_clips(tiny_suites, make_config):
    whole = AugmentConfig(random_resize_scale=(1.0, 1.0), random_resize_aspect_ratio=(1.0, 1.0), horizontal_flip=0.0)
    manifests = tiny_suites["motion8"]["train"], tiny_suites["objects"]["train"]
    cfg = make_config(*manifests, aug=whole, crop_size=64, frame_sample_rate=1)
    (batch,), loader = take(cfg, 1)
    (group,) = batch.groups
    for i, (clip, path, dataset) in enumerate(zip(group.clip, group.paths, group.dataset)):
        numbers = loader.frame_numbers(i)
        frames = read_image(path)[None] if dataset else read_clip(path, 16, start=0)[numbers]
        assert np.array_equal(clip.numpy(), np.broadcast_to(frames.transpose(3, 0, 1, 2), clip.shape))


def test_ranks_divide_the_global_batch(tiny_suites, make_config):
    whole, _ = take(make_config(tiny_suites["motion8"]["train"], batch_size=4), 2)
    parts = [take(make_config(tiny_suites["motion8"]["train"], batch_size=2), 2, rank=r, world=2)[0] for r in range(2)]
    for step in range(2):
        joined = torch.cat([p[step].groups[0].clip for p in parts])
        assert torch.equal(joined, whole[step].groups[0].clip)
        assert [p[step].groups[0].first_sample for p in parts] == [4 * step, 4 * step + 2]


def test_groups_by_clip_length(tiny_suites, make_config):
    cfg = make_config(
        tiny_suites["motion8"]["train"],
        tiny_suites["objects"]["train"],
        tiny_suites["motion8"]["val"],
        dataset_fpcs=(8, 8, 4),
        datasets_weights=(0.4, 0.3, 0.3),
        batch_size=12,
    )
    batches, _ = take(cfg, 4)
    seen = set()
    for batch in batches:
        for group in batch.groups:
            assert group.clip.shape[2] == group.fpc == (4 if 2 in group.dataset else 8)
            seen |= set(range(group.first_sample, group.first_sample + len(group.clip)))
            for clip, dataset in zip(group.clip, group.dataset):
                still = bool((clip == clip[:, :1]).all())
                assert still == (dataset == 1)  # an image is repeated over the clip
    assert seen == set(range(48))  # every clip has a global number of its own


def test_image_stream(tiny_suites, make_config):
    cfg = make_config(tiny_suites["motion8"]["train"])
    images = DataConfig(datasets=(tiny_suites["objects"]["train"],), dataset_fpcs=(1,), batch_size=3, crop_size=32)
    (batch,), _ = take(dataclasses.replace(cfg, img_data=images), 1, img=True)
    assert batch.groups[0].clip.shape == (3, 3, 1, 32, 32) and batch.groups[0].modality == "image"
    videos = dataclasses.replace(images, datasets=cfg.data.datasets)
    with pytest.raises(DataError, match="lists videos, img_data is for images"):
        ClipLoader(dataclasses.replace(cfg, img_data=videos), img=True)
    with pytest.raises(ConfigError, match="img_data.datasets"):
        ClipLoader(cfg, img=True)


def test_augmentation_varies_and_flips(tiny_suites, make_config, write_manifest):
    one = write_manifest(load_manifest(tiny_suites["objects"]["train"]).paths[:1])
    batches, _ = take(make_config(one, dataset_fpcs=(1,)), 3)
    clips = torch.cat([b.groups[0].clip for b in batches])
    assert len({c.numpy().tobytes() for c in clips}) == 12


@pytest.fixture
def mostly_good(tiny_suites, broken, write_manifest):
    good = load_manifest(tiny_suites["motion8"]["train"]).paths
    bad = [broken[k] for k in ("zero", "truncated", "cut", "garbage", "text", "audio", "disguised", "image", "missing")]
    return write_manifest(good + bad, list(range(len(good))) + [99] * len(bad)), bad


def test_bad_samples_are_replaced_counted_and_listed(mostly_good, make_config, caplog):
    manifest, bad = mostly_good
    cfg = make_config(manifest, max_bad_fraction=0.5)
    plain, loader = take(cfg, 12)
    assert all(g.labels.max() < 99 for b in plain for g in b.groups)
    assert sorted(p for p, _ in loader.bad.samples) == sorted(bad) and loader.bad.count == 9
    assert loader.bad.tried == 21
    assert all(reason and path not in reason and "\n" not in reason for path, reason in loader.bad.samples)
    assert sum("skipped unreadable sample" in r.message for r in caplog.records) == 9  # each file once
    threaded, other = take(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, num_workers=3)), 12)
    assert same(plain, threaded) and other.bad.samples == loader.bad.samples
    resumed, _ = take(cfg, 4, start_step=8)
    assert same(plain[8:], resumed)


def test_replacements_come_from_the_same_dataset(mostly_good, tiny_suites, make_config):
    manifest, _ = mostly_good
    cfg = make_config(
        manifest,
        tiny_suites["objects"]["train"],
        datasets_weights=(0.5, 0.5),
        max_bad_fraction=0.5,
        dataset_fpcs=(8, 1),
        batch_size=8,
    )
    batches, loader = take(cfg, 8)
    assert loader.bad.count > 0
    for batch in batches:
        for group in batch.groups:
            assert set(group.dataset.tolist()) == ({0} if group.fpc == 8 else {1})
    counts = [sum(len(g.clip) for b in batches for g in b.groups if g.fpc == f) for f in (8, 1)]
    drawn = [loader._sampler(p)[0] for p in range(64)]
    assert counts == [drawn.count(0), drawn.count(1)]


def test_too_many_bad_samples_stop_the_run(mostly_good, make_config):
    manifest, _ = mostly_good
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"cannot be read: over data.max_bad_fraction 0.05; the last: .*repair"):
            take(make_config(manifest, num_workers=workers), 12)
    with pytest.raises(DataError, match="over data.max_bad_fraction 0.4"):
        take(make_config(manifest, max_bad_fraction=0.4), 12)


def test_nothing_readable(broken, write_manifest, make_config):
    manifest = write_manifest([broken["zero"], broken["short"]] * 10)
    with pytest.raises(DataError, match="20 samples in a row cannot be read"):
        take(make_config(manifest, max_bad_fraction=1.0, dataset_fpcs=(16,)), 1)


def test_wrong_settings(tiny_suites, make_config):
    manifest = tiny_suites["motion8"]["train"]
    for cfg, key in (
        (make_config(), "data.datasets"),
        (make_config(manifest, dataset_fpcs=(8, 8)), "dataset_fpcs"),
        (make_config(manifest, datasets_weights=(1.0, 1.0)), "datasets_weights"),
    ):
        with pytest.raises(ConfigError, match=key):
            ClipLoader(cfg)
    with pytest.raises(DataError, match="no such manifest"):
        ClipLoader(make_config("none.csv"))


def test_eval_batches_are_complete_ordered_and_deterministic(tiny_suites):
    manifest = load_manifest(tiny_suites["motion8"]["test"])
    plain = list(eval_batches(manifest, 8, 48, 3))
    assert [len(i) for _, _, i in plain] == [3, 3, 2]
    assert torch.cat([i for _, _, i in plain]).tolist() == list(range(8))
    assert torch.cat([y for _, y, _ in plain]).tolist() == manifest.labels.tolist()
    assert plain[0][0].shape == (3, 3, 8, 48, 48) and plain[0][0].dtype == torch.uint8
    for (a, _, _), (b, _, _) in zip(plain, eval_batches(manifest, 8, 48, 3, workers=3)):
        assert torch.equal(a, b)
    assert torch.equal(eval_clip(manifest.paths[0], 8, 48), plain[0][0][0])
    frames = read_clip(manifest.paths[0], 8, start=4)  # the middle 8 of 16
    assert np.array_equal(eval_clip(manifest.paths[0], 8, 64).numpy(), frames.transpose(3, 0, 1, 2))


def test_eval_of_images_and_bad_files(tiny_suites, broken, write_manifest):
    images = load_manifest(tiny_suites["objects"]["val"])
    (clip, _, _), *_ = eval_batches(images, 4, 64, 8)
    assert clip.shape == (8, 3, 4, 64, 64) and bool((clip == clip[:, :, :1]).all())
    assert np.array_equal(clip[0, :, 0].numpy(), read_image(images.paths[0]).transpose(2, 0, 1))
    good = load_manifest(tiny_suites["motion8"]["train"]).paths[:3]
    some = load_manifest(write_manifest([good[0], broken["cut"], *good[1:]], [4, 5, 6, 7]))
    ((clip, labels, indices),) = eval_batches(some, 16, 64, 4, max_bad_fraction=0.3)
    assert labels.tolist() == [4, 6, 7] and indices.tolist() == [0, 2, 3] and len(clip) == 3
    with pytest.raises(DataError, match="over data.max_bad_fraction"):
        list(eval_batches(some, 16, 64, 4))
