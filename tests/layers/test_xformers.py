"""The backend xformers where the package imports and cannot run."""

import sys
import types

import torch

from vjepa_fast.layers.attention import BACKENDS, Call, xformers


def test_xformers_without_an_operator_is_refused_with_its_own_words(monkeypatch):
    """As its wheel for CUDA 12 does beside a torch for CUDA 13: it imports, and no call runs."""

    def call(*_, **__):
        raise NotImplementedError("No operator found for\n`fa2F`: xFormers wasn't build with CUDA support")

    package, module = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    module.memory_efficient_attention = call
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", module)
    for name, value in {"_INSTALLED": True, "needs_cuda": lambda call: [], "_block_diagonal": lambda *_: None}.items():
        monkeypatch.setattr(xformers, name, value)
    xformers._refusals.cache_clear()
    asked = Call(torch.device("cpu"), torch.bfloat16, 64)
    (reason,) = BACKENDS["xformers"].objections(asked)
    assert "No operator found for `fa2F`: xFormers wasn't build with CUDA support" in reason
    module.memory_efficient_attention = lambda q, k, v, **_: q
    xformers._refusals.cache_clear()
    assert BACKENDS["xformers"].objections(asked) == []
    xformers._refusals.cache_clear()
