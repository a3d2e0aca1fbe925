"""Launchers of packed_attention, tensors in and tensors out, and their tiles. The kernels are in ``_packed_attention``.

Legend: B batch, K tokens, H heads, D channels of a head, E = H*D, R <= D turned channels, S segments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from vjepa_fast.kernels import _packed_attention as device


class Tiles(NamedTuple):
    """Queries and keys of a tile, warps, and tiles on their way at a time."""

    queries: int
    keys: int
    warps: int
    stages: int


class Passes(NamedTuple):
    """The tiles of the three passes."""

    forward: Tiles
    backward_q: Tiles
    backward_kv: Tiles


# (architecture, bits of a number, most channels of a head) -> tiles. Chosen by registers (none spilled), shared memory
# and the programs that an SM then holds, not by time: benchmarks/bench_attention.py --tune measures on a GPU. 80 is for
# cards with 100 KB of shared memory, too.
TILES = {
    (80, 16, 32): Passes(Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 3), Tiles(64, 128, 8, 2)),
    (80, 16, 64): Passes(Tiles(128, 64, 8, 3), Tiles(64, 32, 4, 3), Tiles(32, 128, 8, 3)),
    (80, 16, 128): Passes(Tiles(128, 32, 8, 2), Tiles(128, 16, 8, 2), Tiles(32, 32, 8, 2)),
    (90, 16, 32): Passes(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 2)),
    (90, 16, 64): Passes(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 2)),
    (90, 16, 128): Passes(Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(32, 64, 8, 2)),
    (100, 16, 32): Passes(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 2)),
    (100, 16, 64): Passes(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 128, 8, 2)),
    (100, 16, 128): Passes(Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)),
}
for _arch in (80, 90, 100):  # products of float32 numbers without tensor cores, as exact as elsewhere
    TILES[_arch, 32, 32] = Passes(*[Tiles(32, 32, 8, 2)] * 3)
    TILES[_arch, 32, 64] = Passes(Tiles(16, 32, 8, 2), Tiles(16, 16, 8, 2), Tiles(16, 16, 8, 2))
SHARE = {32: 1}  # most channels of a head -> eighths of the exponentials by polynomial, in half precision


def key(arch: int, bits: int, channels: int) -> tuple[int, int, int]:
    """That of TILES."""
    return arch, bits, 32 if channels <= 32 else triton.next_power_of_2(channels)


def architecture() -> int:
    """Whose tiles the current device takes; interpreted, those of 90."""
    if triton.knobs.runtime.interpret:
        return 90
    major = triton.runtime.driver.active.get_current_target().arch // 10
    return {9: 90, 10: 100, 11: 100}.get(major, 80)


def _width(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))


def _choice(name: str, arch: int, bits: int, heads: int, channels: int, rotated: int) -> tuple[dict, Tiles]:
    """The compile-time arguments of a pass, and its tiles."""
    at = key(arch, bits, channels)
    tiles = getattr(TILES[at], name)
    share = SHARE.get(at[2], 0) if bits == 16 else 0
    blocks = dict(BLOCK_M=tiles.queries, BLOCK_N=tiles.keys, BLOCK_D=_width(channels))
    return dict(H=heads, D=channels, R=rotated, SHARE=share, **blocks), tiles


def _turning(heads: int, channels: int, rotated: int, parts: int) -> dict:
    """The compile-time arguments of ``packed_attention_turn``: of the keys, or of queries and keys."""
    width = _width(channels)
    blocks = dict(BLOCK=2048 // width, BLOCK_D=width)
    return dict(H=heads, D=channels, R=rotated, FIRST=2 - parts, PARTS=parts, **blocks)


class _Call:
    """What the passes of a call share."""

    def __init__(self, qkv: torch.Tensor, table: torch.Tensor | None, offsets: torch.Tensor, heads: int):
        self.qkv, self.table, self.offsets, self.heads = qkv, table, offsets, heads
        b, k, e3 = qkv.shape
        self.rows, self.segments, self.channels = b * k, offsets.numel() - 1, e3 // (3 * heads)
        self.rotated = 0 if table is None else table.shape[-1]
        self.period = k if table is None or table.dim() == 3 else self.rows
        self.arch = architecture()

    def turned(self, parts: int) -> torch.Tensor:
        """[rows, parts*E]: keys, or queries and keys, turned by their positions; qkv itself where they have none."""
        if not self.rotated:
            return self.qkv
        choice = _turning(self.heads, self.channels, self.rotated, parts)
        out = self.qkv.new_empty(self.rows, parts * self.heads * self.channels)
        grid = (triton.cdiv(self.rows, choice["BLOCK"]),)
        device.packed_attention_turn[grid](self.qkv, self.table, out, self.rows, self.period, **choice, num_warps=4)
        return out

    def launch(self, name: str, turned: torch.Tensor, *tensors: torch.Tensor) -> None:
        bits = 8 * self.qkv.element_size()
        choice, tiles = _choice(name, self.arch, bits, self.heads, self.channels, self.rotated)
        block = tiles.keys if name == "backward_kv" else tiles.queries
        grid = (self.rows // block + self.segments + 1, self.heads)
        table = tensors[-1] if self.table is None else self.table
        numbers = self.rows, self.segments, self.period
        getattr(device, f"packed_attention_{name}")[grid](
            self.qkv,
            turned,
            table,
            self.offsets,
            *tensors,
            *numbers,
            **choice,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )


def forward(
    qkv: torch.Tensor, table: torch.Tensor | None, offsets: torch.Tensor, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result [B,K,E] and ``lse`` float32 [H,B,K] of ``ops.packed_attention``; everything contiguous."""
    b, k, e3 = qkv.shape
    out, lse = qkv.new_empty(b, k, e3 // 3), qkv.new_empty(heads, b, k, dtype=torch.float32)
    if b * k:
        call = _Call(qkv, table, offsets, heads)
        call.launch("forward", call.turned(1), out, lse)
    return out, lse


def backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    table: torch.Tensor | None,
    offsets: torch.Tensor,
    heads: int,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> torch.Tensor:
    """The gradient of qkv, packed like it; everything contiguous."""
    dqkv = torch.empty_like(qkv)
    if qkv.numel():
        call, delta = _Call(qkv, table, offsets, heads), torch.empty_like(lse)
        turned = call.turned(2)
        call.launch("backward_q", turned, out, grad, lse, delta, dqkv)
        call.launch("backward_kv", turned, grad, lse, delta, dqkv)
    return dqkv


def variants() -> dict[str, dict]:
    """The builds that benchmarks/aot.py compiles, each for the architecture whose tiles it has."""
    found = {}
    for arch, bits, most in TILES:
        if bits == 32 and arch != 90:
            continue  # the same tiles
        dtype = "fp32" if bits == 32 else "bf16"
        heads, channels, rotated = {32: (12, 32, 30), 64: (12, 64, 60), 128: (16, 88, 84)}[most]
        for name in Passes._fields:
            choice, tiles = _choice(name, arch, bits, heads, channels, rotated)
            options = dict(num_warps=tiles.warps, num_stages=tiles.stages, arch=arch)
            found[f"{name}_{channels}_{dtype}_{arch}"] = _variant(
                getattr(device, f"packed_attention_{name}"), dtype, choice, **options
            )
    choice = _turning(12, 64, 60, 2)
    found["turn_64_bf16"] = _variant(device.packed_attention_turn, "bf16", choice, num_warps=4)
    return found


def _variant(fn, dtype: str, constexprs: dict, **options) -> dict:
    known = dict.fromkeys(("table_ptr", "lse_ptr", "delta_ptr"), "*fp32") | {"offsets_ptr": "*i32"}
    names = [n for n in fn.arg_names if n not in constexprs]
    signature = {n: known.get(n, f"*{dtype}") if n.endswith("_ptr") else "i32" for n in names}
    aligned = [n for n in names if n.endswith("_ptr")]
    return dict(fn=fn, constexprs=constexprs, aligned=aligned, signature=signature, **options)
