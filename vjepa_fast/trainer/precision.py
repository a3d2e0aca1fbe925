"""In what precision a run computes: ``runtime.dtype`` (what ``auto`` means here) and ``runtime.fp8``."""

from __future__ import annotations

import functools
import math
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from vjepa_fast.config.schema import Config
from vjepa_fast.errors import ConfigError
from vjepa_fast.layers import fp8
from vjepa_fast.layers.block import Block
from vjepa_fast.layers.linear import Linear
from vjepa_fast.models import rope
from vjepa_fast.models.vit import SIZES
from vjepa_fast.trainer.distributed import Distributed

NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GAIN = 1.2  # by which bfloat16 has to be faster on a CPU to be taken
BUDGET_S = 1.0
FLOP = 2e10  # of a try: a fraction of a second


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 autocast on CUDA and float32 elsewhere; `choose` measures on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return NAMES[name]


def autocast(device: torch.device, dtype: torch.dtype, cache: bool = True) -> AbstractContextManager[object]:
    """The precision in which models run; ``cache``: keep casted weights until it ends."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype, cache_enabled=cache)


def choose(
    cfg: Config, device: torch.device, world: Distributed, saved: dict[str, Any] | None = None
) -> tuple[torch.dtype, list[str]]:
    """The dtype of a run, the same in all its processes, and notes about it for the user.

    ``auto`` on a CPU takes the faster one, by `measure`. A run that goes on from the checkpoint ``saved`` keeps its
    dtype as long as the kind of device is the same; a note reports a change.
    """
    name = cfg.runtime.dtype
    if name != "auto":
        return NAMES[name], []
    before, then = _before(saved)
    if before is not None and then == device.type:
        return NAMES[before], []
    dtype, notes = resolve_dtype(name, device), []
    if device.type == "cpu" and saved is None:
        dtype, notes = _faster(cfg, world)
    if before is not None and NAMES[before] != dtype:
        notes.append(
            f"runtime.dtype: auto was {before} on {then} and is {_name(dtype)} on {device.type}; "
            f"set runtime.dtype={before} to keep it"
        )
    return dtype, notes


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _before(saved: dict[str, Any] | None) -> tuple[str | None, str]:
    """Dtype and kind of device of the run that wrote this checkpoint, as far as it says."""
    versions = saved["versions"] if saved is not None else {}
    name = versions.get("dtype")
    return name if name in NAMES else None, versions.get("device", "").split(" ")[0].split(":")[0]


def _faster(cfg: Config, world: Distributed) -> tuple[torch.dtype, list[str]]:
    work = _work(cfg)
    if work is None:
        return torch.float32, []  # building the model will say what is wrong
    single, half = world.gather(measure(work, torch.get_num_threads()))[0]  # the first process decides for all
    faster = half * GAIN < single
    note = (
        f"runtime.dtype: auto is {'bfloat16' if faster else 'float32'} on this CPU (a block of width {work.width}: "
        f"{1e3 * single:.3g} ms in float32, {1e3 * half:.3g} ms in bfloat16)"
    )
    return torch.bfloat16 if faster else torch.float32, [note]


class Work(NamedTuple):
    """A block of the run's encoder and the tokens it is tried on, [batch, T*H*W of the grid]."""

    width: int
    heads: int
    mlp_ratio: float
    use_silu: bool
    rope: tuple[str, int | None] | None  # variant and base grid
    batch: int
    grid: tuple[int, int, int]


def _work(cfg: Config) -> Work | None:
    """The run's own batch, cut to what a second allows; None for a model that cannot be built."""
    m, data, size = cfg.model, cfg.data, SIZES.get(cfg.model.model_name)
    width, heads = m.embed_dim or (size and size.embed_dim), m.num_heads or (size and size.num_heads)
    if not width or not heads or width % heads or (m.use_rope and not rope.rotated_channels(width // heads)):
        return None
    side = max(1, data.crop_size // data.patch_size)
    most = max(1, int(FLOP / (72 * width**2)) // side**2)  # frames of tokens: 24 E^2 forward, twice that backward
    t = min(most, max(1, max(data.dataset_fpcs) // data.tubelet_size))
    base = rope.base_grid(data.patch_size) if m.interpolate_rope else None
    positions = (m.rope_variant, base) if m.use_rope else None
    batch, mlp_ratio = min(data.batch_size, max(1, most // t)), size.mlp_ratio if size else 4.0
    return Work(width, heads, mlp_ratio, m.use_silu, positions, batch, (t, side, side))


@functools.cache
def measure(work: Work, threads: int) -> tuple[float, float]:
    """Seconds that the block takes on this CPU, without gradient and then forward and backward: float32, bfloat16.

    The least of up to 20 each, by turns; a second in all, unless one of each already takes longer. ``threads`` is there
    for the cache. Draws no random number of the caller's.
    """
    tokens = math.prod(work.grid)
    with torch.random.fork_rng(devices=[]):
        block = Block(work.width, work.heads, work.mlp_ratio, work.use_silu, True)
        x = torch.randn(work.batch, tokens, work.width, requires_grad=True)
    table = None
    if work.rope is not None:
        table = rope.rows(x, work.grid, None, work.width // work.heads, *work.rope)

    def once(dtype: torch.dtype) -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            with torch.no_grad():
                block(x, table)  # as the target encoder
            with torch.enable_grad():
                out = block(x, table)
        out.backward(torch.ones_like(out))
        return time.perf_counter() - start

    begun = time.perf_counter()
    best: dict[torch.dtype, float] = {}
    for round_ in range(21):
        for dtype in (torch.float32, torch.bfloat16):
            taken = once(dtype)
            if round_:  # the first allocates and chooses kernels
                best[dtype] = min(taken, best.get(dtype, taken))
        if round_ and time.perf_counter() - begun > BUDGET_S:
            break
    return best[torch.float32], best[torch.bfloat16]


def enable_fp8(device: torch.device, dtype: torch.dtype, *modules: nn.Module) -> None:
    """Let the linear layers of the modules' blocks compute as `ops.fp8` says.

    Raises:
        ConfigError: this device, dtype or width cannot.
    """
    reasons = fp8.objections(device)
    if dtype != torch.bfloat16:
        reasons.append(f"needs runtime.dtype=bfloat16, got {_name(dtype)}")
    blocks = [block for module in modules for block in module.modules() if isinstance(block, Block)]
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, Linear)]
    odd = {(x.in_features, x.out_features) for x in layers if x.in_features % 16 or x.out_features % 16}
    if odd:
        found = ", ".join(f"{i} -> {o}" for i, o in sorted(odd))
        reasons.append(f"needs widths that are multiples of 16, got layers of {found}")
    if reasons:
        raise ConfigError(f"runtime.fp8: {'; '.join(reasons)}; set runtime.fp8=false")
    for layer in layers:
        layer.fp8 = True
