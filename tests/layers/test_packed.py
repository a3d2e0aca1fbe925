"""Masks whose samples keep different numbers of tokens, and the gather of their tubelets."""

import pytest
import torch

from tests.ops.parity import BACKENDS, device_for, moved
from vjepa_fast import ops
from vjepa_fast.errors import ConfigError
from vjepa_fast.layers.packed import Packed, Stream, ids, pack, segments, weave
from vjepa_fast.ops import BlockMasks

LISTS = [[1, 4, 5], [0], [2, 7, 3, 6]]  # of N = 8


def packed(lists=LISTS, tokens=8):
    longest = max(map(len, lists))
    idx = torch.tensor([row + [0] * (longest - len(row)) for row in lists])
    return Packed.of(idx, torch.tensor([len(row) for row in lists]), [len(row) for row in lists], tokens)


def test_samples_follow_each_other():
    mask = packed()
    assert mask.idx.tolist() == [[1, 4, 5, 8, 18, 23, 19, 22]] and mask.shape == (1, 8)
    assert mask.token.tolist() == [[1, 4, 5, 0, 2, 7, 3, 6]]
    assert mask.lengths == (3, 1, 4) and mask.sizes.tolist() == [3, 1, 4]
    assert mask.valid.tolist() == [[True] * 3 + [False], [True] + [False] * 3, [True] * 4]
    assert ids(mask) is mask.idx and ids(torch.tensor([[3]], dtype=torch.int32)).dtype == torch.int64


def test_one_row_per_sample_and_back():
    mask = packed()
    x = torch.arange(8.0)[None]
    assert mask.padded(x).tolist() == [[0, 1, 2, 2], [3, 3, 3, 3], [4, 5, 6, 7]]
    assert mask.padded(x, -1.0).tolist() == [[0, 1, 2, -1], [3, -1, -1, -1], [4, 5, 6, 7]]
    assert torch.equal(mask.packed(mask.padded(x)), x)


def test_padding_gets_no_gradient_and_gives_none():
    mask = packed()
    x = torch.randn(1, 8, dtype=torch.float64, requires_grad=True)
    mask.padded(x, 0.0).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    rows = torch.full((3, 4), float("nan")).masked_fill(mask.valid, 1.0).requires_grad_()
    out = mask.packed(rows)
    assert out.isfinite().all()
    out.sum().backward()
    assert torch.equal(rows.grad, mask.valid.float())


def test_errors():
    idx, sizes = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([1, 2])
    for lengths in ([0, 2], [1, 4]):
        with pytest.raises(ValueError, match=r"Packed: lengths: expected numbers from 1 to 3, got"):
            Packed.of(idx, sizes, lengths, 8)
    with pytest.raises(ValueError, match="Packed: idx: expected a batch of 3"):
        Packed.of(idx, sizes, [1, 1, 1], 8)
    with pytest.raises(ValueError, match="Packed: sizes"):
        Packed.of(idx, sizes[:1], [1, 2], 8)


TWO = [LISTS, [[6], [2, 3], [1]]]  # two masks of the same three samples


def stream(capacity=16, spare=16):
    idx = torch.tensor([[row + [0] * (4 - len(row)) for row in lists] for lists in TWO])
    lengths = [[len(row) for row in lists] for lists in TWO]
    return Stream.cut(idx, torch.tensor(lengths), lengths, 8, capacity, spare)


