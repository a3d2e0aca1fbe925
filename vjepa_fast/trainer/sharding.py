"""``runtime.parallel: fsdp``: weights, gradients, moments and the average of the weights cut over the processes, so
that each holds a part of them and gathers a block while it computes with it (FSDP2, torch's ``fully_shard``).

The engine is PyTorch's. What is added here: which modules are cut (each block of encoder, predictor and target, then
what is left of each), the norm of gradients, and checkpoints that hold whole tensors, so that
they load on any number of processes, and without FSDP. Learnable heads of the loss are small and stay whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vjepa_fast import ops
from vjepa_fast.config.schema import Config
from vjepa_fast.errors import ConfigError
from vjepa_fast.models.parts import is_cut, local

if TYPE_CHECKING:
    from vjepa_fast.trainer.distributed import Distributed


def wanted(cfg: Config, world: Distributed) -> bool:
    """Whether weights are cut; one process alone has nothing to share."""
    return cfg.runtime.parallel == "fsdp" and world.world > 1


def check(cfg: Config) -> None:
    """Refuse what ``runtime.parallel: fsdp`` does not support, with every reason in one line.

    Raises:
        ConfigError: likewise.
    """
    run, reasons = cfg.runtime, list[str]()
    if run.parallel != "fsdp":
        return
    if cfg.method != "vjepa":
        reasons.append(f"method: {cfg.method} has another step")
    if cfg.optimization.name != "adamw":
        reasons.append(f"optimization.name: {cfg.optimization.name} works on whole matrices")
    if cfg.target.mode != "ema":
        why = "sends a step through the encoder twice" if cfg.target.mode == "online" else "is not supported"
        reasons.append(f"target.mode: {cfg.target.mode} {why}")
    if cfg.monitor.probe is not None:
        reasons.append("monitor.probe reads the encoder in one process alone")
    if len(set(cfg.data.dataset_fpcs)) > 1:
        reasons.append(
            "data.dataset_fpcs: batches of several clip lengths differ between processes, which gather together"
        )
    if cfg.img_data is not None and cfg.img_data.rank_ratio is not None:
        reasons.append("img_data.rank_ratio: processes with images gather other weights than those with videos")
    if run.dtype == "float16":
        reasons.append("runtime.dtype: float16 scales the loss; use bfloat16")
    if run.fp8:
        reasons.append("runtime.fp8 keeps scales of whole weights")
    if run.cuda_graphs in (True, "target"):
        reasons.append("runtime.cuda_graphs: weights have no place of their own between steps")
    if run.compile not in (False, "auto"):
        reasons.append("runtime.compile has not been tried with it")
    if run.epilogues not in (False, "auto"):
        reasons.append("runtime.epilogues reads the weights of all blocks at once")
    if reasons:
        raise ConfigError(f"runtime.parallel: fsdp is not supported here: {'; '.join(reasons)}; change it or use ddp")


def shard(
    world: Distributed, device: torch.device, dtype: torch.dtype, *models: tuple[nn.Module, nn.ModuleList]
) -> None:
    """Cut models in place: each of the blocks named with one by itself, then what is left of it.

    Weights and sums of gradients are float32; under bfloat16 weights, also of LayerNorms, travel and compute in it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (world.world,))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # the predictor returns views, which nobody changes in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    for model, blocks in models:
        # also the last one, and a target without backward pass: what stays gathered would not follow the average
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def norm(grads: Iterable[Tensor]) -> Tensor:
    """L2 norm over gradients [] of which some are cut: those count in all processes together, the others once."""
    grads = list(grads)
    cut, rest = [local(g) for g in grads if is_cut(g)], [g for g in grads if not is_cut(g)]
    if not cut:
        return ops.total_norm(rest)
    own = [g for g in cut if g.numel()]
    square = ops.total_norm(own).square() if own else torch.zeros((), device=cut[0].device)
    dist.all_reduce(square)  # all processes share in what is cut
    return (square + ops.total_norm(rest).square()).sqrt() if rest else square.sqrt()


def whole(state: Any, *, keep: bool) -> Any:
    """A state dict with every cut tensor gathered, one after another, onto the CPU; a collective of all processes.

    Where not ``keep`` only the gathering is done: the result is of no use.
    """
    if is_cut(state):
        full: Tensor = state.full_tensor()
        return full.cpu() if keep else full.new_empty(0)
    if isinstance(state, Mapping):
        return {key: whole(value, keep=keep) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value, keep=keep) for value in state]
    return state


class ShardedGradients:
    """Backward passes of a step on weights that are cut; as `distributed.Gradients`.

    FSDP sums the gradients of a block over the processes, each keeping its part, while the backward pass goes on with
    the block before, after every micro-batch. The gradients of what is whole are averaged behind the last one.
    """

    def __init__(self, params: list[nn.Parameter], world: Distributed):
        self.params, self.world = params, world
        self.whole = [p for p in params if not is_cut(p)]
        self.used: set[Tensor] = set()

    def begin(self) -> None:
        """Before the backward passes of a step."""
        for p in self.params:
            p.grad = None

    @contextmanager
    def apart(self) -> Generator[None]:
        """Nothing is counted here."""
        yield

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of ``loss``."""
        loss.backward()

    def finish(self, stop: bool) -> bool:
        """Average what is whole; returns whether any process asked to ``stop``."""
        grads = [p.grad for p in self.whole if p.grad is not None]
        if grads:
            flat = torch.cat([g.reshape(-1) for g in grads])
            self.world.mean_(flat)
            for g, part in zip(grads, flat.split([g.numel() for g in grads])):
                g.copy_(part.view_as(g))
        return self.world.any([stop])[0]
