"""Which implementation of attention runs: by operators on a CPU, by kernels of a profile on a GPU."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from vjepa_fast.layers.attention import (
    BACKENDS,
    IMPLEMENTATIONS,
    Call,
    DeviceSegments,
    Segments,
    attend,
    implementation,
)
from vjepa_fast.layers.attention import implementations as found_in
from vjepa_fast.layers.attention.sdpa import SDPA_CUDNN, SDPA_FLASH, STEADY, Sdpa

HALF = (torch.bfloat16, torch.float16)

# As a profile of torch 2.11 on an H100 has them; those of fa3, fa4, efficient, math and triton are not from there.
KERNELS = {
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_cga1x1x1_kernel0_0": "cudnn",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64_1x4x1_cga1x1x1_kernel0_0": "cudnn",
    "void cudnn::fusion::convert_dq_to_16bits<true>(void const*, void*, unsigned int, unsigned int, unsigned": "cudnn",
    "void cudnn::fusion::compute_dot_do_o_specialized<true, 64>(void const*, void const*, void*, void*, unsi": "cudnn",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<32, 128, 128, 4, false, false, cutlass::bf": "flash",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64, 128, 128, ": "flash",
    "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90": "fa3",
    "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at__tensor0000o1110_0": "fa4",
    "kernel_cutlass_kernel_flash_attncuteflash_bwd_sm100FlashAttentionBackwardSm100_object_at__tensor0000o_0": "fa4",
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfl": "efficient",
    "void (anonymous namespace)::softmax_warp_forward<float, float, float, 8, false, false>(float*, float con": "math",
    "vjepa_fast::packed_attention": "triton",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float, false>(int, float, f": None,
    "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNN": None,
    "triton_poi_fused_gelu_0": None,
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_by_their_names(name):
    assert implementation(name) == KERNELS[name]


def test_a_softmax_of_a_loss_is_no_attention():
    softmax = "void (anonymous namespace)::softmax_warp_forward<float, float, float, 8, false, false>("
    flash = "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<32"
    assert found_in([softmax, "add"]) == {"math"} and found_in([softmax, flash]) == {"flash"} and not found_in(["add"])
    assert set(IMPLEMENTATIONS) == set(KERNELS.values()) - {None}


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_says_what_it_runs(name):
    backend = BACKENDS[name]
    assert backend.implementation in (*IMPLEMENTATIONS, "any")
    assert backend.deterministic in ("always", "asked", "never")
    assert isinstance(backend.version(), str)


class Recorded(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names, self.args = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        self.args[func.name()] = args
        return func(*args, **(kwargs or {}))

    @property
    def attention(self):
        return [n.removeprefix("aten::") for n in self.names if "attention" in n or "softmax" in n]


class Math(Sdpa):
    name = "math"
    kernels = (SDPBackend.MATH,)


def switches():
    names = ("flash", "mem_efficient", "math", "cudnn")
    return [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in names]


@pytest.mark.parametrize(
    ("backend", "operator"),
    [
        (STEADY, "_scaled_dot_product_flash_attention_for_cpu"),
        (SDPA_FLASH, "_scaled_dot_product_flash_attention_for_cpu"),
        (Math(), "_safe_softmax"),
    ],
    ids=lambda x: x.name if isinstance(x, Sdpa) else "",
)
def test_sdpa_runs_what_it_is_pinned_to(backend, operator):
    before = switches()
    q = torch.randn(2, 16, 2, 8)
    with Recorded() as ran:
        backend(q, q, q, Segments((10, 6)))
    assert ran.attention == [operator] * 2 and switches() == before


def test_sdpa_that_is_pinned_runs_nothing_else():
    """There is no cuDNN on a CPU, and no way around that."""
    q = torch.randn(2, 16, 2, 8)
    with pytest.raises(RuntimeError, match=r"No (viable backend|available kernel)"):
        SDPA_CUDNN(q, q, q, Segments((10, 6)))


def test_pinned_sdpa_is_pinned_in_a_compiled_graph():
    """It is chosen while the graph is made: the operator is in the graph, and switches are not looked at later."""
    q, targets = torch.randn(2, 16, 2, 8), []

    def look(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def run(q):
        return SDPA_FLASH(q, q, q, Segments((10, 6)))

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=aot_autograd(fw_compiler=look), fullgraph=True, dynamic=True)
    with torch.nn.attention.sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(compiled(q), run(q))
    assert sum("_scaled_dot_product_flash_attention" in t for t in targets) == 2


@pytest.mark.parametrize("segments", [Segments((100, 156)), None], ids=["lengths", "device"])
def test_varlen_is_flash_whatever_torch_would_take(segments, monkeypatch):
    """torch's own ``varlen_attn`` takes cuDNN on Hopper; here the operator itself is called, and is differentiable."""
    monkeypatch.setattr(Segments, "offsets", lambda *_: torch.zeros(3, dtype=torch.int32, device="cuda"))
    with FakeTensorMode(), Recorded() as ran:
        if segments is None:
            segments = DeviceSegments(torch.zeros(2, dtype=torch.int64, device="cuda"), 256)
        q = torch.zeros(1, 256, 12, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        out = BACKENDS["varlen"](q, q, q, segments)
        assert out.shape == q.shape and out.dtype == q.dtype and out.requires_grad
    assert ran.attention == ["_flash_attention_forward"] and "FlashAttention" in str(out.grad_fn.next_functions)
    longest, *rest = ran.args["aten::_flash_attention_forward"][6:]
    assert longest == segments.longest and rest == [0.0, False, False]  # no dropout, not causal, no debug mask


@pytest.mark.parametrize("grad", [False, True])
def test_varlen_cudnn_calls_the_operator_of_cudnn(grad, monkeypatch):
    """Which has no kernel without a GPU: a stand-in sees the arguments, by the names that this torch has for them."""
    names = [a.name for a in torch.ops.aten._cudnn_attention_forward.default._schema.arguments]
    got = {}

    def operator(*args):
        got.update(zip(names, args))
        return (args[2], None)

    monkeypatch.setattr(torch.ops.aten, "_cudnn_attention_forward", operator)
    q = torch.randn(2, 300, 2, 8)
    with torch.set_grad_enabled(grad):
        assert torch.equal(BACKENDS["varlen_cudnn"](q, q, 2 * q, Segments((200, 100))), 2 * q)
    assert got["query"].shape == (600, 2, 8) and got["attn_bias"] is None and got["compute_log_sumexp"] is grad
    assert got["cum_seq_q"].tolist() == got["cum_seq_k"].tolist() == [0, 200, 300, 500, 600]
    assert got["max_q"] == got["max_k"] == 200 and not {"dropout_p", "is_causal"} & got.keys()


def test_varlen_of_whole_grids_is_part_of_a_compiled_graph(monkeypatch):
    """The kernel's place is taken by plain attention; offsets are computed in the graph."""

    def call(self, q, k, v, offsets, longest):
        assert offsets.shape == (3,)
        return SDPA_FLASH(*(x.unflatten(0, (-1, longest)) for x in (q, k, v)), Segments((longest,))).flatten(0, 1)

    monkeypatch.setattr(type(BACKENDS["varlen"]), "_call", call)
    torch._dynamo.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (16, 24):
        x = torch.randn(2, tokens, 48)
        torch.testing.assert_close(compiled(x, None, 2, None, BACKENDS["varlen"]), attend(x, None, 2))


def test_one_segment_needs_no_table_of_the_host(monkeypatch):
    """So that it can be part of a captured graph."""
    monkeypatch.setattr("vjepa_fast.layers.attention.base._offsets", None)
    found = Segments((7,)).offsets(3, torch.device("cpu"))
    assert found.tolist() == [0, 7, 14, 21] and found.dtype == torch.int32


def test_what_pinned_backends_refuse():
    cuda = torch.device("cuda")

    def reasons(name, dtype=torch.bfloat16, head_dim=64, **more):
        return BACKENDS[name].refusals(Call(cuda, dtype, head_dim, **more))

    assert not reasons("sdpa_flash", head_dim=36) and not reasons("varlen", head_dim=256)
    for name in ("sdpa_flash", "sdpa_cudnn", "varlen", "varlen_cudnn", "fa4"):
        assert any("bfloat16 and float16, got float32" in r for r in reasons(name, torch.float32))
        assert any("side by side" in r for r in reasons(name, stride=2))
    for name, d in {"sdpa_flash": 264, "sdpa_cudnn": 36, "varlen": 36, "varlen_cudnn": 136, "fa4": 136}.items():
        assert any(f"got {d}" in r for r in reasons(name, head_dim=d))
    assert any("over 128 tokens, got at most 100" in r for r in reasons("varlen_cudnn", longest=100))
    for name in ("sdpa_flash", "sdpa_cudnn", "xformers"):
        assert any("capacity_quantum=0" in r for r in reasons(name, on_device=True))


def test_old_devices_and_deterministic_runs_are_refused_by_name(monkeypatch):
    call = Call(torch.device("cuda"), torch.bfloat16, 64, grad=True)
    monkeypatch.setattr("vjepa_fast.layers.attention.base.capability", lambda device: (7, 5))
    assert any("8.0 or higher, the device has 7.5" in r for r in SDPA_FLASH.refusals(call))
    monkeypatch.undo()
    torch.use_deterministic_algorithms(True)
    try:
        assert [r for r in SDPA_CUDNN.refusals(call) if "use_deterministic_algorithms" in r]
        assert not SDPA_FLASH.refusals(call)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_token_alone_is_its_own_value_for_cudnn():
    """Which takes no segment of one token."""
    q = torch.randn(2, 1, 2, 8)
    assert torch.equal(SDPA_CUDNN(q, q, 2 * q, Segments((1,))), 2 * q)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels of a GPU")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_kernels_that_ran_are_those_of_the_implementation(name, grad):
    backend, device = BACKENDS[name], torch.device("cuda")
    call = Call(device, torch.bfloat16, 64, segments=2, grad=grad)
    if reasons := backend.refusals(call):
        pytest.skip("; ".join(reasons))
    qkv = torch.randn(2, 600, 3, 4, 64, device=device, dtype=torch.bfloat16, requires_grad=grad)

    def once():
        out = backend(*qkv.unbind(2), Segments((350, 250)))
        if grad:
            out.backward(torch.ones_like(out))

    once()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        once()
        torch.cuda.synchronize()
    names = [e.name for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    expected = set(IMPLEMENTATIONS) if backend.implementation == "any" else {backend.implementation}
    assert found_in(names) and found_in(names) <= expected, names
