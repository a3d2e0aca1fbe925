"""Which implementation of an op runs: ``eager`` (PyTorch, any device), ``cpp`` (csrc, CPU) or ``triton`` (CUDA).

An op registers one implementation per backend, with a function that lists why it cannot serve given inputs. ``auto``
takes the fastest one without objections; forcing one that cannot serve raises and lists every reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from vjepa_fast.errors import UserError

BACKENDS = ("triton", "cpp", "eager")  # in the order that auto tries them
CHOICES = ("auto", *BACKENDS)

_implementations: dict[str, dict[str, tuple[Callable, Callable]]] = {}
_chosen: str | None = None  # by use_backend; None: VJEPA_FAST_BACKEND


class BackendError(UserError, RuntimeError):
    """The backend asked for is unknown or cannot serve."""


def _checked(name: str, source: str) -> str:
    if name not in CHOICES:
        raise BackendError(f"{source}: expected one of {', '.join(CHOICES)}, got {name!r}")
    return name


def current_backend() -> str:
    """The choice in force: that of ``use_backend``, else of ``VJEPA_FAST_BACKEND``, else ``auto``."""
    if _chosen is not None:
        return _chosen
    return _checked(os.environ.get("VJEPA_FAST_BACKEND") or "auto", "VJEPA_FAST_BACKEND")


class use_backend:  # noqa: N801 (reads as a function)
    """``use_backend("eager")`` chooses a backend for the whole process; ``with use_backend("eager"):`` until the end.

    Names: ``auto``, ``eager``, ``cpp``, ``triton``. The choice takes the place of ``VJEPA_FAST_BACKEND``; an op that
    the backend cannot serve raises ``BackendError`` when it is called.
    """

    def __init__(self, name: str):
        global _chosen
        self.previous, _chosen = _chosen, _checked(name, "use_backend")

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc: object) -> None:
        global _chosen
        _chosen = self.previous


def register(op: str, backend: str, objections: Callable[..., list[str]] = lambda *args: []) -> Callable:
    """Decorator: this function is ``op`` on ``backend``.

    ``objections(*args)`` gives the reasons against serving a call with these arguments, and, called with none, against
    serving any call on this machine.
    """

    def add(fn: Callable) -> Callable:
        _implementations.setdefault(op, {})[backend] = (fn, objections)
        return fn

    return add


def _reasons(op: str, backend: str, *args: Any) -> list[str]:
    entry = _implementations[op].get(backend)
    return entry[1](*args) if entry else [f"{op} has no {backend} implementation"]


def call(op: str, *args: Any) -> Any:
    """Run ``op`` on the chosen backend; ``auto`` takes the first of triton, cpp, eager that has no objection."""
    choice = current_backend()
    refused = []
    for backend in BACKENDS if choice == "auto" else (choice,):
        reasons = _reasons(op, backend, *args)
        if not reasons:
            return _implementations[op][backend][0](*args)
        refused += [f"{backend}: {reason}" for reason in reasons]
    raise BackendError(f"{op} cannot run on backend {choice!r} ({'; '.join(refused)})")


def backend_report() -> dict[str, dict[str, str]]:
    """Op -> backend -> why it cannot serve on this machine; an empty text means that it can.

    ``auto`` uses the first backend with an empty text, unless a call's own arguments (device, dtype) speak against it.
    """
    return {op: {b: "; ".join(_reasons(op, b)) for b in BACKENDS} for op in sorted(_implementations)}
