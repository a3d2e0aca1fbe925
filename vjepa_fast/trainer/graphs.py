"""CUDA graphs: one recorded sequence of kernels per shape of the input, launched by a single call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vjepa_fast.config.schema import Config
from vjepa_fast.errors import ConfigError
from vjepa_fast.layers import attention

_log = logging.getLogger("vjepa_fast")
MOST = 4  # graphs kept; each keeps the memory of its intermediate tensors
_WARM_UP = 3  # passes before the capture: kernels are compiled, caches filled, workspaces taken


@dataclass
class Captured:
    """``replay()`` computes ``output`` anew from what lies in ``input``; both stay where they are."""

    input: Tensor
    output: Tensor
    replay: Callable[[], None]


def objections(cfg: Config, device: torch.device, target_grad: bool) -> list[str]:
    """Why the target forward cannot be replayed as a CUDA graph; empty if it can."""
    reasons = []
    if device.type != "cuda":
        reasons.append(f"it needs CUDA, the run is on {device.type}")
    if target_grad:
        reasons.append("the target takes part in the backward pass")
    backend = attention.find(cfg.runtime.attention)
    if backend is not None and not backend.graph:  # a replay would read tables that may be gone
        reasons.append(f"runtime.attention: {backend.name} does not keep its tables")
    return reasons


def build(cfg: Config, device: torch.device, target_grad: bool) -> Graphs | None:
    """As ``runtime.cuda_graphs`` says: true or it raises, auto where it can serve, false never.

    Raises:
        ConfigError: true was asked for and it cannot serve; all its reasons are told. Or no such choice.
    """
    choice = cfg.runtime.cuda_graphs
    if choice is False:
        return None
    if choice not in (True, "auto"):
        raise ConfigError(f"runtime.cuda_graphs: unknown value {choice!r}; accepted: true, false, auto")
    reasons = objections(cfg, device, target_grad)
    if not reasons:
        return Graphs(device, forced=choice is True)
    if choice is True:
        raise ConfigError(f"runtime.cuda_graphs: true, but {'; '.join(reasons)}")
    if device.type == "cuda":
        _log.warning("runtime.cuda_graphs: auto leaves it off: %s", "; ".join(reasons))
    return None


class Graphs:
    """Runs a function of one tensor, without autograd, as CUDA graphs.

    The function must be the same at every call, read only its argument and tensors that are changed in place, and wait
    for nothing. The returned tensor is overwritten by the next call with the same shape, dtype and ``slot``.

    Args:
        forced: raise where a capture fails; otherwise the reason is logged once and calls run as they are.
        capture: makes a `Captured` of (function, argument); another one in tests.
    """

    def __init__(self, device: torch.device, *, forced: bool = False, capture: Callable[..., Captured] | None = None):
        self.device, self.forced = device, forced
        self.capture = capture or _capture
        self.captured: dict[tuple, Captured] = {}
        self.off = False  # a capture failed
        self.told: set[str] = set()

    def __call__(self, run: Callable[[Tensor], Tensor], x: Tensor, slot: int = 0) -> Tensor:
        """``run(x)``; calls whose results are needed at the same time need different ``slot``s."""
        if self.off:
            return run(x)
        key = (slot, tuple(x.shape), x.dtype)
        found = self.captured.get(key)
        if found is None:
            if len(self.captured) == MOST:
                self._tell(f"runtime.cuda_graphs: {MOST} shapes of clips have one; further shapes run without")
                return run(x)
            try:
                found = self.captured[key] = self.capture(run, x)
            except RuntimeError as error:
                reason = f"the target forward could not be captured ({str(error).splitlines()[0]})"
                if self.forced:
                    raise ConfigError(f"runtime.cuda_graphs: true, but {reason}") from error
                self.off = True
                self._tell(f"runtime.cuda_graphs: auto leaves it off: {reason}")
                return run(x)
        found.input.copy_(x, non_blocking=True)
        found.replay()
        return found.output

    def _tell(self, text: str) -> None:
        if text not in self.told:
            self.told.add(text)
            _log.warning("%s", text)


def _capture(run: Callable[[Tensor], Tensor], x: Tensor) -> Captured:
    """Each graph has a memory pool of its own: in a shared one, a replay could write over another graph's output."""
    with torch.cuda.device(x.device):
        static = torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x)
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                run(static)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: what other threads do meanwhile (reading data, NCCL's watchdog) is no part of it
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = run(static)
        except BaseException:
            torch.cuda.set_stream(current)  # a capture that ends with an error leaves its own stream current
            raise
    return Captured(static, output, graph.replay)
