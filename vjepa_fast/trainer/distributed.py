"""Several processes under ``torchrun``: rank and world from the environment, gradients averaged by DDP in the backward.

Every process draws its own slice of the global batch, so the loss is that of one process with the whole batch,
apart from the truncation of masks, which is per process.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vjepa_fast.errors import ConfigError, TrainingError
from vjepa_fast.files import first_line
from vjepa_fast.trainer import meeting
from vjepa_fast.trainer.peers import Watch, begin

T = TypeVar("T")


class Distributed:
    """One process of ``world``. With ``world == 1`` every method is a no-op and no process group exists."""

    def __init__(self, rank: int = 0, world: int = 1, local_rank: int = 0):
        self.rank, self.world, self.local_rank = rank, world, local_rank
        self.watch: Watch | None = None
        self.control: dist.ProcessGroup | None = None  # gloo, for host-side decisions: the device is never waited for
        self.owns_group = False

    @staticmethod
    def local_rank_from_env() -> int:
        """``LOCAL_RANK``, 0 where it is not set."""
        return _env_int("LOCAL_RANK", 0)

    @staticmethod
    def world_from_env() -> int:
        """``WORLD_SIZE``, 1 where it is not set."""
        return _env_int("WORLD_SIZE", 1)

    @classmethod
    def from_env(cls, device_type: str, timeout: float = 600.0) -> Distributed:
        """Read ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``; join the group (nccl on CUDA, gloo elsewhere) if > 1.

        Within ``timeout`` seconds of another process's death all others end in a line that names it (`peers.Watch`).

        Raises:
            TrainingError: the processes do not come together.
        """
        world = cls.world_from_env()
        self = cls(_env_int("RANK", 0), world, _env_int("LOCAL_RANK", 0))
        if world > 1:
            self.owns_group = not dist.is_initialized()
            store = self._join("nccl" if device_type == "cuda" else "gloo", timeout)
            group = dist.new_group(backend="gloo")
            self.control = group if isinstance(group, dist.ProcessGroup) else None
            self.watch = begin(self.rank, world, timeout, store)
        return self

    def _join(self, backend: str, timeout: float) -> dist.Store | None:  # pyright: ignore[reportPrivateImportUsage]
        """Wait for the others; a collective itself waits longer than the watch, which knows more."""
        wait = 2 * timeout + 60
        try:
            store = meeting.store(self.rank, self.world, wait)
            if self.owns_group:
                place = (-1, -1) if store is None else (self.world, self.rank)  # -1: as the environment says
                dist.init_process_group(backend, None, timedelta(seconds=wait), *place, store)
            return store
        except (dist.DistStoreError, dist.DistNetworkError, ValueError) as error:
            where = ", ".join(f"{k}={os.environ.get(k)}" for k in ("MASTER_ADDR", "MASTER_PORT"))
            raise TrainingError(
                f"rank {self.rank} of {self.world}: the processes do not come together ({where}): {first_line(error)}; "
                "start as many as WORLD_SIZE says, under torchrun, for example"
            ) from None

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes; NaN anywhere is NaN everywhere."""
        if self.world > 1:
            values = values / self.world
            dist.all_reduce(values)
        return values

    def mean_(self, values: Tensor) -> None:
        """The same, in place."""
        if self.world > 1:
            dist.all_reduce(values.div_(self.world))

    def any(self, flags: list[bool]) -> list[bool]:
        """Which of ``flags`` are set in some process."""
        if self.world == 1:
            return flags
        total = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(total, op=dist.ReduceOp.MAX, group=self.control)
        return [bool(x) for x in total.tolist()]

    def gather(self, value: T) -> list[T]:
        """The small picklable ``value`` of every process, in rank order, on every process."""
        if self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value, group=self.control)
        return out

    def agree(self, error: Exception | None) -> None:
        """Raise ``error``; where another process has one and this one has none, raise that. Ends all together."""
        errors = self.gather(error)
        for e in errors:
            if e is not None:
                raise error if error is not None else e

    def close(self) -> None:
        """Leave the process group that `from_env` joined."""
        if self.watch is not None:
            self.watch.stop()
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()
            self.owns_group = False


