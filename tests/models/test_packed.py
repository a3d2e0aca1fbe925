"""Encoder and predictor over samples that keep different numbers of tokens: one stream, nothing computed on padding."""

import math

import pytest
import torch

from vjepa_fast.layers.block import run_block
from vjepa_fast.layers.packed import Packed, Stream
from vjepa_fast.models import build_encoder, build_predictor

N, SEEN, HIDDEN = 32, ((13, 2, 7), (5, 9, 1)), ((7, 20, 3), (20, 1, 30))


def draw(lengths, generator):
    rows = [torch.randperm(N, generator=generator)[:k].sort().values for k in lengths]
    idx = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return rows, Packed.of(idx, torch.tensor(lengths), lengths, N)


def setup(dtype=torch.float64, use_rope=True):
    torch.manual_seed(0)
    enc = build_encoder(embed_dim=24, depth=4, num_heads=2, img_size=32, patch_size=8, num_frames=4, use_rope=use_rope)
    pred = build_predictor(enc, embed_dim=12, depth=2, num_heads=2, zero_init_mask_tokens=False)
    g = torch.Generator().manual_seed(1)
    clip = torch.randint(0, 256, (3, 3, 4, 32, 32), dtype=torch.uint8, generator=g)
    seen, hidden = ([draw(k, g) for k in lengths] for lengths in (SEEN, HIDDEN))
    return enc.to(dtype), pred.to(dtype), clip, seen, hidden


def packed(enc, pred, clip, seen, hidden):
    seen, hidden = [m for _, m in seen], [m for _, m in hidden]
    z = enc(clip, masks=seen)
    return [z, *pred(z, seen, hidden, [0, 1])]


def apart(enc, pred, clip, seen, hidden):
    outs = [[[], []], [[], []], [[], []]]
    for j, ((rows_enc, _), (rows_pred, _)) in enumerate(zip(seen, hidden)):
        for b, (e, p) in enumerate(zip(rows_enc, rows_pred)):
            z = enc(clip[b : b + 1], masks=e[None])
            for out, x in zip(outs, (z, *pred(z, e[None], p[None], j))):
                out[j].append(x)
    return [[torch.cat(samples, 1) for samples in out] for out in outs]


def weights_of(enc, pred):
    return [p for p in (*enc.parameters(), *pred.parameters()) if p.requires_grad]


def run(make, parts):
    """Outputs, and gradients of a sum in which every output has a weight of its own."""
    out = [x for side in make(*parts) for x in side]
    total = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in out)
    return out, torch.autograd.grad(total, weights_of(*parts[:2]), allow_unused=True)


def compare(ours, theirs, tolerance):
    for a, b in zip(ours[0], theirs[0]):
        assert a.is_contiguous()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for a, b in zip(ours[1], theirs[1]):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)


def stream(masks, room):
    """All masks in one ``Stream``, ``room`` times as long as they are."""
    longest = max(rows.shape[0] for mask_rows, _ in masks for rows in mask_rows)
    idx = [[torch.nn.functional.pad(rows, (0, longest - len(rows))) for rows in mask_rows] for mask_rows, _ in masks]
    total = sum(sum(m.lengths) for _, m in masks)
    capacity = math.ceil(room * total)
    sizes = torch.stack([m.sizes for _, m in masks])
    idx = torch.stack([torch.stack(rows) for rows in idx])
    return Stream.cut(idx, sizes, [m.lengths for _, m in masks], N, capacity, capacity)


def streamed(enc, pred, clip, seen, hidden, room=1.3):
    """As ``packed``, through one stream; its features are cut into those of the masks."""
    all_seen, all_hidden = stream(seen, room), stream(hidden, room)
    z = enc(clip, masks=[all_seen])
    z_pred, z_context = pred(z, [all_seen], [all_hidden], [0, 1])
    assert z[0].shape[1] == all_seen.shape[1] and z_pred[0].shape[1] == all_hidden.shape[1]
    outs = []
    for (x,), masks in ((z, seen), (z_pred, hidden), (z_context, seen)):
        lengths = [sum(m.lengths) for _, m in masks]
        outs.append([part.contiguous() for part in x[:, : sum(lengths)].split(lengths, 1)])
    return outs


@pytest.mark.parametrize("make", [packed, streamed])
@pytest.mark.parametrize("use_rope", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)]
)  # float32: fused block
def test_one_stream_equals_one_pass_per_sample_and_mask(dtype, tolerance, use_rope, make):
    parts = setup(dtype, use_rope)
    theirs = run(apart, parts)
    compare(run(make, parts), theirs, tolerance)


def streams(monkeypatch, make, parts):
    """(shape of the tokens, lengths of the segments) that blocks were given."""
    seen = []

    def spy(block, x, table, recompute, lengths=None):
        seen.append((tuple(x.shape), tuple(lengths)))
        return run_block(block, x, table, recompute, lengths)

    monkeypatch.setattr("vjepa_fast.layers.block.run_block", spy)
    make(*parts)
    return list(dict.fromkeys(seen))


def test_no_token_is_there_for_padding(monkeypatch):
    parts = setup()
    seen = [k for lengths in SEEN for k in lengths]
    both = [e + p for lengths in zip(SEEN, HIDDEN) for e, p in zip(*lengths)]
    assert streams(monkeypatch, packed, parts) == [((1, sum(seen), 24), tuple(seen)), ((1, sum(both), 12), tuple(both))]


def dense(enc, pred, clip, seen, hidden):
    """As ``packed``, of masks of one length: ids [B,K]."""
    z = enc(clip, masks=seen)
    return [z, *pred(z, seen, hidden, [0, 1])]


def dense_apart(enc, pred, clip, seen, hidden):
    z = [enc(clip, masks=m) for m in seen]
    out = [pred(x, e, p, j) for j, (x, e, p) in enumerate(zip(z, seen, hidden))]
    return [z, [p for p, _ in out], [c for _, c in out]]


@pytest.mark.parametrize("use_rope", [True, False])
def test_masks_of_one_length_in_one_stream_equal_one_pass_each(use_rope):
    enc, pred, clip, _, _ = setup(use_rope=use_rope)
    seen, hidden = (
        [torch.stack([torch.randperm(N)[:k].sort().values for _ in clip]) for k in ks] for ks in ((13, 5), (7, 20))
    )
    parts = enc, pred, clip, seen, hidden
    compare(run(dense, parts), run(dense_apart, parts), 1e-10)


def test_one_sample_gives_the_bits_of_the_unpacked_masks():
    enc, pred, clip, _, _ = setup(torch.float32)
    g = torch.Generator().manual_seed(2)
    (rows_0, mask_0), (rows_1, mask_1) = draw((13,), g), draw((19,), g)
    z = enc(clip[:1], masks=[mask_0, mask_1])
    want = enc(clip[:1], masks=[rows_0[0][None], rows_1[0][None]])
    assert all(torch.equal(a, b) for a, b in zip(z, want))
    ours, theirs = pred(z[:1], [mask_0], [mask_1], [0]), pred(want[:1], [rows_0[0][None]], [rows_1[0][None]], [0])
    assert all(torch.equal(a[0], b[0]) for a, b in zip(ours, theirs))


def test_activation_checkpointing():
    parts = setup()
    before = run(packed, parts)
    parts[0].use_activation_checkpointing = parts[1].use_activation_checkpointing = True
    compare(run(packed, parts), before, 0.0)