def test_masks_follow_each_other_in_a_stream_and_filler_them():
    found = stream()
    assert found.idx.tolist() == [[1, 4, 5, 8, 18, 23, 19, 22, 6, 10, 11, 17, 0, 0, 0, 0]]
    assert found.masks == 2 and found.batch == 3 and found.longest == 8
    assert found.token.tolist()[0][:12] == [1, 4, 5, 0, 2, 7, 3, 6, 6, 2, 3, 1]
    assert found.sample.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 3, 4, 4, 5, 6, 6, 6, 6]
    assert found.cell.tolist()[0][7:] == [22, 30, 34, 35, 41, 48, 48, 48, 48]
    assert found.real.tolist() == [[True] * 12 + [False] * 4] and found.counts.tolist() == [8, 4]
    assert found.sums(torch.arange(16.0)[None].masked_fill(~found.real, float("nan"))).tolist() == [28, 38]
    assert torch.equal(stream(12).idx[0], found.idx[0, :12])
    x = torch.arange(16.0)[None]
    assert torch.equal(found.packed(found.padded(x), 7.0), x.masked_fill(~found.real, 7.0))


def test_the_stream_of_the_predictor_has_each_sample_in_one_piece():
    """Context and predicted rows of each sample, in turns; the filler of both at the end."""
    enc, pred = stream(14, 2), stream(17, 5)
    at = torch.cat(weave(enc, pred))
    assert sorted(at.tolist()) == list(range(14 + 17))
    owner = torch.empty_like(at).scatter_(0, at, torch.cat([enc.sample, pred.sample]))
    assert owner.tolist() == sorted(owner.tolist())
    found = segments([enc], [pred])
    assert found.sizes.tolist() == [6, 2, 8, 2, 4, 2, 7] and len(found) == 7
    assert segments([stream()]).sizes.tolist() == [3, 1, 4, 1, 2, 1, 4, 0]


def test_filler_has_short_segments_however_large_the_grid():
    """Attention costs the square of a segment."""
    idx, sizes = torch.tensor([[[1, 5], [0, 0]]]), torch.tensor([[2, 1]])  # one mask of two samples
    found = segments([Stream.cut(idx, sizes, [[2, 1]], 1000, 3 + 700, 700)])
    assert found.sizes.tolist() == [2, 1, 256, 256, 188]
    assert found.longest == 1000


def test_a_capacity_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="Stream: capacity: expected at least the 12 tokens of the masks, got 11"):
        stream(11)
    with pytest.raises(ValueError, match="Stream: spare: expected at least 4"):
        stream(16, 3)


def test_without_context_packing_names_the_mask():
    zeros = torch.zeros(2, 1, 4, dtype=torch.int64)
    masks = BlockMasks(zeros, zeros, torch.tensor([[2], [0]]), torch.tensor([[2], [4]]))
    with pytest.raises(ConfigError, match=r"masks.specs\[1\]: no context"):
        pack(masks)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_tubelets_of_all_samples(backend, dtype):
    g = torch.Generator().manual_seed(0)
    clip = torch.randint(0, 256, (3, 3, 4, 8, 8), generator=g, dtype=torch.uint8)  # 2 x 2 x 2 tokens
    device = device_for(backend)
    clip = moved(clip.transpose(3, 4).to(dtype), device)
    rows = [torch.tensor([row], device=device) for row in LISTS]
    with ops.use_backend(backend):
        got = ops.tubelet_patchify(clip, packed().idx.to(device), 2, 4)
        want = [ops.tubelet_patchify(clip[b : b + 1], row, 2, 4) for b, row in enumerate(rows)]
        assert torch.equal(got, torch.cat(want, 1))
        if device == "cpu":  # elsewhere looking would wait for the device
            with pytest.raises(ValueError, match="token indices in \\[0, 24\\)"):
                ops.tubelet_patchify(clip, torch.tensor([[24]]), 2, 4)


def test_gradient_goes_back_to_the_sample():
    clip = torch.randn(3, 3, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    ops.tubelet_patchify(clip, packed().idx, 2, 4).sum().backward()
    per_sample = clip.grad.flatten(1).sum(1) / (3 * 2 * 4 * 4)
    assert per_sample.tolist() == [3, 1, 4]
    torch.library.opcheck(
        torch.ops.vjepa_fast.tubelet_patchify.default,
        (clip.float(), packed().idx, 2, 4, [0.0] * 3, [1.0] * 3, torch.float32),
    )
