"""What the cases share: inputs of the published step (16 x 224 x 224, 8 x 14 x 14 tokens, D = 4 x 768)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from vjepa_fast import ops
from vjepa_fast.ops import _backend

GRID, TUBELET, PATCH, FRAMES, SIDE = (8, 14, 14), 2, 16, 16, 224
N = GRID[0] * GRID[1] * GRID[2]
LEVELS, E, HEADS = 4, 768, 12
SPECS = (ops.BlockSpec(), ops.BlockSpec(num_blocks=2, spatial_scale=(0.7, 0.7)))
MEAN, STD = ops.IMAGENET_MEAN, ops.IMAGENET_STD


@dataclass
class Case:
    """One op on one shape.

    Attributes:
        functions: provider -> function of no arguments. The first output (a tensor or a list) is compared and, if
            ``leaves`` are given, differentiated.
        leaves: the tensors that receive gradient.
        floor_bytes: forward; ``floor_full`` forward and backward. None: something else than memory is the limit.
        compare: whether the outputs of the providers must agree (masks are drawn by other generators).
        compile_: function to be put under torch.compile as the provider ``compiled``; None: there is none.
        recorded: ``compile_`` takes the ``leaves`` and is compiled as the graph that `record` makes of it.
        on_host: the providers that work on the CPU wherever the inputs are; a GPU's clock does not see them.
    """

    op: str
    shape: str
    functions: dict[str, Callable[[], object]]
    leaves: list[Tensor] = field(default_factory=list)
    floor_bytes: int | None = None
    floor_full: int | None = None
    compare: bool = True
    compile_: Callable[..., object] | None = None
    recorded: bool = False
    atol: float = 1e-4
    on_host: tuple[str, ...] = ()
    compiled: Callable[[], object] | None = field(default=None, init=False)  # what came of compile_


def record(fn: Callable[..., object], args: Sequence[Tensor]) -> torch.fx.GraphModule:
    """``fn`` as one graph of tensor operations, as it ran on ``args``.

    For functions that build Python objects on the way, such as the states and row calls of the objectives: a compiler
    that is given the graph does not have to rebuild them. Gradients are cut in the graph where ``fn`` cuts them.
    """
    graph = make_fx(fn, pre_dispatch=True)(*args)
    graph.graph.eliminate_dead_code()  # questions about dtypes are recorded too, and are no operations on tensors
    graph.recompile()
    return graph


def forced(backend: str, fn: Callable[[], object]) -> Callable[[], object]:
    def run():
        with ops.use_backend(backend):
            return fn()

    return run


def eager_code(op: str) -> Callable:
    """The eager implementation itself, which torch.compile can look into, as it cannot into a custom op."""
    return _backend.implementation(op, "eager")


class Inputs:
    """Clips, masks and features of one batch; made on demand, always the same."""

    def __init__(self, batch: int, device: torch.device, dtype: torch.dtype):
        self.batch, self.device, self.dtype = batch, device, dtype
        self.size = torch.finfo(dtype).bits // 8

    def randn(self, *shape: int, seed: int, grad: bool = False) -> Tensor:
        g = torch.Generator(self.device).manual_seed(seed)
        x = torch.randn(shape, generator=g, device=self.device, dtype=torch.float32).to(self.dtype)
        return x.requires_grad_(grad)

    def clip(self) -> Tensor:
        g = torch.Generator(self.device).manual_seed(1)
        shape = (self.batch, 3, FRAMES, SIDE, SIDE)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device, generator=g)

    def masks(self) -> tuple[list[Tensor], list[Tensor]]:
        drawn = ops.sample_block_masks(self.batch, GRID, SPECS, seed=0, step=3, device=self.device)
        return drawn.trim()
