"""The backends of other packages, xformers and flash-attn-4, as they are found here or made up."""

import ctypes
import importlib.util
import sys
import types
from importlib import metadata
from pathlib import Path

import pytest
import torch

from vjepa_fast.layers.attention import BACKENDS, Call, Segments

xformers, fa4 = (sys.modules[type(BACKENDS[name]).__module__] for name in ("xformers", "fa4"))
ON_CPU = Call(torch.device("cpu"), torch.bfloat16, 64)


@pytest.fixture
def fresh(monkeypatch):
    """Nothing is remembered of these packages, and the CPU passes for a GPU."""
    kept = (xformers._refusals, xformers._ops, xformers.load_runtime, fa4._import_error)
    for function in kept:
        function.cache_clear()
    for backend in (xformers.Xformers, fa4.Fa4):
        monkeypatch.setattr(backend, "cuda", False)
    yield monkeypatch
    for function in kept:
        function.cache_clear()


def pretend(monkeypatch, call):
    """An installed xformers whose ``memory_efficient_attention`` is ``call``."""
    package, module = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    package.ops, module.memory_efficient_attention = module, call
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    monkeypatch.setattr(xformers, "installed", lambda name: True)
    monkeypatch.setattr(xformers, "_block_diagonal", lambda *_: None)


def test_xformers_without_an_operator_is_refused_with_its_own_words(fresh):
    """As its wheel for CUDA 12 does beside a torch for CUDA 13: it imports, and no call runs."""

    def call(*_, **__):
        raise NotImplementedError("No operator found for\n`fa2F`: xFormers wasn't build with CUDA support")

    pretend(fresh, call)
    fresh.setattr(xformers, "load_runtime", lambda: "libcudart.so.12 is missing: pip install nvidia-cuda-runtime-cu12")
    said, missing = BACKENDS["xformers"].objections(ON_CPU)
    assert "No operator found for `fa2F`: xFormers wasn't build with CUDA support" in said
    assert "pip install nvidia-cuda-runtime-cu12" in missing
    xformers._refusals.cache_clear()
    fresh.setattr(xformers, "load_runtime", lambda: "")
    xformers._ops.cache_clear()
    pretend(fresh, lambda q, k, v, **_: q)
    assert BACKENDS["xformers"].objections(ON_CPU) == []


def test_xformers_that_cannot_be_imported_says_why(fresh):
    """As beside flash-attn-4, whose folder it takes for that of flash-attn 2."""
    fresh.setattr(xformers, "installed", lambda name: True)
    fresh.setitem(sys.modules, "xformers", None)
    (reason,) = BACKENDS["xformers"].objections(ON_CPU)
    assert reason.startswith("xformers cannot be imported: ModuleNotFoundError")


def test_xformers_is_named_for_the_kernels_that_it_runs(monkeypatch):
    for found, kernels in ((False, "flash"), (True, "fa3")):
        monkeypatch.setattr(xformers, "installed", lambda name, found=found: found and name == "flash_attn_3")
        assert xformers.Xformers().implementation == kernels


def test_one_segment_needs_no_mask_of_xformers(fresh):
    """So that nothing is made on the host; several have offsets."""
    calls = []
    pretend(fresh, lambda q, k, v, **more: calls.append((q.shape, more)) or q)
    q = torch.randn(2, 8, 2, 16)
    assert BACKENDS["xformers"](q, q, q, Segments((8,))).shape == q.shape
    assert BACKENDS["xformers"](q, q, q, Segments((5, 3))).shape == q.shape
    assert calls == [((2, 8, 2, 16), {}), ((1, 16, 2, 16), {"attn_bias": None})]


def test_the_cuda_runtime_is_loaded_for_all_from_its_package(fresh, tmp_path):
    loaded = []

    def load(path, mode):
        loaded.append((path, mode))
        if "/" not in path:
            raise OSError(f"{path}: cannot open shared object file")

    library = tmp_path / "nvidia" / "libcudart.so.12"
    files = [types.SimpleNamespace(name=n, locate=lambda n=n: library.with_name(n)) for n in ("a.h", library.name)]
    fresh.setattr(ctypes, "CDLL", load)
    fresh.setattr(metadata, "files", lambda name: {"nvidia-cuda-runtime-cu12": files}[name])
    assert xformers.load_runtime() == ""
    assert loaded == [("libcudart.so.12", ctypes.RTLD_GLOBAL), (str(library), ctypes.RTLD_GLOBAL)]
    xformers.load_runtime.cache_clear()
    fresh.setattr(metadata, "files", lambda name: [])
    assert "installed without libcudart.so.12" in xformers.load_runtime()

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    xformers.load_runtime.cache_clear()
    fresh.setattr(metadata, "files", absent)
    assert xformers.load_runtime() == "libcudart.so.12 is missing: pip install nvidia-cuda-runtime-cu12"


@pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="xformers is not installed")
def test_the_installed_xformers_loads_its_library():
    xformers._ops()
    from xformers import _cpp_lib

    assert xformers.load_runtime() == "" and _cpp_lib._cpp_library_load_exception is None


def test_the_extra_has_what_xformers_lacks():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    gpu = text.split("\ngpu = [")[1].split("]")[0]
    assert "xformers" in gpu and "nvidia-cuda-runtime-cu12" in gpu
    assert "flash-attn-4" in text.split("\nfa4 = [")[1].split("\n]")[0]


def test_fa4_is_called_with_offsets_and_refused_where_it_is_not_there(fresh):
    call = Call(torch.device("cpu"), torch.bfloat16, 64)
    if not BACKENDS["fa4"].version():
        assert (
            BACKENDS["fa4"].objections(call)[0]
            == "the package flash-attn-4 is not installed (pip install --pre flash-attn-4[cu13])"
        )
    fresh.setattr(metadata, "version", lambda name: "4.0.0")
    fresh.setattr(torch.version, "cuda", "12.6")
    assert "CUDA 12.9 or newer, torch was built for 12.6" in BACKENDS["fa4"].objections(call)[0]
    fresh.setattr(torch.version, "cuda", "13.0")
    fresh.setitem(sys.modules, "flash_attn", None)
    fresh.setitem(sys.modules, "flash_attn.cute", None)
    (reason,) = BACKENDS["fa4"].objections(call)
    assert reason.startswith("flash-attn-4 cannot be imported: ModuleNotFoundError")
    fa4._import_error.cache_clear()
    got = {}

    def attend(q, k, v, **more):
        got.update(more, shape=q.shape)
        return v, None

    for name in ("flash_attn", "flash_attn.cute"):
        fresh.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["flash_attn.cute"].flash_attn_varlen_func = attend
    assert BACKENDS["fa4"].objections(call) == [] and BACKENDS["fa4"].version() == "flash-attn-4 4.0.0"
    q = torch.randn(2, 8, 2, 16)
    assert torch.equal(BACKENDS["fa4"](q, q, 2 * q, Segments((5, 3))), 2 * q)
    assert got["cu_seqlens_q"].tolist() == got["cu_seqlens_k"].tolist() == [0, 5, 8, 13, 16]
    assert got["max_seqlen_q"] == got["max_seqlen_k"] == 5 and got["shape"] == (16, 2, 16)
    assert got["deterministic"] is False
