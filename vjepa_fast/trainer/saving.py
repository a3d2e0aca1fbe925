"""Checkpoints written beside training: a save copies the state, and a thread writes the copy while steps go on.

One save is in flight at a time; the next one waits for it. What goes wrong in the thread is raised by the process that
trains: at its next look, its next save, or its end.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.config.schema import RuntimeConfig
from vjepa_fast.files import first_line
from vjepa_fast.metrics import hardware
from vjepa_fast.trainer import checkpoint
from vjepa_fast.trainer.distributed import Distributed
from vjepa_fast.trainer.writer import RunLock

SHARE = 0.5  # of the memory that is free, at most, for the copy under ``auto``


class Copies:
    """Copies of a state on the CPU, in memory that the next copy uses again: pinned for what comes from CUDA.

    Tensors that share memory share it in the copy too, as ``torch.save`` writes it once.
    """

    def __init__(self) -> None:
        self.room: list[Tensor] = []  # uint8, one per storage, in the order of the state
        self.arrived: torch.cuda.Event | None = None

    def of(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of ``state``. From CUDA it is in flight until `wait`: work launched later on the current stream may
        already change the state.
        """
        self.used, self.arrived = 0, None
        self.made: dict[tuple[torch.device, int], Tensor] = {}
        with torch.no_grad():
            found = {name: self._copy(value) for name, value in state.items()}
        if any(device.type == "cuda" for device, _ in self.made):
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        self.made.clear()
        return found

    def wait(self) -> None:
        """Until all of the copy has arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            found = copy.copy(value)
            found.update((key, self._copy(item)) for key, item in value.items())
            return found
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(item) for item in value)
        return copy.deepcopy(value)

    def _tensor(self, x: Tensor) -> Tensor:
        x = x.detach()
        if x.layout != torch.strided or x.is_quantized or x.is_meta or not x.untyped_storage().nbytes():
            return x.clone().cpu()
        storage = x.untyped_storage()
        key = x.device, storage.data_ptr()
        if key not in self.made:
            source = torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage)  # pyright: ignore[reportArgumentType]  # its stub knows typed storages alone
            self.made[key] = self._room(source)
            self.made[key].copy_(source, non_blocking=True)
        room = self.made[key].untyped_storage()
        return torch.empty(0, dtype=x.dtype, device="cpu").set_(room, x.storage_offset(), x.shape, x.stride())  # pyright: ignore[reportArgumentType]

    def _room(self, source: Tensor) -> Tensor:
        """Memory for a storage; that of the copy before, where it was as large."""
        number, self.used = self.used, self.used + 1
        if number < len(self.room) and self.room[number].shape == source.shape:
            return self.room[number]
        made = torch.empty(source.shape, dtype=torch.uint8, device="cpu", pin_memory=source.is_cuda)
        self.room[number : number + 1] = [made]
        return made


def size_of(state: Any) -> int:
    """Bytes of the tensors in a state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    items = state.values() if isinstance(state, Mapping) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(size_of, items))


class _GivenUp(Exception):
    """Nobody waits for this save any more."""


class _Job(threading.Thread):
    """One checkpoint being written; ``error`` or its ``path`` afterwards."""

    def __init__(self, folder: Path, step: int, keep: int, content: Mapping[str, Any], ready: Callable[[], None]):
        super().__init__(name="vjepa-fast-save", daemon=True)  # a process that ends does not wait for it
        self.folder, self.step, self.keep, self.content, self.ready = folder, step, keep, content, ready
        self.began, self.seconds, self.size = time.perf_counter(), 0.0, 0
        self.error: Exception | None = None
        self.given_up = threading.Event()

    def run(self) -> None:
        try:
            self.ready()
            path = checkpoint.save(self.folder, self.content, self.keep, self._look)
            with contextlib.suppress(OSError):  # moved away meanwhile: the lock says so at its next look
                self.size = path.stat().st_size
        except Exception as error:
            self.error = error
        self.seconds = time.perf_counter() - self.began
        self.content = {}

    def _look(self) -> None:
        if self.given_up.is_set():
            raise _GivenUp


