"""``runtime.attention: auto``: what is measured, what is kept, and what stands where nothing can be measured."""

import json
import logging

import pytest
import torch
import torch.utils.checkpoint

from vjepa_fast.layers import attention, block
from vjepa_fast.layers.attention import BACKENDS, SDPA, DeviceSegments, Segments, choice, table
from vjepa_fast.layers.attention.sdpa import SDPA_CUDNN, SDPA_FLASH, STEADY

from .named import Named

CUDA = torch.device("cuda")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vjepa_fast" / "attention.json"


@pytest.fixture
def gpu(monkeypatch, cache):
    """Tensors of the CPU pass for a GPU's; ``gpu(a=2.0, ...)`` registers backends and says how long they take."""
    timed, ms, capturing = [], {}, []

    def device_ms(once, device):
        before = {name: backend.calls for name, backend in some.items()}
        once()
        (name,) = (name for name, backend in some.items() if backend.calls > before[name])
        timed.append(name)
        return ms[name]

    some: dict[str, Named] = {}

    def having(**times):
        for name, time in times.items():
            some.setdefault(name, Named(name))
            ms[name] = time
        return some

    for name, value in {
        "_device_ms": device_ms,
        "_PASSES": 1,
        "_found": {},
        "TABLE": table.Table(),
        "BACKENDS": some,
        "environment": lambda device: "a GPU, torch 1",
    }.items():
        monkeypatch.setattr(choice, name, value)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    having.timed, having.capturing = timed, capturing
    return having


def restart(monkeypatch):
    """As another process: nothing in memory."""
    monkeypatch.setattr(choice, "_found", {})
    monkeypatch.setattr(choice, "TABLE", table.Table())


def qkv(tokens=200, grad=False, batch=1):
    return torch.randn(batch, tokens, 48).requires_grad_(grad)


def taken(lengths, x=None, rope=None, whole=False):
    x = qkv(sum(lengths)) if x is None else x
    return choice.fastest(x, rope, 2, lengths if isinstance(lengths, Segments) else Segments(lengths), whole).name


def test_the_quickest_is_measured_once_and_kept_on_disk(gpu, cache, monkeypatch):
    some = gpu(a=2.0, b=1.0, c=0.5)
    some["c"].reasons = ["no"]
    for lengths in ((120, 80), (100, 100), (101, 99)):
        assert taken(lengths) == "b"
    assert gpu.timed == ["a", "b"]
    restart(monkeypatch)
    gpu(a=0.5)
    assert taken((100, 90)) == "b" and gpu.timed == ["a", "b"]  # from the file
    ((shape, row),) = json.loads(cache.read_text())["environments"]["a GPU, torch 1"].items()
    assert shape == "float32, 2x8, 1 x lengths 128+128, forward"
    assert row == {"backend": "b", "ms": {"a": 2.0, "b": 1.0}}
    some["b"].reasons = ["gone"]  # a row whose backend no longer supports the call
    restart(monkeypatch)
    assert taken((100, 90)) == "a"


def test_a_row_holds_for_one_device_version_dtype_and_use(gpu, monkeypatch):
    gpu(a=2.0, b=1.0)
    x = qkv()
    rows = [
        (x, None, Segments((200,)), False),
        (x, None, Segments((200,)), True),
        (x, torch.zeros(200, 2, 8), Segments((200,)), False),
        (qkv(grad=True), None, Segments((200,)), False),
        (x.bfloat16(), None, Segments((200,)), False),
        (qkv(batch=3), None, Segments((200,)), False),
        (x, None, DeviceSegments(torch.tensor([120, 80]), 200), False),
        (x, None, Segments([20] * 10), False),
    ]
    for backend in choice.BACKENDS.values():
        backend.on_device = True
    for n, (x_, rope, segments, whole) in enumerate(rows, 1):
        choice.fastest(x_, rope, 2, segments, whole)
        assert len(gpu.timed) == 2 * n
    choice.fastest(qkv(batch=4), None, 2, Segments((190,)))  # batches to the next power of 2
    assert len(gpu.timed) == 2 * len(rows)
    monkeypatch.setattr(choice, "environment", lambda device: "a GPU, torch 2")
    choice.fastest(*rows[0][:2], 2, *rows[0][2:])
    assert len(gpu.timed) == 2 * len(rows) + 2


def test_a_backend_that_fails_or_computes_something_else_is_not_taken(gpu):
    some = gpu(a=3.0, wrong=1.0, fails=0.5)
    some["wrong"].factor = 1.2

    def fails(once, device):
        raise RuntimeError("CUDA error")

    some["fails"].__class__ = type("Fails", (Named,), {"__call__": lambda self, *_: fails(None, None)})
    assert taken((120, 80)) == "a" and gpu.timed == ["a"]
    (row,) = choice.TABLE.rows("a GPU, torch 1").values()
    assert row["ms"] == {"a": 3.0, "wrong": None, "fails": None}


def test_measuring_under_activation_checkpointing(gpu):
    """A backward pass in the middle of a forward pass whose activations are dropped."""
    gpu(a=2.0, b=1.0)
    x = qkv(grad=True)
    want = torch.autograd.grad(attention.attend(x, None, 2, [120, 80], SDPA).sum(), x)[0]

    def run(x):
        return attention.attend(2 * x / 2, None, 2, [120, 80])

    out = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], want)
    assert gpu.timed == ["a", "b"]


