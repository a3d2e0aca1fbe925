"""The attention backend ``triton``: what it passes on to ops.packed_attention, and what it refuses."""

import importlib.util

import pytest
import torch

from vjepa_fast import ops
from vjepa_fast.layers.attention import BACKENDS, Call, DeviceSegments, Segments, attend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = BACKENDS["triton"]
HEADS = 2


def inputs(batch, tokens, head_dim=16):
    g = torch.Generator().manual_seed(0)
    qkv, angles = torch.randn(batch, tokens, 3 * HEADS * head_dim, generator=g), torch.randn(tokens, 12, generator=g)
    return qkv.to(DEVICE), torch.stack((angles.cos(), angles.sin()), 1).to(DEVICE)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("batch", "segments"),
    [(2, Segments([20])), (2, Segments([12, 8])), (1, DeviceSegments(torch.tensor([12, 0, 8], device=DEVICE), 12))],
)
def test_segments_positions_and_both_ways_to_call_it(batch, segments):
    """With positions from packed qkv; and from queries, keys and values on their own."""
    qkv, table = inputs(batch, 20)
    lengths = [20] if len(segments) == 1 else [12, 8]
    want = [attend(qkv.clone(), rope, HEADS, lengths) for rope in (table, None)]
    with ops.use_backend("triton"):
        torch.testing.assert_close(TRITON.packed(qkv, table, HEADS, segments), want[0])
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).unbind(2)
        torch.testing.assert_close(TRITON(q, k, v, segments).flatten(2), want[1])


def test_whole_grids_are_part_of_a_compiled_graph():
    qkv, table = inputs(2, 10)
    fn = lambda x: TRITON.packed(x, table, HEADS, Segments([10]))  # noqa: E731
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv), fn(qkv))


def test_what_it_refuses():
    def refused(dtype, head_dim):
        return " ".join(TRITON.objections(Call(torch.device("cuda"), dtype, head_dim)))

    assert "at most 64 channels a head in torch.float32, not 80" in refused(torch.float32, 80)
    assert "at most 128 channels a head in torch.bfloat16, not 136" in refused(torch.bfloat16, 136)
    assert "channels a head" not in refused(torch.bfloat16, 128)
    with ops.use_backend("eager"):
        assert "VJEPA_FAST_BACKEND=eager" in refused(torch.bfloat16, 64)