class Saver:
    """Writes the checkpoints of a run. All processes call `save` and `settle` together; the first one writes.

    Args:
        folder: the run folder.
        world: the processes.
        lock: looked at before each save.
        run: ``keep_checkpoints`` and ``async_save``.
        path: the checkpoint that the run goes on from.

    Attributes:
        path: the last checkpoint that was written whole.
        say: takes lines for the user.
        waited: seconds that training stood still for saving; whoever reads it sets it to 0.
    """

    def __init__(self, folder: Path, world: Distributed, lock: RunLock, run: RuntimeConfig, path: Path | None = None):
        self.folder, self.world, self.lock, self.path = folder, world, lock, path
        self.keep, self.background, self.auto = run.keep_checkpoints, run.async_save, run.async_save == "auto"
        self.say: Callable[[str], None] = lambda text: None
        self.waited = 0.0
        self.copies = Copies()
        self.job: _Job | None = None  # in the first process
        self.step: int | None = None  # of the save that was not yet agreed on
        self.stood = 0.0  # seconds of `waited` for this save

    def save(self, step: int, state: Mapping[str, Any] | None, *, wait: bool = False) -> None:
        """Begin to write ``state``, which only the first process has, as the checkpoint of ``step``; ``wait`` for it.

        Raises:
            UserError: the save before failed; or this one, where it is waited for.
        """
        self.settle()
        began = time.perf_counter()
        self.step, self.stood, error = step, 0.0, None
        if state is not None:
            try:
                self.lock.check()
                content, behind = self._content(state)
                self.job = _Job(self.folder, step, self.keep, content, self.copies.wait)
                if behind:
                    self.job.start()
                else:
                    self.job.run()
            except Exception as e:
                error = e
        self._stood(began)
        in_flight = self.job is not None and self.job.is_alive()
        if wait or not self.world.gather(in_flight)[0]:
            self.settle(error)

    def _content(self, state: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
        """(what to write, whether in the background): a copy, or where ``auto`` finds no memory for it the state."""
        if not self._behind(state):
            return state, False
        try:
            return self.copies.of(state), True
        except (RuntimeError, MemoryError) as error:  # pinned memory has limits of its own
            if not self.auto:
                raise
            self.background, self.copies = False, Copies()
            self.say(f"runtime.async_save: auto leaves it off: no memory for a copy of the state ({first_line(error)})")
            return state, False

    def _behind(self, state: Mapping[str, Any]) -> bool:
        """Whether saves are in the background; ``auto`` is decided at the first."""
        if self.background == "auto":
            size, free = size_of(state), hardware.free_memory()
            self.background = free is None or size <= SHARE * free
            if free is not None and not self.background:
                self.say(
                    f"runtime.async_save: auto leaves it off: a copy of the state takes {size / 1e6:.0f} MB, "
                    f"{free / 1e6:.0f} MB are free; training stands still while a checkpoint is written"
                )
        return bool(self.background)

    @property
    def failed(self) -> bool:
        """Whether the save in flight has gone wrong: `settle` raises it, in all processes."""
        return self.job is not None and not self.job.is_alive() and self.job.error is not None

    def look(self) -> None:
        """Report a save that is done; in a run of one process raise what went wrong. Waits for nothing."""
        if self.job is not None and not self.job.is_alive() and self.world.world == 1:
            self.settle()

    def settle(self, error: Exception | None = None) -> None:
        """Wait for the save in flight, if any.

        Raises:
            UserError: it failed, in whichever process; or ``error``.
        """
        if self.step is None:
            return
        began, job = time.perf_counter(), self.job
        if job is not None:
            if job.is_alive():
                job.join()
            error = error or job.error
        self._stood(began)
        step, self.step, self.job = self.step, None, None
        self.world.agree(error)
        self.path = checkpoint.path_of(self.folder, step)
        if job is not None:
            self.say(
                f"saved {self.path.name}: {job.size / 1e6:.1f} MB in {job.seconds:.2f} s, "
                f"for {self.stood:.2f} s of it training stood still"
            )

    def _stood(self, began: float) -> None:
        taken = time.perf_counter() - began
        self.stood, self.waited = self.stood + taken, self.waited + taken

    def close(self, *, at_once: bool = False) -> None:
        """End with the run: wait for the save in flight, or ``at_once`` give it up. What goes wrong is said, since what
        ended the run is the news.
        """
        job, self.job, self.step = self.job, None, None
        if job is None:
            return
        if at_once:
            job.given_up.set()
        if job.is_alive():
            job.join()
        if job.error is None:
            self.path = checkpoint.path_of(self.folder, job.step)
        elif not at_once:
            self.say(f"warning: {job.error}")
