"""Block masks: published sizes and probabilities, distributions, keys, truncation and complements."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from vjepa_fast.errors import ConfigError
from vjepa_fast.ops import (
    BlockSpec,
    _cpp,
    motion_saliency,
    origin_probabilities,
    sample_block_masks,
    use_backend,
)
from vjepa_fast.ops import (
    _philox as philox,
)
from vjepa_fast.ops import block_masks as module

pytestmark = pytest.mark.usefixtures("backend")
GOLDENS = Path(__file__).parents[1] / "goldens"
GRID = (8, 14, 14)
M8 = BlockSpec()
M2 = BlockSpec(num_blocks=2, spatial_scale=(0.7, 0.7))
SPECS = {"m8": M8, "m2": M2}


@pytest.fixture(params=["eager", pytest.param("cpp", marks=pytest.mark.skipif(not _cpp.LOADED, reason="no _C.so"))])
def backend(request):
    """Those that draw thousands of samples in no time; tests/ops holds all to the masks of eager code."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDENS / "masks.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def meta():
    return json.loads((GOLDENS / "masks_meta.json").read_text())


def one_block(spec, seed, samples, saliency=None, grid=GRID):
    """Origins (start, top, left) of single-block masks, read back from the predicted tokens."""
    masks = sample_block_masks(samples, grid, [spec], saliency, seed=seed, step=0, truncate="none")
    assert masks.pred_len.unique().numel() == 1
    first = masks.pred[0, :, 0]
    return torch.stack([first // (grid[1] * grid[2]), first // grid[2] % grid[1], first % grid[2]], dim=1)


@pytest.mark.parametrize("name", ["m8", "m2"])
def test_block_size_formula_is_the_published_one(golden, name):
    for counter, want in enumerate(golden[f"mask/{name}/block_sizes_step0_9"]):
        generator = torch.Generator().manual_seed(counter)
        uniforms = [torch.rand(1, generator=generator).item() for _ in range(3)]
        assert module.block_size(GRID, SPECS[name], *uniforms) == tuple(want)


@pytest.mark.parametrize("name", ["m8", "m2"])
def test_block_sizes_occur_as_often_as_published(golden, name):
    values = [tuple(v) for v in golden[f"mask/{name}/block_size_values_30000"]]
    counts = golden[f"mask/{name}/block_size_counts_30000"]
    # Many specs in one call: the same draw as many steps, without a Python loop.
    specs = [SPECS[name]] * 250
    seen = [size for step in range(16) for size in module.sample_block_sizes(GRID, specs, seed=3, step=step)]
    assert set(seen) <= set(values)
    table = np.array([[seen.count(v) for v in values], counts])
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_probabilities_match_goldens(golden, meta):
    for n, case in enumerate(meta["origin_cases"]):
        name, sample = case["map"].split(":")
        saliency = torch.from_numpy(golden[name])[int(sample)]
        got = origin_probabilities(saliency, case["block"], case["strength"], case["random_rate"])
        np.testing.assert_allclose(got, golden[f"origin/{n}/probs_f64"], rtol=1e-10, atol=1e-13)
        np.testing.assert_allclose(got, golden[f"origin/{n}/probs"], atol=2e-7)


def test_unguided_origins_are_uniform():
    spec = BlockSpec(num_blocks=1, aspect_ratio=(1.0, 1.0), temporal_scale=(0.5, 0.5))
    origins = one_block(spec, seed=1, samples=5000)
    # h = w = round(sqrt(29)) = 5, t = 4: 5 x 10 x 10 origins
    flat = (origins[:, 0] * 10 + origins[:, 1]) * 10 + origins[:, 2]
    observed = torch.bincount(flat, minlength=500)
    assert len(observed) == 500
    assert stats.chisquare(observed.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(("strength", "rate"), [(2.0, 0.1), (5.0, 0.0)])
def test_guided_origins_follow_the_analytic_distribution(golden, strength, rate):
    spec = BlockSpec(
        num_blocks=1,
        aspect_ratio=(1.0, 1.0),
        motion_guided=True,
        motion_guided_strength=strength,
        motion_guided_random_rate=rate,
    )
    saliency = torch.from_numpy(golden["motion/large_blob/map"])[0]
    samples = 5000
    origins = one_block(spec, seed=2, samples=samples, saliency=saliency.expand(samples, -1, -1, -1))
    observed = torch.bincount(origins[:, 1] * 10 + origins[:, 2], minlength=100).numpy()
    expected = origin_probabilities(saliency, (8, 5, 5), strength, rate).numpy() * samples
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    assert stats.chisquare(observed[keep], expected[keep]).pvalue > 1e-3
    uniform = np.full(len(observed), samples / len(observed))
    assert stats.chisquare(observed, uniform).pvalue < 1e-6  # and it is not the unguided one


def test_guidance_uses_each_samples_own_map(golden):
    spec = BlockSpec(num_blocks=1, motion_guided=True, motion_guided_strength=20.0, motion_guided_random_rate=0.0)
    saliency = torch.zeros(2, *GRID)
    saliency[0, :, :3, :3] = 1.0
    saliency[1, :, -3:, -3:] = 1.0
    origins = one_block(spec, seed=0, samples=2, saliency=saliency)
    assert origins[0, 1:].max() <= 2
    assert origins[1, 1:].min() >= 5


@pytest.mark.parametrize("name", ["m8", "m2"])
def test_lengths_are_distributed_as_published(golden, name):
    """250 calls of batch 8, as the golden. Lengths within a call share the block size, so calls are compared."""
    want = golden[f"mask/{name}/stats2000/pre_enc_lens"].reshape(250, 8).astype(float)
    draws = [sample_block_masks(8, GRID, [SPECS[name]], seed=5, step=step, truncate="none") for step in range(250)]
    got = np.stack([draw.enc_len[0].numpy() for draw in draws]).astype(float)
    assert stats.ks_2samp(got.mean(1), want.mean(1)).pvalue > 1e-3
    assert stats.ks_2samp(got.min(1), golden[f"mask/{name}/stats2000/post_enc_lens_b8"]).pvalue > 1e-3
    assert stats.ks_2samp(1568 - got.max(1), golden[f"mask/{name}/stats2000/post_pred_lens_b8"]).pvalue > 1e-3
    assert abs(got.mean() - want.mean()) < 4 * want.mean(1).std() / np.sqrt(125)


@pytest.mark.parametrize("name", ["m8", "m2"])
def test_batch_truncation_starves_late_time_steps_as_published(golden, meta, name):
    seen = torch.zeros(8)
    for step in range(100):
        masks = sample_block_masks(8, GRID, [SPECS[name]], seed=6, step=step)
        enc = masks.trim()[0][0]
        seen += torch.bincount((enc // 196).flatten(), minlength=8)
    np.testing.assert_allclose(seen / seen[0], meta[f"stats_{name}"]["enc_time_profile"], atol=0.1)
    assert golden[f"mask/{name}/stats2000/enc_tokens_per_time"].argmax() == 0


@pytest.mark.parametrize("truncate", ["none", "batch", "random"])
def test_a_mask_is_a_function_of_its_keys(truncate):
    keys = {"seed": 11, "step": 4, "truncate": truncate}
    whole = sample_block_masks(8, GRID, [M8, M2], first_sample=16, **keys)
    again = sample_block_masks(8, GRID, [M8, M2], first_sample=16, **keys)
    assert all(torch.equal(getattr(whole, f), getattr(again, f)) for f in ("enc", "pred", "enc_len", "pred_len"))
    if truncate == "none":
        for b in range(8):
            alone = sample_block_masks(1, GRID, [M8, M2], first_sample=16 + b, **keys)
            assert torch.equal(alone.enc[:, 0], whole.enc[:, b]) and torch.equal(alone.pred[:, 0], whole.pred[:, b])
        second = sample_block_masks(8, GRID, [M2], first_sample=16, first_spec=1, **keys)
        assert torch.equal(second.enc[0], whole.enc[1])


def test_every_key_changes_the_masks():
    base = dict(seed=1, step=2, first_sample=3, first_spec=0)
    draw = {name: sample_block_masks(4, GRID, [M8], **{**base, name: base[name] + 1}).enc for name in base}
    draw["base"] = sample_block_masks(4, GRID, [M8], **base).enc
    draw["high seed"] = sample_block_masks(4, GRID, [M8], **{**base, "seed": 1 + (1 << 32)}).enc
    names = list(draw)
    assert all(not torch.equal(draw[a], draw[b]) for i, a in enumerate(names) for b in names[:i])
    samples = sample_block_masks(16, GRID, [M8], **base, truncate="none").enc[0]
    assert len({tuple(row.tolist()) for row in samples}) == 16


@pytest.mark.parametrize("truncate", ["none", "batch", "random"])
@pytest.mark.parametrize("guided", [False, True])
def test_masks_are_sorted_disjoint_and_padded_with_zero(truncate, guided):
    specs = [replace(M8, motion_guided=guided), replace(M2, motion_guided=guided)]
    saliency = torch.rand(6, *GRID, generator=torch.Generator().manual_seed(0))
    masks = sample_block_masks(6, GRID, specs, saliency, seed=9, step=1, truncate=truncate)
    assert masks.enc.shape == masks.pred.shape == (2, 6, 1568) and masks.enc.dtype == torch.int64
    for s in range(2):
        for b in range(6):
            enc = masks.enc[s, b, : masks.enc_len[s, b]]
            pred = masks.pred[s, b, : masks.pred_len[s, b]]
            assert len(enc) > 0 and len(pred) > 0
            assert (enc.diff() > 0).all() and (pred.diff() > 0).all()
            assert not set(enc.tolist()) & set(pred.tolist())
            assert masks.enc[s, b, len(enc) :].eq(0).all() and masks.pred[s, b, len(pred) :].eq(0).all()
            if truncate == "none":
                assert len(enc) + len(pred) == 1568
    if truncate == "none":
        with pytest.raises(ValueError, match="differ in length"):
            masks.trim()
    else:
        enc, pred = masks.trim()
        assert [tuple(m.shape) for m in enc] == [(6, int(n)) for n in masks.enc_len[:, 0]]
        assert torch.equal(pred[1], masks.pred[1, :, : masks.pred_len[1, 0]])


def test_batch_truncation_keeps_the_earliest_and_random_a_fair_subset():
    whole = sample_block_masks(8, GRID, [M8], seed=2, step=7, truncate="none")
    first = sample_block_masks(8, GRID, [M8], seed=2, step=7, truncate="batch")
    random = sample_block_masks(8, GRID, [M8], seed=2, step=7, truncate="random")
    for field in ("enc", "pred"):
        all_tokens, all_length = getattr(whole, field)[0], getattr(whole, f"{field}_len")[0]
        length = all_length.min()
        for cut in (first, random):
            assert getattr(cut, f"{field}_len").eq(length).all()
        assert torch.equal(getattr(first, field)[0, :, :length], all_tokens[:, :length])
        for b in range(8):
            kept = set(getattr(random, field)[0, b, :length].tolist())
            assert len(kept) == length and kept <= set(all_tokens[b, : all_length[b]].tolist())
    counts = torch.zeros(8)
    for step in range(60):
        enc = sample_block_masks(8, GRID, [M8], seed=2, step=step, truncate="random").trim()[0][0]
        counts += torch.bincount((enc // 196).flatten(), minlength=8)
    assert counts.min() / counts.max() > 0.95  # no time step is starved


def test_complements_max_keep_and_swap():
    everything = set(range(1568))
    draw = {"seed": 3, "step": 5}
    plain = sample_block_masks(4, GRID, [M8], **draw).trim()
    full = sample_block_masks(4, GRID, [replace(M8, full_complement=True)], **draw).trim()
    pred_full = sample_block_masks(4, GRID, [replace(M8, pred_full_complement=True)], **draw).trim()
    swapped = sample_block_masks(4, GRID, [replace(M8, inv_block=True)], **draw).trim()
    short = sample_block_masks(4, GRID, [replace(M8, max_keep=40)], **draw).trim()
    both = sample_block_masks(4, GRID, [replace(M8, max_keep=40, full_complement=True, inv_block=True)], **draw).trim()
    assert torch.equal(full[0][0], plain[0][0]) and torch.equal(pred_full[1][0], plain[1][0])
    for b in range(4):
        assert set(full[1][0][b].tolist()) == everything - set(plain[0][0][b].tolist())
        assert set(pred_full[0][0][b].tolist()) == everything - set(plain[1][0][b].tolist())
    assert torch.equal(swapped[0][0], plain[1][0]) and torch.equal(swapped[1][0], plain[0][0])
    assert torch.equal(short[0][0], plain[0][0][:, :40]) and torch.equal(short[1][0], plain[1][0])
    assert both[0][0].shape == (4, 1528) and torch.equal(both[1][0], plain[0][0][:, :40])


def test_future_masks_have_context_in_the_first_half_only(golden):
    spec = BlockSpec(num_blocks=4, max_temporal_keep=0.5, full_complement=True)
    enc, pred = (masks[0] for masks in sample_block_masks(4, GRID, [spec], seed=5, step=0).trim())
    assert enc.max() < 4 * 196 and golden["mask/future_m4/seed5/enc"].max() < 4 * 196
    assert enc.shape[1] + pred.shape[1] == 1568
    assert all(set(range(4 * 196, 1568)) <= set(row.tolist()) for row in pred)


def test_empty_context_is_redrawn_and_gives_up_in_the_end(monkeypatch):
    # Two blocks of 4x3 on a 4x4 grid leave nothing whenever their two possible origins differ: half of the time.
    spec = BlockSpec(num_blocks=2, spatial_scale=(0.75, 0.75), aspect_ratio=(4 / 3, 4 / 3))
    masks = sample_block_masks(256, (2, 4, 4), [spec], seed=0, step=0, truncate="none")
    assert masks.enc_len.min() == masks.enc_len.max() == 8
    with pytest.raises(ConfigError, match=r"masks.specs\[0\].*no context"):
        sample_block_masks(1, (2, 4, 4), [BlockSpec(spatial_scale=(1.0, 1.0), aspect_ratio=(1.0, 1.0))], seed=0, step=0)
    monkeypatch.setattr(module, "MAX_REDRAWS", 1)
    with pytest.raises(ConfigError, match="after 1 redraws"):
        sample_block_masks(256, (2, 4, 4), [spec], seed=0, step=0)


def test_redrawn_samples_do_not_disturb_the_others():
    spec = BlockSpec(num_blocks=2, spatial_scale=(0.75, 0.75), aspect_ratio=(4 / 3, 4 / 3))
    whole = sample_block_masks(32, (2, 4, 4), [spec], seed=0, step=0, truncate="none")
    for b in range(32):
        alone = sample_block_masks(1, (2, 4, 4), [spec], seed=0, step=0, first_sample=b, truncate="none")
        assert torch.equal(alone.enc[:, 0], whole.enc[:, b])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_blocks": 0}, "num_blocks"),
        ({"num_blocks": 1 << 14}, "num_blocks"),
        ({"spatial_scale": (0.5, 0.2)}, "spatial_scale"),
        ({"temporal_scale": (0.5, 1.5)}, "temporal_scale"),
        ({"aspect_ratio": (0.0, 1.0)}, "aspect_ratio"),
        ({"max_temporal_keep": 0.0}, "max_temporal_keep"),
        ({"max_keep": 0}, "max_keep"),
        ({"motion_guided_strength": -1.0}, "motion_guided_strength"),
        ({"motion_guided_random_rate": 1.5}, "motion_guided_random_rate"),
    ],
)
def test_bad_fields_are_named(change, field):
    with pytest.raises(ConfigError, match=rf"masks.specs.1.{field}: must be"):
        sample_block_masks(1, GRID, [M8, replace(M8, **change)], seed=0, step=0)


def test_still_clip_is_masked_uniformly():
    with use_backend("auto"):
        saliency = motion_saliency(torch.zeros(1, 3, 16, 112, 112, dtype=torch.uint8), (8, 7, 7), None, (1.0, 1.0, 1.0))
    got = origin_probabilities(saliency, (8, 3, 3), 5.0, 0.0)
    torch.testing.assert_close(got, torch.full_like(got, 1 / 25))


def test_the_counter_has_room_for_every_draw():
    assert module.MAX_REDRAWS < philox.MAX_ATTEMPTS
    with pytest.raises(ConfigError, match="from 1 to 256 masks"):
        sample_block_masks(1, GRID, [M8, M8], seed=0, step=0, first_spec=255)


def test_specs_survive_the_schema_of_the_op():
    for spec in (M8, replace(M2, max_keep=7, inv_block=True, motion_guided=True, motion_guided_random_rate=0.0)):
        assert module._unflatten(module._flatten(spec)) == spec


def test_seeds_beyond_63_bits_are_keys_too():
    draws = [sample_block_masks(2, GRID, [M8], seed=seed, step=0).enc for seed in (-1, (1 << 64) - 1, 1 << 63, 0)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[2], draws[3])


def test_smallest_blocks_are_one_token():
    masks = sample_block_masks(4, (2, 2, 2), [BlockSpec(num_blocks=1)], seed=0, step=0)
    assert module.block_size((2, 2, 2), BlockSpec(), 0.0, 0.0, 0.0) == (2, 1, 1)
    assert masks.pred_len.eq(2).all() and masks.enc_len.eq(6).all()


def philox_by_hand(counter, key):
    """Plain integers, straight from the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_masks_follow_the_documented_counters():
    """What a kernel has to reproduce bit for bit, recomputed with plain integers."""
    grid, step, first, spec = (4, 6, 5), 17, (1 << 32) + 2, BlockSpec(num_blocks=3, temporal_scale=(0.3, 0.9))
    seed = (5 << 32) | 7
    u = [word / 2**32 for word in philox_by_hand((0, 0, step, 1 << 20), (7, 5))[:3]]
    size = module.block_size(grid, spec, *u)
    contexts, words = [], []
    for b in range(2):
        key = ((first + b) & 0xFFFFFFFF, (first + b) >> 32, step)
        context = np.ones(grid, bool)
        for block in range(3):
            draw = philox_by_hand((*key, 1 << 28 | 1 << 20 | block), (7, 5))
            at = [word * (extent - length + 1) >> 32 for word, extent, length in zip(draw, grid, size)]
            context[tuple(slice(o, o + length) for o, length in zip(at, size))] = False
        contexts.append(np.flatnonzero(context))
        words.append([w for i in range(30) for w in philox_by_hand((*key, 2 << 28 | 1 << 20 | i), (7, 5))])
    length = min(map(len, contexts))
    got = sample_block_masks(2, grid, [M8, spec], seed=seed, step=step, first_sample=first, truncate="random").trim()[
        0
    ][1]
    for b in range(2):
        want = sorted(sorted(contexts[b], key=lambda n: words[b][n])[:length])
        assert got[b].tolist() == want
    assert len({len(c) for c in contexts}) == 2  # so that something was cut
