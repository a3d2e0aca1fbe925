"""Which implementation of an op runs: ``eager`` (PyTorch, any device), ``cpp`` (csrc, CPU) or ``triton`` (CUDA).

An op registers one implementation per backend, with a function that lists why it cannot run on given inputs. ``auto``
takes the fastest one without objections; forcing one that has some raises and lists every reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

from vjepa_fast.errors import UserError

BACKENDS = ("triton", "cpp", "eager")  # in the order that auto tries them
CHOICES = ("auto", *BACKENDS)

Implementation = TypeVar("Implementation", bound=Callable[..., Any])
Objections = Callable[..., "list[str]"]

_implementations: dict[str, dict[str, tuple[Callable[..., Any], Objections]]] = {}
_chosen: ContextVar[str | None] = ContextVar("vjepa_fast_backend", default=None)  # None: VJEPA_FAST_BACKEND


class BackendError(UserError, RuntimeError):
    """The backend asked for is unknown or cannot run the call."""


def _checked(name: str, source: str) -> str:
    if name not in CHOICES:
        raise BackendError(f"{source}: expected one of {', '.join(CHOICES)}, got {name!r}")
    return name


def current_backend() -> str:
    """The choice in force: that of ``use_backend``, else of ``VJEPA_FAST_BACKEND``, else ``auto``."""
    return _chosen.get() or _checked(os.environ.get("VJEPA_FAST_BACKEND") or "auto", "VJEPA_FAST_BACKEND")


class use_backend:  # noqa: N801 (reads as a function)
    """``with use_backend("eager"):`` chooses a backend for a block, ``use_backend("eager")`` for the rest of a context.

    Names: ``auto``, ``eager``, ``cpp``, ``triton``. The choice takes the place of ``VJEPA_FAST_BACKEND``; an op that
    the backend cannot run raises ``BackendError`` when it is called. A context (`contextvars`) is the current thread or
    asyncio task, so a choice neither reaches other threads nor waits for them; what holds for the whole process is the
    variable. The backward pass of an op takes the choice that was in force at its forward, in whichever thread it runs;
    in a graph of ``torch.compile`` both passes take the one in force when they run.
    """

    def __init__(self, name: str) -> None:
        checked = _checked(name, "use_backend")
        self._before = _chosen.get()
        _chosen.set(checked)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc: object) -> None:
        _chosen.set(self._before)


def register(
    op: str, backend: str, objections: Objections = lambda *_: []
) -> Callable[[Implementation], Implementation]:
    """Decorator: this function is ``op`` on ``backend``.

    ``objections(*args)`` returns the reasons against a call with these arguments and, called with none, against any
    call on this machine.
    """

    def add(fn: Implementation) -> Implementation:
        _implementations.setdefault(op, {})[backend] = (fn, objections)
        return fn

    return add


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """The function registered as ``op`` on ``backend``, without dispatch or checks."""
    return _implementations[op][backend][0]


def _reasons(op: str, backend: str, *args: Any) -> list[str]:
    entry = _implementations[op].get(backend)
    return entry[1](*args) if entry else [f"{op} has no {backend} implementation"]


def call(op: str, *args: Any) -> Any:
    """Run ``op`` on the chosen backend; ``auto`` takes the first of triton, cpp, eager that has no objection."""
    choice = current_backend()
    refused: list[str] = []
    for backend in BACKENDS if choice == "auto" else (choice,):
        reasons = _reasons(op, backend, *args)
        if not reasons:
            return _implementations[op][backend][0](*args)
        refused += [f"{backend}: {reason}" for reason in reasons]
    raise BackendError(f"{op} cannot run on backend {choice!r} ({'; '.join(refused)})")


def register_gradient(op: Any, backward: Callable[..., Any], save: Callable[[Any, tuple[Any, ...], Any], None]) -> None:
    """``op.register_autograd``, with the backward on the backend that was chosen when the forward ran.

    Autograd runs a backward whenever it is asked to and, for tensors on a GPU, in threads of its own.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend = current_backend()
        save(ctx, inputs, output)

    def run(ctx: Any, *grads: Any) -> Any:
        with use_backend(ctx.backend):
            return backward(ctx, *grads)

    op.register_autograd(run, setup_context=setup)


def define(op: str, arguments: str, returns: str = "Tensor") -> Callable[[Callable[..., Any]], Any]:
    """Decorator: the custom op ``vjepa_fast::op`` of a function that takes its ``arguments`` by position.

    Types are those of a schema of the dispatcher; an op and its backward share most of theirs.
    """
    return torch.library.custom_op(f"vjepa_fast::{op}", mutates_args=(), schema=f"({arguments}) -> {returns}")


def backend_report() -> dict[str, dict[str, str]]:
    """Op -> backend -> why it cannot run on this machine; an empty text means that it can.

    ``auto`` uses the first backend with an empty text, unless a call's own arguments (device, dtype) speak against it.
    """
    return {op: {b: "; ".join(_reasons(op, b)) for b in BACKENDS} for op in sorted(_implementations)}
