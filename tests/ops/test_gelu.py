"""Products with GELU or its slope at their end: every way against eager code in float64, and the choice among them."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from tests.ops.parity import DEVICE, KERNELS, assert_parity, device_for
from vjepa_fast import ops
from vjepa_fast.ops import _fastest, gelu
from vjepa_fast.ops.gelu import _gelu_linear, _gelu_linear_backward, gelu_linear, gelu_linear_backward

HALF = [torch.bfloat16, torch.float16]
TRITON = KERNELS[1:]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=["pointers", "descriptors"])
def loads(request, monkeypatch):
    if DEVICE == "cuda":
        pytest.skip("there the architecture decides")
    monkeypatch.setattr(gelu, "_tma", lambda *_: request.param == "descriptors")


@pytest.fixture(params=[0, 1])
def cut(request, monkeypatch):
    """Which of the ways to cut is taken."""

    def choose(op, x, columns, candidates):
        name = f"triton {request.param}"
        return name if name in candidates else next(iter(candidates))

    monkeypatch.setattr(_fastest, "choose", choose)


def case(rows, width, hidden):
    x, w = random(rows, width), random(hidden, width, seed=1) / math.sqrt(width)
    return x, 2 * w, random(hidden, seed=2)


@pytest.mark.parametrize("backend", TRITON)
def test_values(backend, loads, cut):
    """Several tiles each way, none of them full."""
    x, w, b = case(140, 72, 136)
    dtype = torch.bfloat16
    assert_parity(lambda *a: gelu_linear(*a, True, "triton"), [x, w, b], backend=backend, dtype=dtype)
    args = [x, w.t().contiguous(), 2 * random(140, 136, seed=3)]
    assert_parity(lambda *a: gelu_linear_backward(*a, "triton"), args, backend=backend, dtype=dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("backend", TRITON)
def test_a_pass_after_a_product_of_pytorch(backend, dtype):
    x, w, b = case(150, 24, 136)
    assert_parity(lambda *a: gelu_linear(*a, True, "torch"), [x, w, b], backend=backend, dtype=dtype)
    assert_parity(lambda *a: gelu_linear(*a, False, "triton")[1], [x, w, b], backend=backend, dtype=dtype)
    args = [x, w.t().contiguous(), 2 * random(150, 136, seed=3)]
    assert_parity(lambda *a: gelu_linear_backward(*a, "torch"), args, backend=backend, dtype=dtype)


def test_gelu_is_exact():
    """As F.gelu, not its tanh form (4e-4 off), and with its slope, from tail to tail."""
    hidden = torch.linspace(-9, 9, 16 * 128, device=DEVICE).view(16, 128).bfloat16()
    eye, zero = torch.eye(128, device=DEVICE).bfloat16(), torch.zeros(128, device=DEVICE)
    with ops.use_backend("triton"):
        _, out = gelu_linear(hidden, eye, zero, False, "triton")
        slope, again, sums = gelu_linear_backward(torch.ones_like(hidden), eye, hidden, "triton")
    x = hidden.double().requires_grad_()
    want = F.gelu(x)
    (want_slope,) = torch.autograd.grad(want.sum(), x)
    for got, exact in ((out, want), (again, want), (slope, want_slope)):
        off = (got.double() - exact).abs()
        assert (off <= exact.abs() * 2**-8 + 2e-6).all(), off.max()
    torch.testing.assert_close(sums.double(), want_slope.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", *TRITON])
def test_opcheck_and_nothing_to_do(backend):
    x, w, b = (t.bfloat16().to(device_for(backend)) for t in case(5, 16, 32))
    hidden, other = x.new_ones(5, 32), w.t().contiguous()
    tests = ("test_schema", "test_faketensor")
    with ops.use_backend(backend):
        for keep in (True, False):
            torch.library.opcheck(_gelu_linear, (x, w, b, keep, "triton"), test_utils=tests)
        torch.library.opcheck(_gelu_linear_backward, (x, other, hidden, "torch"), test_utils=tests)
        before, out = gelu_linear(x[:0], w, b, True)
        slope, again, sums = gelu_linear_backward(x[:0], other, hidden[:0])
    assert before.shape == out.shape == slope.shape == again.shape == (0, 32) and not sums.any()


def test_what_the_kernels_refuse():
    x, w, b = (t.float() for t in case(5, 16, 32))
    with ops.use_backend("triton"), pytest.raises(ops.BackendError, match="float32 is left to eager"):
        gelu_linear(x, w, b, True)
    if gelu.quack_objections():
        with ops.use_backend("triton"), pytest.raises(ops.BackendError, match="quack was asked for, but"):
            gelu_linear(*(t.to(DEVICE).bfloat16() for t in (x, w, b)), True, "quack")


class OnGpu:
    """What `choose` asks of a tensor."""

    is_cuda, dtype, device, shape = True, torch.bfloat16, torch.device("cuda", 0), (1000, 768)

    def __len__(self):
        return self.shape[0]


@pytest.fixture
def table(monkeypatch, tmp_path):
    """An empty table on disk, a GPU called G, and times by name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_fastest, "_table", None)
    monkeypatch.setattr(_fastest, "_machine", lambda _: "G, torch 2")
    monkeypatch.setattr(_fastest._capture, "capturing", lambda _: False)
    timed = []

    def time(run):
        timed.append(run())
        return timed[-1]

    monkeypatch.setattr(_fastest, "_time", time)
    return timed


def test_the_fastest_is_measured_once_and_kept(table, monkeypatch):
    candidates = {"a": lambda: 2.0, "b": lambda: 1.0, "c": lambda: float("inf")}
    assert _fastest.choose("op", OnGpu(), 3072, candidates) == "b"
    assert _fastest.choose("op", OnGpu(), 3072, candidates) == "b" and len(table) == 3
    monkeypatch.setattr(_fastest, "_table", None)  # as in another process
    assert _fastest.choose("op", OnGpu(), 3072, candidates) == "b" and len(table) == 3
    assert _fastest.choose("op", OnGpu(), 768, candidates) == "b" and len(table) == 6
    (key, other) = json.loads(_fastest.path().read_text())
    assert key.startswith("op 1024x768x3072 bfloat16 G, torch 2") and other != key
    del candidates["b"]  # no longer there: measured anew
    assert _fastest.choose("op", OnGpu(), 3072, candidates) == "a"


def test_nothing_is_measured_in_a_capture_and_nothing_that_fails_is_kept(table, monkeypatch):
    broken = {"a": lambda: float("inf"), "b": lambda: float("inf")}
    assert _fastest.choose("op", OnGpu(), 3072, broken) == "a" and not _fastest.path().exists()
    monkeypatch.setattr(_fastest._capture, "capturing", lambda _: True)
    assert _fastest.choose("op", OnGpu(), 3072, {"b": lambda: 1.0, "a": lambda: 0.0}) == "b" and len(table) == 2


def test_a_table_that_cannot_be_read_or_written_does_no_harm(table, tmp_path, monkeypatch):
    (tmp_path / "vjepa_fast").write_text("no folder")
    for _ in range(2):
        assert _fastest.choose("op", OnGpu(), 3072, {"a": lambda: 2.0, "b": lambda: 1.0}) == "b"
    assert len(table) == 2
