"""Triton kernels built ahead: what a piece of Python launches, recorded without a GPU, then compiled by many processes.

`recorded` runs every launch up to the point where Triton would compile, so a build has the key on disk under which the
launch will look for it. Nothing is compiled or launched meanwhile, and tensors may lie on the meta device. A process
that has recorded cannot launch the same kernels any more: do it in one of its own (trainer/warm.py).
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import multiprocessing
import time
from collections.abc import Callable, Generator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch.utils._python_dispatch import TorchDispatchMode

from vjepa_fast.ops import _triton


class Built(NamedTuple):
    """What came of one build; ``found``: it lay on disk already. ``error``: why it failed, or empty."""

    kernel: str
    seconds: float
    found: bool
    error: str = ""


class Build(NamedTuple):
    """A kernel with its types, numbers and options; ``make`` compiles it into Triton's cache on disk."""

    kernel: str
    make: Callable[[], object]


def objections() -> list[str]:
    """Why nothing can be built ahead here; empty if it can."""
    if importlib.util.find_spec("triton") is None:
        return ["the package triton is not installed"]
    if _triton.interpreted():
        return ["TRITON_INTERPRET=1 is set"]
    if importlib.util.find_spec("triton.runtime._async_compile") is None:
        return ["this Triton cannot hand over what it would compile"]
    return []


@contextlib.contextmanager
def recorded(arch: int) -> Generator[dict[str, Build]]:
    """Gives a dictionary that gets a `Build` by key for each launch inside, for compute capability ``arch`` / 10.

    Ops run their Triton backend on any tensors, and inside of custom ops what they would run on a GPU.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime._async_compile import AsyncCompileMode

    builds: dict[str, Build] = {}
    launched = SimpleNamespace(
        launch_metadata=lambda *args: None, run=lambda *args: None, function=0, packed_metadata=0
    )

    class Recorder(AsyncCompileMode):
        def submit(self, key: str, compile_fn: Callable[[], object], finalize_fn: Any) -> Any:
            source = inspect.getclosurevars(compile_fn).nonlocals["src"]
            builds.setdefault(key, Build(source.name, compile_fn))
            return launched

    target = GPUTarget("cuda", arch, 32)
    stand_in = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: target
    )
    triton.runtime.driver.set_active(stand_in)  # pyright: ignore[reportArgumentType]  # all that is asked of a driver
    with _triton.anywhere(), Recorder(Executor()), _Inside():
        yield builds


class _Inside(TorchDispatchMode):
    """Runs our custom ops on the meta device too, where PyTorch would ask for their shapes only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch._library.custom_ops import OPDEFS

        name = func.name().split(".")[0]
        if not name.startswith("vjepa_fast::"):
            return func(*args, **(kwargs or {}))
        with self:
            return OPDEFS[name]._init_fn(*args, **(kwargs or {}))  # pyright: ignore[reportPrivateUsage]  # no public way


_todo: list[Build] = []  # of this process and those that it forks: what compiles cannot be pickled


def make(builds: dict[str, Build], jobs: int, done: Callable[[Built], None]) -> None:
    """Compile all of them in ``jobs`` forked processes; ``done`` is called with each as it is ready."""
    _todo[:] = builds.values()
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(min(jobs, max(1, len(_todo))), mp_context=context) as pool:
        for task in as_completed([pool.submit(_make_one, n) for n in range(len(_todo))]):
            done(task.result())


def _make_one(number: int) -> Built:
    from triton import knobs

    build, hits = _todo[number], list[bool]()

    def listen(*, cache_hit: bool, **_: Any) -> None:
        hits.append(cache_hit)

    knobs.compilation.listener = listen
    began = time.perf_counter()
    try:
        build.make()
    except Exception as error:  # the launch itself will say more
        return Built(
            build.kernel, time.perf_counter() - began, False, f"{type(error).__name__}: {error}".splitlines()[0]
        )
    return Built(build.kernel, time.perf_counter() - began, hits == [True])
