"""Several processes under ``torchrun``: rank and world from the environment, gradients averaged after backward.

Every process draws its own slice of the global batch, so the loss is that of one process with the whole batch,
apart from the truncation of masks, which is per process.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from vjepa_fast.errors import ConfigError

BUCKET_BYTES = 32 << 20


class Distributed:
    """One process of ``world``. With ``world == 1`` every method is a no-op and no process group exists."""

    def __init__(self, rank: int = 0, world: int = 1, local_rank: int = 0):
        self.rank, self.world, self.local_rank = rank, world, local_rank
        self.control = None  # gloo group for the few host-side decisions, so that the device is never waited for
        self.owns_group = False

    @staticmethod
    def local_rank_from_env() -> int:
        return _env_int("LOCAL_RANK", 0)

    @classmethod
    def from_env(cls, device_type: str) -> Distributed:
        """Read ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``; join the group (nccl on CUDA, gloo elsewhere) if > 1."""
        world = _env_int("WORLD_SIZE", 1)
        self = cls(_env_int("RANK", 0), world, _env_int("LOCAL_RANK", 0))
        if world > 1:
            self.owns_group = not dist.is_initialized()
            if self.owns_group:
                dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
            self.control = dist.new_group(backend="gloo")
        return self

    @property
    def main(self) -> bool:
        return self.rank == 0

    def average_gradients(self, params: list[torch.nn.Parameter], stop: bool) -> bool:
        """Average ``.grad`` over the processes, in buckets; returns whether any process asked to ``stop``.

        A parameter without gradient here but with one elsewhere counts as zero here; one without gradient
        everywhere stays without, so that the optimiser treats it as in a single process.
        """
        if self.world == 1:
            return stop
        flags = torch.tensor([stop, *(p.grad is not None for p in params)], dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.control)
        used = [p for p, flag in zip(params, flags[1:].tolist()) if flag]
        for p in used:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for bucket in _buckets([p.grad for p in used]):
            flat = torch.cat([g.reshape(-1) for g in bucket]).div_(self.world)
            dist.all_reduce(flat)
            pieces = flat.split([g.numel() for g in bucket])
            torch._foreach_copy_(bucket, [piece.view_as(g) for piece, g in zip(pieces, bucket)])
        return bool(flags[0])

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the processes; NaN anywhere is NaN everywhere."""
        if self.world > 1:
            values = values / self.world
            dist.all_reduce(values)
        return values

    def gather(self, value: object) -> list:
        """The small picklable ``value`` of every process, in rank order, on every process."""
        if self.world == 1:
            return [value]
        out: list = [None] * self.world
        dist.all_gather_object(out, value, group=self.control)
        return out

    def agree(self, error: Exception | None) -> None:
        """Raise ``error``; where another process has one and this one has none, raise that. Ends all together."""
        errors = self.gather(error)
        for e in errors:
            if e is not None:
                raise error if error is not None else e

    def close(self) -> None:
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()
            self.owns_group = False


def _env_int(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} in the environment must be an integer, as torchrun sets it") from None


def _buckets(grads: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Runs of gradients of one dtype and at most ``BUCKET_BYTES`` together (a larger one stands alone)."""
    out: list[list[torch.Tensor]] = []
    size = 0
    for g in grads:
        nbytes = g.numel() * g.element_size()
        if not out or out[-1][0].dtype != g.dtype or size + nbytes > BUCKET_BYTES:
            out.append([])
            size = 0
        out[-1].append(g)
        size += nbytes
    return out
