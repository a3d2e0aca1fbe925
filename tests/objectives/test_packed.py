"""Masks whose samples keep different numbers of tokens: what each term makes of them."""

import dataclasses
import math

import pytest
import torch

from tests.objectives.test_contract import gradients
from tests.objectives.tiny import FEATURES, pack, ragged, random_state, value_of
from vjepa_fast import ops
from vjepa_fast.layers.packed import Stream
from vjepa_fast.objectives import OBJECTIVES, LatentState, build_objectives

TERMS = sorted(OBJECTIVES)
each_term = pytest.mark.parametrize("term", TERMS)
VARIANTS = [(t, {}) for t in TERMS if t not in ("sigreg", "fwm_orth")] + [
    ("context", {"weight_distance": True}),
    ("ld", {"hard_weighting": 0.5, "hard_scope": "sample"}),
    ("fwm_static", {"normalize": True}),
    ("pred", {"loss_exp": 2.0}),
    ("hw", {"temp": 0.1}),
]


def build(term, fields=None, embed_dim=4, dtype=torch.float64):
    always = {"sigreg": {"num_slices": 16}, "context": {"warmup": [0, 0]}}.get(term, {})
    spec = {term: {**always, **(fields or {})}}
    return build_objectives(spec, levels=2, embed_dim=embed_dim, patch_size=2, target_grad=True).to(dtype)


def packed_state(state):
    """The same samples with their tokens in one row."""
    fields = {}
    for name in ("masks_enc", "masks_pred"):
        fields[name] = [[pack(list(m), h.shape[1]) for m in ms] for ms, h in zip(getattr(state, name), state.h)]
    for name in FEATURES:
        rows = [
            [x.detach().flatten(0, 1)[None].requires_grad_(x.requires_grad) for x in xs] for xs in getattr(state, name)
        ]
        fields[name] = rows
    return dataclasses.replace(state, **fields)


def pairs(tokens, places):
    return sum(t + places in set(tokens) for t in tokens)


def columns(tokens, grid):
    s = grid[1] * grid[2]
    return sum(all(t * s + p in set(tokens) for t in range(grid[0])) for p in range(s))


def weight(term, state):
    """What a sample counts in a mean over all: its tokens, its pairs or its columns."""
    cls, grid = OBJECTIVES[term], state.grids[0]
    if cls.access == "TOKEN":
        return state.masks_enc[0][0].shape[1] if "z_context" in cls.needs else state.masks_pred[0][0].shape[1]
    if "masks_enc" not in cls.needs:
        return 1  # of the whole grid
    tokens = state.masks_enc[0][0][0].tolist()
    return columns(tokens, grid) if cls.access == "COLUMN" else pairs(tokens, grid[1] * grid[2])


@each_term
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_samples_of_equal_length_give_the_bits_of_the_unpacked_masks(term, dtype):
    state = random_state(batch=3, dtype=dtype)
    plan, row = build(term, dtype=dtype), packed_state(state)
    want, got = plan(state), plan(row)
    assert torch.equal(want.total, got.total)
    for name, grad in gradients(want, plan, state).items():
        other = gradients(plan(row), plan, row)[name]
        same = torch.equal(other.view_as(grad), grad)
        close = name.startswith("head/") or term in ("sigreg", "fwm_orth")  # products of matrices of another shape
        assert same or (close and torch.allclose(other.view_as(grad), grad, rtol=1e-4, atol=1e-6)), name


