"""When the Triton kernels of ``kernels/`` can run: CUDA tensors, or any under ``TRITON_INTERPRET=1`` (for tests)."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Generator
from contextvars import ContextVar
from typing import Any

import torch

from vjepa_fast.ops import _backend

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # the dtypes that the kernels read and write


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter (slow, on any device)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_anywhere: ContextVar[bool] = ContextVar("triton on any tensors", default=False)


@contextlib.contextmanager
def anywhere() -> Generator[None]:
    """Inside, tensors on any device will do: launches are recorded, see `_builds`."""
    token = _anywhere.set(True)
    try:
        yield
    finally:
        _anywhere.reset(token)


@functools.cache
def _machine() -> str:
    """Why no kernel can run here; empty if it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is under 8.0"
    return ""


def objections(*tensors: torch.Tensor | None) -> list[str]:
    """Why the kernels cannot run on these tensors; without arguments, why they cannot run at all."""
    if _anywhere.get():
        reasons = []
    elif interpreted():
        forced = _backend.current_backend() == "triton"
        reasons = [] if forced else ["TRITON_INTERPRET=1 interprets the kernels, only where triton is forced"]
    else:
        elsewhere = any(t is not None and t.device.type != "cuda" for t in tensors)
        # with CPU tensors CUDA is not asked: in a forked worker that would fail
        reasons = ["triton supports CUDA tensors only"] if elsewhere else [_machine()] if _machine() else []
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        reasons.append("triton computes in float32, float64 is left to eager")
    return reasons


def launch(module: str, function: str, on: torch.Tensor, *args: Any) -> Any:
    """Call a function of ``kernels/MODULE.py``, imported (with Triton) now, with the CUDA device of ``on`` current."""
    with torch.cuda.device(on.device) if on.is_cuda else contextlib.nullcontext():
        return getattr(importlib.import_module(f"vjepa_fast.kernels.{module}"), function)(*args)
