"""Attention within segments: every registered backend, and the choice of one."""

import copy
import pickle

import pytest
import torch

from vjepa_fast import ops
from vjepa_fast.errors import ConfigError
from vjepa_fast.layers import attention, block
from vjepa_fast.layers.attention import BACKENDS, Call, DeviceSegments, FrameCausal, Segments, attend
from vjepa_fast.layers.attention.choice import call_of
from vjepa_fast.layers.attention.sdpa import SDPA

from .named import Named

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = 2


def packed_qkv(tokens, dtype=torch.float64, device="cpu", head_dim=8, batch=3):
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, tokens, 3 * HEADS * head_dim, generator=g, dtype=torch.float64)
    return qkv.to(device, dtype).requires_grad_()


def plain(qkv, lengths):
    """Softmax in float64, segment by segment."""
    outs = []
    for part in qkv.double().split(list(lengths), 1):
        q, k, v = part.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        outs.append((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    return torch.cat(outs, 1)


def compare(qkv, lengths, backend, tolerance):
    out, want = attend(qkv, None, HEADS, lengths, backend), plain(qkv, lengths)
    assert out.dtype == qkv.dtype and out.shape == want.shape
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    found, exact = (torch.autograd.grad(o, qkv, c)[0] for o, c in ((out, g), (want, g.double())))
    for a, b in ((out, want), (found, exact)):
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("lengths", [[7], [5, 2], [1, 3, 3]])
def test_segments_do_not_see_each_other(lengths):
    compare(packed_qkv(7), lengths, None, 1e-12)


# What every registered backend must do, those of plugins too.
@pytest.mark.parametrize("wrap", [list, Segments])
@pytest.mark.parametrize("lengths", [[150], [101, 1, 48], [50, 50, 50]])
@pytest.mark.parametrize("head_dim", [24, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend(name, dtype, head_dim, lengths, wrap):
    backend = attention.find(name)
    assert backend.name == name
    qkv = packed_qkv(150, dtype, DEVICE, head_dim)
    reasons = backend.objections(Call(qkv.device, dtype, head_dim, len(lengths), longest=max(lengths)))
    if not reasons:
        compare(qkv, wrap(lengths), backend, 1e-4 if dtype == torch.float32 else 3e-2)
        return
    with pytest.raises(ConfigError) as error:
        attend(qkv, None, HEADS, wrap(lengths), backend)
    assert f"runtime.attention: {name}" in str(error.value) and all(reason in str(error.value) for reason in reasons)


@pytest.mark.parametrize("sizes", [[101, 0, 49], [0, 150, 0, 0], [50, 50, 50]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_with_lengths_on_the_device(name, dtype, sizes):
    """Or it says that it cannot. Some segments are empty, as those of filler may be."""
    backend = attention.find(name)
    qkv = packed_qkv(150, dtype, DEVICE, 24, batch=1)
    segments = DeviceSegments(torch.tensor(sizes, device=DEVICE), 160)
    reasons = backend.refusals(Call(qkv.device, dtype, 24, len(sizes), on_device=True))
    assert backend.on_device or any("runtime.capacity_quantum=0" in r for r in reasons)
    if reasons:
        with pytest.raises(ConfigError, match=f"runtime.attention: {name} "):
            attend(qkv, None, HEADS, segments, backend)
        return
    out, want = attend(qkv, None, HEADS, segments, backend), plain(qkv, sizes)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    found, exact = (torch.autograd.grad(o, qkv, c)[0] for o, c in ((out, g), (want, g.double())))
    for a, b in ((out, want), (found, exact)):
        assert (a.double() - b).abs().max() <= (3e-2 if dtype == torch.bfloat16 else 1e-4) * b.abs().max()


def test_lengths_on_the_device_are_of_one_stream_and_not_read():
    segments = DeviceSegments(torch.tensor([2, 0, 3]), 4)
    assert segments.offsets(1, torch.device("cpu")).tolist() == [0, 2, 2, 5] and len(segments) == 3
    with pytest.raises(ValueError, match="expected one stream, got a batch of 2"):
        segments.offsets(2, torch.device("cpu"))
    with pytest.raises(TypeError, match="on the device"):
        list(segments)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_copied_model_has_the_same_backend(name):
    backend = attention.find(name)
    assert copy.deepcopy(backend) is backend and pickle.loads(pickle.dumps(backend)) is backend


def test_objections_name_the_call():
    on_cpu = Call(torch.device("cpu"), torch.float32, 64)
    reasons = BACKENDS["varlen"].objections(on_cpu)
    assert any("CUDA" in r and "cpu" in r for r in reasons) and any("got float32" in r for r in reasons)
    assert any("CUDA" in r for r in BACKENDS["xformers"].objections(on_cpu)) and not SDPA.objections(on_cpu)
    with pytest.raises(ConfigError, match="runtime.attention: unknown .*'spda'; accepted: auto, .*did you mean sdpa"):
        attention.find("spda")


def test_models_of_one_process_have_their_own_backends():
    """Also compiled, and in turns; and a forced one is not passed over by the block written for CPUs."""
    models = [block.Block(48, 2, 4.0, False, True) for _ in range(3)]
    for m, factor in zip(models, (2.0, -3.0)):
        m.load_state_dict(models[2].state_dict())
        m.attn.backend = Named("scaled", factor=factor)
    x = torch.randn(2, 10, 48)
    want = [m(x, None, [4, 6]) for m in models]
    assert [m.attn.backend.calls for m in models[:2]] == [1, 1]
    assert all((want[i] - want[j]).abs().max() > 0.1 for i, j in ((0, 1), (1, 2), (0, 2)))
    torch._dynamo.reset()
    compiled = [torch.compile(m, backend="aot_eager") for m in models]
    for i in (0, 1, 2, 0, 1):
        torch.testing.assert_close(compiled[i](x, None, [4, 6]), want[i])


def test_use_attention_refuses_before_anything_runs():
    cpu, m = torch.device("cpu"), block.Block(48, 2, 4.0, False, True)
    with pytest.raises(ConfigError, match="runtime.attention: varlen .*CUDA.*float32"):
        block.use_attention("varlen", cpu, torch.float32, m)
    assert m.attn.backend is None
    block.use_attention("sdpa", cpu, torch.float32, m)
    assert copy.deepcopy(m).attn.backend is SDPA
    block.use_attention("auto", cpu, torch.float32, m)
    assert m.attn.backend is None


@pytest.mark.parametrize(("backend", "lengths"), [(None, [6, 4]), (SDPA, [6, 4]), (SDPA, None)])
def test_one_graph_for_lengths_of_masks(backend, lengths):
    torch._dynamo.reset()
    m = block.Attention(48, 2)
    m.backend = backend
    x = torch.randn(2, 10, 48)
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x, None, lengths), m(x, None, lengths))


def test_a_backend_that_makes_tables_leaves_the_graph():
    compiling = []

    class Tables(Named):
        graph = False

        def __call__(self, q, k, v, segments):
            compiling.append(torch.compiler.is_compiling())
            assert segments.offsets(q.shape[0], q.device).tolist() == [0, 6, 10, 16, 20]
            return super().__call__(q, k, v, segments)

    torch._dynamo.reset()
    m = block.Attention(48, 2)
    m.backend, x = Tables("tables"), torch.randn(2, 10, 48)
    torch.testing.assert_close(torch.compile(m, backend="aot_eager")(x, None, [6, 4]), m(x, None, [6, 4]))
    assert compiling == [False, False]


def test_segments_of_one_length_are_one_batch(monkeypatch):
    """As the predictor's are where nothing is truncated: context and hidden tokens fill every sample's grid."""
    functional = torch.nn.functional
    calls, sdpa = [], functional.scaled_dot_product_attention
    monkeypatch.setattr(functional, "scaled_dot_product_attention", lambda *a: calls.append(a) or sdpa(*a))
    compare(packed_qkv(12, batch=2), [4, 4, 4], None, 1e-12)
    assert len(calls) == 1 and calls[0][0].shape == (6, HEADS, 4, 8)


class Rotates(Named):
    """Takes packed qkv and the table as they are."""

    takes_rope = on_device = True

    def packed(self, qkv, rope, num_heads, segments):
        self.calls += 1
        self.saw = qkv.detach().clone()
        turned = qkv if rope is None else ops.rope3d(qkv, rope, num_heads)
        q, k, v = turned.unflatten(-1, (3, num_heads, -1)).unbind(2)
        return SDPA(q, k, v, segments).flatten(2)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("lengths", [None, [4, 6], Segments([4, 6]), DeviceSegments(torch.tensor([4, 6]), 8)])
def test_a_backend_may_apply_rotary_positions_itself(lengths, grad):
    """It gets the packed, unrotated qkv and the table; every other backend gets q and k rotated."""
    qkv = packed_qkv(10, torch.float32, batch=1).detach().requires_grad_(grad)
    turns = torch.rand(10, 1, 3, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, -1)
    rope, before = torch.cat([turns.cos(), turns.sin()], 1), qkv.detach().clone()
    backend = Rotates("rotates")
    for table in (rope, None):
        want = attend(qkv.clone(), table, HEADS, lengths, SDPA)
        got = attend(qkv, table, HEADS, lengths, backend)
        torch.testing.assert_close(got, want)
        assert torch.equal(backend.saw, before) and torch.equal(qkv, before)
    if grad:
        a, b = (torch.autograd.grad(attend(qkv, rope, HEADS, lengths, x).sum(), qkv)[0] for x in (backend, SDPA))
        torch.testing.assert_close(a, b)


def test_a_rotor_is_applied_before_any_backend():
    """The complex form is for eager code on a CPU."""
    qkv, angle = packed_qkv(10, torch.float32, batch=1).detach(), torch.rand(10, 4)
    rotor = torch.polar(torch.ones_like(angle), angle)
    found = [attend(qkv, rotor, HEADS, None, backend) for backend in (Rotates("rotates"), SDPA)]
    torch.testing.assert_close(*found)


def test_a_backend_that_rotates_is_part_of_a_compiled_graph():
    torch._dynamo.reset()
    m = block.Attention(48, 2)
    m.backend, x = Rotates("rotates"), torch.randn(2, 10, 48)
    rope = torch.cat([torch.ones(10, 1, 24), torch.zeros(10, 1, 24)], 1)
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, rope, [6, 4]), m(x, rope, [6, 4]))


def test_what_cannot_be_compiled_is_not_captured_unless_it_says_so():
    class Alone(Named):
        graph = False

    class Both(Named):
        graph, capture = False, True

    assert (Alone.capture, Both.capture, Named.capture) == (False, True, True)
    assert (Alone.whole_graph, Both.whole_graph, Named.whole_graph) == (False, False, True)


def test_what_is_declared_but_not_there_is_said():
    class Empty(Named):
        takes_rope = True

    with pytest.raises(NotImplementedError, match="'empty' declares takes_rope and has no packed"):
        attend(packed_qkv(4, torch.float32), None, HEADS, None, Empty("empty"))


def test_a_backend_without_a_backward_pass_is_refused_where_one_follows():
    backend = Named("forward_only")
    backend.backward = False
    with torch.no_grad():
        attend(packed_qkv(4, torch.float32), None, HEADS, None, backend)
    with pytest.raises(ConfigError, match="runtime.attention: forward_only is not supported here: it has no backward"):
        attend(packed_qkv(4, torch.float32), None, HEADS, None, backend)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_by_frames(name, per_sample):
    """Or it says that it cannot: tokens attend within their frame and to earlier ones, in whatever order they lie."""
    backend, qkv = attention.find(name), packed_qkv(30, torch.float32, DEVICE, 24)
    frames = torch.randint(0, 4, (3, 30) if per_sample else (30,), generator=torch.Generator().manual_seed(2))
    reasons = backend.refusals(call_of(qkv, HEADS, FrameCausal(frames.to(DEVICE))))
    assert backend.causal or any("block_causal" in r for r in reasons)
    if reasons:
        with pytest.raises(ConfigError, match=f"runtime.attention: {name} "):
            attend(qkv, None, HEADS, FrameCausal(frames.to(DEVICE)), backend)
        return
    out = attend(qkv, None, HEADS, FrameCausal(frames.to(DEVICE)), backend)
    q, k, v = qkv.double().unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / q.shape[-1] ** 0.5
    for b in range(3):
        own = frames[b] if per_sample else frames
        hidden = torch.tensor([[int(own[key]) > int(own[query]) for key in range(30)] for query in range(30)])
        scores[b].masked_fill_(hidden.to(DEVICE), -torch.inf)
    want = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    found, exact = (torch.autograd.grad(o, qkv, c)[0] for o, c in ((out, g), (want, g.double())))
    for a, b in ((out, want), (found, exact)):
        assert (a.double() - b).abs().max() <= 1e-4 * b.abs().max()