@pytest.mark.parametrize(("term", "fields"), VARIANTS)
def test_ragged_samples_are_a_weighted_mean_of_single_ones(term, fields):
    state, singles = ragged()
    plan = build(term, fields)
    weights = torch.tensor([weight(term, s) for s in singles], dtype=torch.float64)
    assert term == "kinematic" or (weights.unique().numel() > 1 or term in ("velgate", "spectral"))
    outs = [plan(s) for s in singles]
    want = (torch.stack([o.total for o in outs]) * weights).sum() / weights.sum()
    got = plan(state)
    torch.testing.assert_close(got.total, want, rtol=1e-12, atol=1e-14)
    found = gradients(got, plan, state)
    for b, (single, out) in enumerate(zip(singles, outs)):
        for name, grad in gradients(out, plan, single).items():
            if name.startswith("head/"):
                continue
            share = grad * weights[b] / weights.sum()
            kind = name.split("/")[0]
            if kind == "h":
                mine = found[name][b : b + 1]
            else:
                mine = found[name].split(getattr(state, FEATURES[kind])[0][0].lengths, 1)[b]
            torch.testing.assert_close(mine, share, rtol=1e-9, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("term", ["sigreg", "fwm_orth"])
def test_global_terms_see_the_valid_rows_and_no_others(term):
    state, singles = ragged()
    rows = torch.cat([s.z[0][0] for s in singles], 1)
    mask = torch.arange(rows.shape[1])[None]  # any that has so many tokens
    one = dataclasses.replace(singles[0], z=[[rows]], masks_enc=[[mask]], grids=[(8, 2, 3)], h=None, clips=None)
    plan = build(term)
    assert rows.shape[1] <= 48 and torch.equal(plan(state).total, plan(one).total)


def test_pairs_weighted_over_the_batch():
    """hard_scope batch: softmax over all pairs of all samples."""
    state, singles = ragged()
    plan = build("ld", {"hard_weighting": 0.5})
    head = plan.heads["ld"]
    errors = []
    for s in singles:
        tokens, z, h = s.masks_enc[0][0][0].tolist(), s.z[0][0][0], s.h[0][0]
        errors += [(head(z[k]) - (h[t + 6] - h[t])).abs().mean() for k, t in enumerate(tokens) if t + 6 in tokens]
    e = torch.stack(errors)
    torch.testing.assert_close(plan(state).total, ((e / 0.5).softmax(0).detach() * e).sum(), rtol=1e-12, atol=0)


def test_no_pair_leads_into_the_next_sample():
    """The last time step of a sample is followed by the first one of the next in the row of all grids."""
    lists = [torch.tensor([2, 3]), torch.tensor([0, 1, 2])]  # grid (2,1,2): sample 1 has the pair 0-2
    z = torch.tensor([[[9.0], [7.0], [1.0], [0.0], [4.0]]], dtype=torch.float64, requires_grad=True)
    state = LatentState(grids=[(2, 1, 2)], z=[[z]], masks_enc=[[pack(lists, 4)]])
    value, _, out = value_of("fwm_static", {"app_ratio": 1.0}, state, embed_dim=1)
    assert value == 3.0
    (grad,) = torch.autograd.grad(out.total, z)
    assert grad.flatten().tolist() == [0, 0, -1, 0, 1]


def test_hard_region_by_hand():
    """Sample 0 has one predicted token of error 2, sample 1 two of errors 1 and 3: (1 x 2 + 2 x softmax mean) / 3."""
    h = torch.zeros(2, 4, 2, dtype=torch.float64)
    z_pred = torch.tensor([[[2.0, 2], [1, 1], [3, 3]]], dtype=torch.float64, requires_grad=True)
    masks = [[pack([torch.tensor([3]), torch.tensor([0, 2])], 4)]]
    state = LatentState(grids=[(1, 2, 2)], h=[h], z_pred=[[z_pred]], masks_pred=masks)
    value, _, out = value_of("hw", {}, state)
    w = torch.tensor([1.0, 3.0], dtype=torch.float64).softmax(0)
    assert value == pytest.approx((2 + 2 * float(w[0] + 3 * w[1])) / 3, rel=1e-14)
    (grad,) = torch.autograd.grad(out.total, z_pred)
    want = torch.tensor([1, 2 * w[0], 2 * w[1]], dtype=torch.float64) / 3 / 2
    torch.testing.assert_close(grad[0, :, 0], want)


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_distance_is_to_the_predicted_tokens_of_the_own_sample(backend):
    if ops.backend_report()["mask_distance"][backend]:
        pytest.skip(ops.backend_report()["mask_distance"][backend])
    enc = pack([torch.tensor([0]), torch.tensor([0, 1, 2])], 5)
    pred = pack([torch.tensor([1, 2, 4]), torch.tensor([4])], 5)
    with ops.use_backend(backend):
        got = LatentState(grids=[(1, 1, 5)], masks_enc=[[enc]], masks_pred=[[pred]]).distance(0, 0, False)
    torch.testing.assert_close(got, torch.tensor([[1.0, 4, 3, 2]]).sqrt())


@each_term
def test_several_groups_and_masks(term):
    """Means over groups and masks are those of each of them alone, but for sigreg, which has one mean over all."""
    state, _ = ragged(grids=((4, 2, 3), (2, 2, 2)), masks=2)
    plan = build(term)
    out = plan(state)
    assert out.total.isfinite() and all(g.isfinite().all() for g in gradients(out, plan, state).values())
    if term in ("sigreg", "kinematic", "spectral"):
        return  # spectral: the second grid has too few time steps
    parts = []
    for i in range(2):
        for j in range(2):
            fields = {n: [[getattr(state, n)[i][j]]] for n in (*FEATURES, "masks_enc", "masks_pred")}
            parts.append(
                plan(
                    dataclasses.replace(state, grids=[state.grids[i]], h=[state.h[i]], clips=[state.clips[i]], **fields)
                ).total
            )
    torch.testing.assert_close(out.total, torch.stack(parts).mean(), rtol=1e-12, atol=1e-14)


def stream_state(state, room=1.0, poison=False):
    """The packed state with the masks of each group in one stream, ``room`` times as long as they are."""
    fields = {}
    for name in ("masks_enc", "masks_pred"):
        fields[name] = [[stream_of(masks, room)] for masks in getattr(state, name)]
    for kind, name in FEATURES.items():
        rows = []
        for xs, (mask,) in zip(getattr(state, kind), fields[name]):
            rest = xs[0].new_full(
                (1, mask.shape[1] - sum(mask.lengths), xs[0].shape[2]), float("nan") if poison else 3.0
            )
            rows.append([torch.cat([*xs, rest], 1).detach().requires_grad_(xs[0].requires_grad)])
        fields[kind] = rows
    return dataclasses.replace(state, **fields)


def stream_of(masks, room):
    lengths = [m.lengths for m in masks]
    idx = [m.padded(m.token, 0) for m in masks]
    longest = max(x.shape[1] for x in idx)
    idx = torch.stack([torch.nn.functional.pad(x, (0, longest - x.shape[1])) for x in idx])
    capacity = math.ceil(room * sum(map(sum, lengths)))
    return Stream.cut(idx, torch.stack([m.sizes for m in masks]), lengths, masks[0].tokens, capacity, capacity)


@pytest.mark.parametrize("room", [1.0, 1.1, 2.0])
@pytest.mark.parametrize(
    ("term", "fields"), [*VARIANTS, ("sigreg", {}), ("fwm_orth", {}), ("ld", {"hard_weighting": 0.5})]
)
def test_all_masks_in_one_stream_give_what_each_of_them_gives(term, fields, room):
    """Values and gradients, with more and less filler, whose features are not numbers."""
    state, _ = ragged(grids=((4, 2, 3), (2, 2, 2)), masks=2)
    plan = build(term, fields)
    want = plan(state)
    grads = gradients(want, plan, state)
    one = stream_state(state, room, poison=True)
    got = plan(one)
    torch.testing.assert_close(got.total, want.total, rtol=1e-12, atol=1e-14)
    found = gradients(got, plan, one)
    for name, grad in found.items():
        kind, i, *_ = name.split("/")
        if kind in FEATURES:
            theirs = torch.cat([grads[f"{kind}/{i}/{j}"] for j in range(2)], 1)
            torch.testing.assert_close(grad[:, : theirs.shape[1]], theirs, rtol=1e-9, atol=1e-13)
            assert not grad[:, theirs.shape[1] :].any()
        else:
            torch.testing.assert_close(grad, grads[name], rtol=1e-9, atol=1e-13)
