"""sample_block_masks: published sizes and probabilities, keys, truncation; every backend draws eager code's masks."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.draws import given, settings, st
from tests.ops.mask_cases import (
    GOLDENS,
    GRID,
    GUIDED,
    HOPELESS,
    M2,
    M8,
    SMALL,
    TIGHT,
    assert_same,
    block_specs,
    chi_square,
    draw,
    drawn_origins,
    maps,
    one_block,
    spec_of_size,
)
from tests.ops.parity import BACKENDS, KERNELS, device_for
from vjepa_fast import ops
from vjepa_fast.errors import ConfigError
from vjepa_fast.ops import BlockSpec, _cpp, motion_saliency, origin_probabilities, sample_block_masks
from vjepa_fast.ops import block_masks as module

SPECS = {"m8": M8, "m2": M2}


@pytest.fixture(params=["eager", pytest.param("cpp", marks=pytest.mark.skipif(not _cpp.LOADED, reason="no _C.so"))])
def quick(request):
    """The backends that draw thousands of samples in no time; all are held to the masks of eager code below."""
    with ops.use_backend(request.param):
        yield request.param


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDENS / "masks.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def meta():
    return json.loads((GOLDENS / "masks_meta.json").read_text())


@pytest.mark.parametrize("name", ["m8", "m2"])
def test_block_size_formula_is_the_published_one(golden, name):
    for counter, want in enumerate(golden[f"mask/{name}/block_sizes_step0_9"]):
        generator = torch.Generator().manual_seed(counter)
        uniforms = [torch.rand(1, generator=generator).item() for _ in range(3)]
        assert module.block_size(GRID, SPECS[name], *uniforms) == tuple(want)


@pytest.mark.parametrize("name", ["m8", "m2"])
def test_block_sizes_occur_as_often_as_published(golden, name):
    stats = pytest.importorskip("scipy.stats")
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


@pytest.mark.usefixtures("quick")
def test_unguided_origins_are_uniform():
    spec = BlockSpec(num_blocks=1, aspect_ratio=(1.0, 1.0), temporal_scale=(0.5, 0.5))
    origins = one_block(spec, seed=1, samples=5000)
    # h = w = round(sqrt(29)) = 5, t = 4: 5 x 10 x 10 origins
    flat = (origins[:, 0] * 10 + origins[:, 1]) * 10 + origins[:, 2]
    observed = torch.bincount(flat, minlength=500)
    assert len(observed) == 500
    assert chi_square(observed.numpy(), np.full(500, 10.0)) > 1e-3


@pytest.mark.usefixtures("quick")
def test_guidance_uses_each_samples_own_map(golden):
    spec = BlockSpec(num_blocks=1, motion_guided=True, motion_guided_strength=20.0, motion_guided_random_rate=0.0)
    saliency = torch.zeros(2, *GRID)
    saliency[0, :, :3, :3] = 1.0
    saliency[1, :, -3:, -3:] = 1.0
    origins = one_block(spec, seed=0, samples=2, saliency=saliency)
    assert origins[0, 1:].max() <= 2
    assert origins[1, 1:].min() >= 5


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["m8", "m2"])
def test_lengths_are_distributed_as_published(golden, name):
    """250 calls of batch 8, as the golden. Lengths within a call share the block size, so calls are compared."""
    stats = pytest.importorskip("scipy.stats")
    want = golden[f"mask/{name}/stats2000/pre_enc_lens"].reshape(250, 8).astype(float)
    draws = [sample_block_masks(8, GRID, [SPECS[name]], seed=5, step=step, truncate="none") for step in range(250)]
    got = np.stack([draw.enc_len[0].numpy() for draw in draws]).astype(float)
    assert stats.ks_2samp(got.mean(1), want.mean(1)).pvalue > 1e-3
    assert stats.ks_2samp(got.min(1), golden[f"mask/{name}/stats2000/post_enc_lens_b8"]).pvalue > 1e-3
    assert stats.ks_2samp(1568 - got.max(1), golden[f"mask/{name}/stats2000/post_pred_lens_b8"]).pvalue > 1e-3
    assert abs(got.mean() - want.mean()) < 4 * want.mean(1).std() / np.sqrt(125)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["m8", "m2"])
def test_batch_truncation_starves_late_time_steps_as_published(golden, meta, name):
    seen = torch.zeros(8)
    for step in range(100):
        masks = sample_block_masks(8, GRID, [SPECS[name]], seed=6, step=step)
        enc = masks.trim()[0][0]
        seen += torch.bincount((enc // 196).flatten(), minlength=8)
    np.testing.assert_allclose(seen / seen[0], meta[f"stats_{name}"]["enc_time_profile"], atol=0.1)
    assert golden[f"mask/{name}/stats2000/enc_tokens_per_time"].argmax() == 0


@pytest.mark.usefixtures("quick")
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


@pytest.mark.usefixtures("quick")
def test_every_key_changes_the_masks():
    base = dict(seed=1, step=2, first_sample=3, first_spec=0)
    draw = {name: sample_block_masks(4, GRID, [M8], **{**base, name: base[name] + 1}).enc for name in base}
    draw["base"] = sample_block_masks(4, GRID, [M8], **base).enc
    draw["high seed"] = sample_block_masks(4, GRID, [M8], **{**base, "seed": 1 + (1 << 32)}).enc
    seeds = {"seed -1": -1, "seed 2**63": 1 << 63}
    draw |= {k: sample_block_masks(4, GRID, [M8], **{**base, "seed": seed}).enc for k, seed in seeds.items()}
    same = sample_block_masks(4, GRID, [M8], **{**base, "seed": (1 << 64) - 1}).enc  # keys are taken modulo 2**64
    assert torch.equal(draw["seed -1"], same)
    names = list(draw)
    assert all(not torch.equal(draw[a], draw[b]) for i, a in enumerate(names) for b in names[:i])
    samples = sample_block_masks(16, GRID, [M8], **base, truncate="none").enc[0]
    assert len({tuple(row.tolist()) for row in samples}) == 16


@pytest.mark.usefixtures("quick")
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


@pytest.mark.usefixtures("quick")
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


@pytest.mark.usefixtures("quick")
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


@pytest.mark.usefixtures("quick")
def test_future_masks_have_context_in_the_first_half_only(golden):
    spec = BlockSpec(num_blocks=4, max_temporal_keep=0.5, full_complement=True)
    enc, pred = (masks[0] for masks in sample_block_masks(4, GRID, [spec], seed=5, step=0).trim())
    assert enc.max() < 4 * 196 and golden["mask/future_m4/seed5/enc"].max() < 4 * 196
    assert enc.shape[1] + pred.shape[1] == 1568
    assert all(set(range(4 * 196, 1568)) <= set(row.tolist()) for row in pred)


@pytest.mark.usefixtures("quick")
def test_redraws_come_to_an_end(monkeypatch):
    monkeypatch.setattr(module, "MAX_REDRAWS", 1)
    with pytest.raises(ConfigError, match="after 1 redraws"):
        sample_block_masks(256, (2, 4, 4), [TIGHT], seed=0, step=0)


@pytest.mark.usefixtures("quick")
def test_redrawn_samples_do_not_disturb_the_others():
    whole = sample_block_masks(32, (2, 4, 4), [TIGHT], seed=0, step=0, truncate="none")
    for b in range(32):
        alone = sample_block_masks(1, (2, 4, 4), [TIGHT], seed=0, step=0, first_sample=b, truncate="none")
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
    with ops.use_backend("auto"):
        saliency = motion_saliency(torch.zeros(1, 3, 16, 112, 112, dtype=torch.uint8), (8, 7, 7), None, (1.0, 1.0, 1.0))
    got = origin_probabilities(saliency, (8, 3, 3), 5.0, 0.0)
    torch.testing.assert_close(got, torch.full_like(got, 1 / 25))


def test_specs_survive_the_schema_of_the_op():
    for spec in (M8, replace(M2, max_keep=7, inv_block=True, motion_guided=True, motion_guided_random_rate=0.0)):
        assert module._unflatten(module._flatten(spec)) == spec


@pytest.mark.usefixtures("quick")
def test_smallest_blocks_are_one_token():
    masks = sample_block_masks(4, (2, 2, 2), [BlockSpec(num_blocks=1)], seed=0, step=0)
    assert module.block_size((2, 2, 2), BlockSpec(), 0.0, 0.0, 0.0) == (2, 1, 1)
    assert masks.pred_len.eq(2).all() and masks.enc_len.eq(6).all()


@pytest.mark.parametrize("truncate", module.TRUNCATE)
@pytest.mark.parametrize("specs", [[M8, M2], [GUIDED[0], M2]])
@pytest.mark.parametrize("backend", KERNELS)
def test_equal_to_eager(backend, specs, truncate):
    saliency = maps(2, GRID) if specs[0].motion_guided else None
    keys = dict(seed=-5, step=1 << 31, first_sample=(3 << 32) - 1, first_spec=200, truncate=truncate)
    got = draw(backend, 2, GRID, specs, saliency, **keys)
    assert_same(got, draw("eager", 2, GRID, specs, saliency, **keys))


@pytest.mark.parametrize("truncate", module.TRUNCATE)
@pytest.mark.parametrize("backend", KERNELS)
def test_complements_swap_and_max_keep(backend, truncate):
    base = BlockSpec(num_blocks=2, spatial_scale=(0.3, 0.5), temporal_scale=(0.3, 0.9))
    specs = [
        replace(base, full_complement=full, pred_full_complement=pred_full, inv_block=swap, max_keep=keep)
        for full, pred_full in ((0, 0), (1, 0), (0, 1), (1, 1))
        for swap, keep in ((0, 7), (1, None))
    ]
    args = (2, (3, 5, 6), specs)
    assert_same(draw(backend, *args, truncate=truncate), draw("eager", *args, truncate=truncate))


@pytest.mark.parametrize("backend", KERNELS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(2, 12), st.integers(2, 12)),
    b=st.integers(1, 2),
    specs=st.lists(block_specs(), min_size=1, max_size=2),
    truncate=st.sampled_from(module.TRUNCATE),
    seed=st.integers(0, (1 << 64) - 1),
    step=st.integers(0, (1 << 32) - 1),
)
def test_any_grid_and_spec(backend, grid, b, specs, truncate, seed, step):
    keys = dict(seed=seed, step=step, truncate=truncate)
    saliency = maps(b, grid, seed % 1000)
    try:
        want = draw("eager", b, grid, specs, saliency, **keys)
    except ConfigError as error:
        with pytest.raises(ConfigError, match=str(error).split(":")[0].replace("[", r"\[")):
            draw(backend, b, grid, specs, saliency, **keys).trim()
    else:
        assert_same(draw(backend, b, grid, specs, saliency, **keys), want)


@pytest.mark.parametrize(
    ("grid", "scale", "time", "count", "strength", "rate"),
    [
        ((4, 14, 14), 0.15, 1.0, 2000, 5.5, 0.0),  # 100 origins or so
        (GRID, 0.001, 0.01, 1500, 2.0, 0.1),  # 1568: several passes of the kernel
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_guided_origins_are_those_of_the_same_uniforms(backend, grid, scale, time, count, strength, rate):
    """The contract: 99.9 % equal, and different only where a draw is within 1e-6 of a step."""
    spec = BlockSpec(
        spatial_scale=(scale, scale),
        temporal_scale=(time, time),
        motion_guided=True,
        motion_guided_strength=strength,
        motion_guided_random_rate=rate,
    )
    saliency = maps(1, grid, 5)[0]
    got, u, size = drawn_origins(backend, saliency, spec, count)
    cdf = origin_probabilities(saliency, size, strength, rate).cumsum(0)
    want = torch.searchsorted(cdf, u, right=True).clamp_max(len(cdf) - 1)
    assert (got == want).double().mean() >= 0.999
    near = ((u - cdf[want]).abs() < 1e-6) | ((u - cdf[(want - 1).clamp_min(0)]).abs() < 1e-6)
    assert near[got != want].all()
    assert len(got.unique()) > 20  # not all in one place


@pytest.mark.parametrize("case", [12, 15])  # 169 and 780 origins
def test_guided_origins_follow_the_published_probabilities(golden, meta, quick, case):
    """Of the backends that are quick; the other one draws what they draw, above."""
    about = meta["origin_cases"][case]
    name, sample = about["map"].split(":")
    saliency, want = torch.from_numpy(golden[name])[int(sample)], golden[f"origin/{case}/probs_f64"]
    spec = spec_of_size(about["block"], saliency.shape, about["strength"], about["random_rate"])
    got, _, size = drawn_origins(quick, saliency, spec, 3000)
    assert list(size) == about["block"]
    expected = want / want.sum() * len(got)
    group = np.unique((expected.cumsum() / 10).astype(int), return_inverse=True)[1]  # of successive origins, 10 draws
    group = np.minimum(group, group[-1] - 1)
    observed, expected = np.bincount(group[got.numpy()], minlength=group[-1] + 1), np.bincount(group, expected)
    assert len(expected) > 20
    assert chi_square(observed, expected) > 1e-3
    uniform = np.bincount(group) * len(got) / len(want)
    assert chi_square(observed, uniform) < 1e-6  # and they are not the unguided ones


@pytest.mark.parametrize("backend", KERNELS)
def test_a_map_larger_than_a_tile(backend):
    grid, specs = (5, 20, 30), [replace(GUIDED[0], temporal_scale=(0.4, 0.9), motion_guided_strength=1.3)]
    assert_same(draw(backend, 2, grid, specs, maps(2, grid)), draw("eager", 2, grid, specs, maps(2, grid)))


@pytest.mark.parametrize("backend", KERNELS)
def test_redraws_are_those_of_eager(backend):
    grid, specs = (2, 4, 4), [TIGHT, replace(TIGHT, motion_guided=True)]
    want = draw("eager", 6, grid, specs, maps(6, grid), truncate="none")
    assert want.enc_len.eq(8).all()  # without redraws half would be 0
    assert_same(draw(backend, 6, grid, specs, maps(6, grid), truncate="none"), want)


@pytest.mark.parametrize("truncate", module.TRUNCATE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_context_is_an_error_that_names_the_mask(backend, truncate):
    with pytest.raises(ConfigError, match=r"masks.specs\[1\]: no context is left after 32 redraws.*; lower spatial"):
        draw(backend, 1, (2, 4, 4), [SMALL, HOPELESS], truncate=truncate).trim()


@pytest.mark.parametrize(
    ("truncate", "flags"),
    [
        ("none", {}),
        ("none", {"pred_full_complement": True, "inv_block": True}),
        ("none", {"full_complement": True}),
        ("batch", {"full_complement": True}),
        ("random", {"pred_full_complement": True, "inv_block": True}),
    ],
)
def test_lengths_of_0_tell_of_no_context_without_waiting(monkeypatch, truncate, flags):
    """A kernel cannot raise: both lengths are 0, of the sample, or of the spec where the batch is cut to one length."""
    pytest.importorskip("triton")
    monkeypatch.setattr(module, "MAX_REDRAWS", 0)
    got = draw("triton", 6, (2, 4, 4), [replace(TIGHT, **flags), SMALL], truncate=truncate)
    failed = got.enc_len[0] == 0
    assert torch.equal(failed, got.pred_len[0] == 0) and failed.any()
    assert failed.all() == (truncate != "none")
    assert not got.enc[0][failed].any() and not got.pred[0][failed].any()
    assert (got.enc_len[1] > 0).all() and (got.pred_len[1] > 0).all()
    with pytest.raises(ConfigError, match=r"masks.specs\[0\]: no context is left after 0 redraws"):
        got.trim()


@pytest.mark.parametrize("backend", KERNELS)
def test_saliency_may_be_strided(backend):
    saliency = maps(4, (14, 14, 4)).permute(0, 3, 1, 2)[::2]
    want = draw("eager", 2, (4, 14, 14), GUIDED, saliency)
    assert_same(draw(backend, 2, (4, 14, 14), GUIDED, saliency), want)
    assert_same(draw(backend, 2, (4, 14, 14), GUIDED, saliency.contiguous()), want)


@pytest.mark.parametrize("backend", KERNELS)
def test_float64_saliency_is_left_to_eager(backend):
    saliency = maps(1, (2, 6, 6)).double()
    with pytest.raises(ops.BackendError, match="block_masks cannot run on backend '.*float64"):
        draw(backend, 1, (2, 6, 6), GUIDED, saliency)
    assert_same(draw("auto", 1, (2, 6, 6), GUIDED, saliency), draw("eager", 1, (2, 6, 6), GUIDED, saliency))


def test_bfloat16_saliency_on_the_gpu():
    pytest.importorskip("triton")
    saliency = maps(2, (4, 6, 6)).bfloat16()
    assert_same(draw("triton", 2, (4, 6, 6), GUIDED, saliency), draw("eager", 2, (4, 6, 6), GUIDED, saliency.float()))


@pytest.mark.skipif(not _cpp.LOADED, reason=_cpp.REASON or "-")
def test_threads_do_not_matter():
    threads = torch.get_num_threads()
    want = draw("cpp", 9, GRID, GUIDED, maps(9, GRID), truncate="random")
    try:
        torch.set_num_threads(3)
        assert_same(draw("cpp", 9, GRID, GUIDED, maps(9, GRID), truncate="random"), want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_and_compile(backend, guided):
    device = torch.device(device_for(backend))
    saliency = maps(2, (2, 5, 6)).to(device) if guided else None
    specs = GUIDED if guided else [M8, M2]
    flat = [x for spec in specs for x in module._flatten(spec)]
    with ops.use_backend(backend):
        torch.library.opcheck(module._block_masks, (saliency, 2, [2, 5, 6], flat, [1, 2, 3, 0], "batch", device))

        def fn(x):
            masks = ops.sample_block_masks(2, (2, 5, 6), specs, x, seed=1, step=2, device=device)
            return masks.enc + 1, masks.pred_len

        compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
        assert all(torch.equal(a, b) for a, b in zip(compiled(saliency), fn(saliency)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments(backend):
    with pytest.raises(ValueError, match="sample_block_masks: B: expected a positive int, got 0"):
        draw(backend, 0, GRID, [M8])
    with pytest.raises(ValueError, match=r"saliency: expected \[B,T,H,W\] = \[1, 8, 14, 14\], got \[2, 8, 14, 14\]"):
        draw(backend, 1, GRID, [M8], maps(2, GRID))
    with pytest.raises(ConfigError, match="masks.truncate"):
        draw(backend, 1, GRID, [M8], truncate="last")
    with pytest.raises(ValueError, match="saliency: expected device meta"), ops.use_backend(backend):
        ops.sample_block_masks(1, GRID, [M8], maps(1, GRID), seed=0, step=0, device="meta")
    with pytest.raises(ValueError, match="step must be in"):
        draw(backend, 1, GRID, [M8], step=1 << 32)