class Gradients:
    """Backward passes of a step; gradients are means over the processes, sent while the backward pass still runs.

    A parameter without gradient here but with one elsewhere counts as zero here; one without gradient everywhere stays
    without, so that the optimiser treats it as in a single process. DDP's ``find_unused_parameters`` would do the same,
    but it reads from the device which ones these are, and so waits at every step. So all parameters are tied to the
    loss, and the host counts. Where all steps are alike (no images, one length of clips, no micro-batches) DDP is told
    so (``static_graph``).

    With ``in_place`` gradients keep their addresses, as CUDA graphs that add to them need, and are sent after the last
    backward pass, all at once.

    Args:
        params: what is trained, in the same order in every process.
        world: the processes.
        in_place: see above.
        static: every step has one backward pass, through the same graph.
    """

    def __init__(self, params: list[nn.Parameter], world: Distributed, *, in_place: bool = False, static: bool = False):
        self.params, self.world = params, world
        self.used: set[Tensor] = set()  # those that got a gradient in this step
        self.ddp: DistributedDataParallel | None = None
        self.kept: dict[torch.dtype, Tensor] = {}
        self.views: list[Tensor] = []
        if world.world > 1 or in_place:
            for p in params:
                p.register_post_accumulate_grad_hook(self._note)
        if in_place:
            self.views = self._views()
        elif world.world > 1:
            self.ddp = DistributedDataParallel(_Tied(params), gradient_as_bucket_view=True, static_graph=static)

    def _views(self) -> list[Tensor]:
        """For each parameter its part of one tensor per dtype, ``kept``."""
        views: dict[Tensor, Tensor] = {}
        for dtype in dict.fromkeys(p.dtype for p in self.params):
            own = [p for p in self.params if p.dtype == dtype]
            self.kept[dtype] = torch.zeros(sum(p.numel() for p in own), dtype=dtype, device=own[0].device)
            pieces = self.kept[dtype].split([p.numel() for p in own])
            views.update((p, piece.view_as(p)) for p, piece in zip(own, pieces))
        return [views[p] for p in self.params]

    def begin(self) -> None:
        """Before the backward passes of a step: no parameter has a gradient, or all have zeros in their place."""
        self.used.clear()
        for kept in self.kept.values():
            kept.zero_()
        for n, p in enumerate(self.params):
            p.grad = self.views[n] if self.views else None

    @contextmanager
    def apart(self) -> Generator[None]:
        """What gets a gradient in here is in ``used``, alone; afterwards it is as before."""
        before, self.used = self.used, set()
        try:
            yield
        finally:
            self.used = before

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of ``loss``. With the ``last`` one of a step all that was added is averaged."""
        if self.ddp is None:
            if loss.requires_grad:
                loss.backward()
            return
        with nullcontext() if last else self.ddp.no_sync():
            self.ddp(loss).backward()

    def _note(self, p: Tensor) -> None:
        if p.grad is not None:  # it is asked also where the gradient is undefined
            self.used.add(p)

    def finish(self, stop: bool) -> bool:
        """Take away the zeros that stand for no gradient; returns whether any process asked to ``stop``."""
        if self.ddp is None and not self.views:
            return stop
        for kept in self.kept.values():
            self.world.mean_(kept)
        stop, *used = self.world.any([stop, *(p in self.used for p in self.params)])
        for p, is_used in zip(self.params, used):
            if not is_used:
                p.grad = None
        self.used.clear()
        return stop


class _Tied(nn.Module):
    """A loss as it is, with all parameters in its graph, so that DDP gets word of each in every backward pass."""

    def __init__(self, params: list[nn.Parameter]):
        super().__init__()
        self.params = nn.ParameterList(params)

    def forward(self, loss: Tensor) -> Tensor:
        return _Tie.apply(loss, *self.params)  # pyright: ignore[reportReturnType]  # apply has no type of its own


class _Tie(torch.autograd.Function):
    """The identity of its first argument; the others get no gradient, but their turn."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *params: Tensor) -> Tensor:
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0], *[None] * (len(ctx.needs_input_grad) - 1)


def _env_int(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} in the environment must be an integer, as torchrun sets it") from None