def test_memory_that_ran_out_says_nothing_of_a_backend(gpu, cache, monkeypatch):
    def fails(once, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    gpu(a=2.0, b=1.0)
    monkeypatch.setattr(choice, "_device_ms", fails)
    assert taken((120, 80)) == STEADY.name and not cache.exists()


def test_shapes_that_change_every_step_never_meet_a_backend_that_plans(gpu):
    """As cuDNN does, for milliseconds of the host; shapes that repeat are worth it."""
    some = gpu(a=2.0, plans=1.0)
    some["plans"].plans = some["plans"].on_device = some["a"].on_device = True
    assert taken((120, 80)) == "a" and not gpu.timed  # one is left, so there is nothing to measure
    assert taken((200,)) == "a"  # one mask
    assert taken((200,), whole=True) == "plans"
    assert taken(DeviceSegments(torch.tensor([120, 80]), 200), qkv()) == "plans"


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "null", '{"format": "other 2", "environments": {}}', '{"format": "vjepa-fast attention 1"}']
    + ['{"format": "vjepa-fast attention 1", "environments": {"a GPU, torch 1": {"x": {"backend": 3}}}}'],
)
def test_a_file_that_is_no_table_is_measured_over_and_told_once(gpu, cache, caplog, text):
    cache.parent.mkdir()
    cache.write_text(text)
    gpu(a=2.0, b=1.0)
    assert taken((120, 80)) == "b" and taken((300, 30)) == "b"
    assert [str(cache) in r.message for r in caplog.records if r.levelno == logging.WARNING] == [True]
    assert len(json.loads(cache.read_text())["environments"]["a GPU, torch 1"]) == 2


def test_rows_of_other_processes_stay_and_a_folder_that_is_read_only_is_no_error(gpu, cache, caplog, monkeypatch):
    gpu(a=2.0, b=1.0)
    assert taken((120, 80)) == "b"
    mine = choice.TABLE
    restart(monkeypatch)
    assert taken((300, 80)) == "b"
    mine.add("a GPU, torch 1", "third", {"backend": "a", "ms": {}})
    assert len(json.loads(cache.read_text())["environments"]["a GPU, torch 1"]) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))  # a file where a folder should be
    restart(monkeypatch)
    assert taken((120, 80)) == "b" and taken((500, 80)) == "b"
    assert len([r for r in caplog.records if "measured anew in every process" in r.message]) == 1


def test_nothing_is_measured_in_a_capture(gpu):
    some = gpu(a=2.0, b=1.0)
    for backend in some.values():
        backend.on_device = True
    x, segments = qkv(), DeviceSegments(torch.tensor([120, 80]), 200)
    some.update(varlen=BACKENDS["varlen"])
    gpu.capturing.append(True)
    assert taken(segments, x) == STEADY.name and taken((200,), x, whole=True) == STEADY.name  # float32
    assert not gpu.timed
    gpu.capturing.clear()
    del some["varlen"]
    assert taken(segments, x) == "b"
    some.update(varlen=BACKENDS["varlen"])
    gpu.capturing.append(True)
    assert taken(segments, x) == "b"  # of the table
    some["b"].capture = False
    assert taken(segments, x) == STEADY.name
    assert gpu.timed == ["a", "b"]


def test_what_is_taken_without_a_measurement():
    def found(dtype, head_dim, **more):
        return choice.unmeasured(attention.Call(CUDA, dtype, head_dim, **more))

    assert found(torch.bfloat16, 64) is SDPA_FLASH
    assert found(torch.bfloat16, 64, segments=9, on_device=True) is BACKENDS["varlen"]
    assert found(torch.float32, 64) is STEADY is found(torch.bfloat16, 12, on_device=True)
    assert SDPA not in choice.candidates(attention.Call(CUDA, torch.bfloat16, 64))
    assert SDPA_CUDNN in choice.candidates(attention.Call(CUDA, torch.bfloat16, 64))
    assert not [b for b in choice.candidates(attention.Call(CUDA, torch.bfloat16, 64, repeats=False)) if b.plans]
    assert choice.candidates(attention.Call(CUDA, torch.float64, 64)) == [STEADY]


def test_on_a_cpu_it_is_sdpa_and_nothing_is_written(cache):
    assert taken((120, 80)) == "sdpa" and not cache.exists()


def test_layers_hold_what_was_measured_for_whole_grids(gpu, monkeypatch):
    """Of the backends that can be part of a graph; a compiled graph takes it, other calls and eager ones do not."""
    some = gpu(a=2.0, b=1.0, c=3.0)
    some["b"].whole_graph = False
    m = block.Attention(48, 2)
    kept = choice.for_whole_grids  # on the CPU, as no GPU is here
    monkeypatch.setattr(attention, "for_whole_grids", lambda device, *size: kept(torch.device("cpu"), *size))
    block.choose_attention(CUDA, torch.float32, 3, 200, m, m)
    assert m.whole is some["a"] and sorted(gpu.timed) == ["a", "b", "c"]
    block.choose_attention(CUDA, torch.float32, 4, 190, m)
    assert m.whole is some["a"] and len(gpu.timed) == 3
    m.backend = some["c"]
    m.whole = None
    block.choose_attention(CUDA, torch.float32, 3, 200, m)
    assert m.whole is None  # forced


def test_a_compiled_graph_holds_the_choice_of_its_layer():
    torch._dynamo.reset()
    m, x = block.Attention(48, 2), torch.randn(2, 10, 48)
    want = m(x, None)
    m.whole = Named("a", factor=-2.0)
    torch.testing.assert_close(m(x, None), want)
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, None), (want - m.proj.bias) * -2 + m.proj.bias)
    torch.testing.assert_close(compiled(x, None, [6, 4]), m(x, None, [6, 4]))


def test_without_a_choice_a_compiled_graph_never_runs_cudnn(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(attention, "STEADY", Named("steady", factor=3.0))
    x = qkv()
    torch.testing.assert_close(attention.attend(x, None, 2), 3 * attention.attend(x, None, 2, backend=SDPA))
    assert not STEADY.plans and torch.nn.attention.SDPBackend.CUDNN_ATTENTION not in STEADY.kernels
