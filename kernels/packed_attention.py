"""Launchers of packed_attention, tensors in and tensors out, and their tiles. The kernels are in ``_packed_attention``.

Legend: B batch, K tokens, H heads, D channels of a head, E = H*D, R <= D turned channels, S segments.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from vjepa_fast.kernels import _packed_attention as device

MOST_CHANNELS = 128  # of a head: wider ones leave no registers


class Tiles(NamedTuple):
    """Queries and keys of a tile, warps, and tiles on their way at a time."""

    queries: int
    keys: int
    warps: int
    stages: int


# (pass, architecture, bits of a number, channels of a head to the next power of 2) -> tiles. Chosen by the registers and
# the shared memory of builds (benchmarks/aot.py), not by time: benchmarks/bench_attention.py --tune measures on a GPU.
# 80 is also for cards with 100 KB of shared memory.
TILES: dict[tuple[str, int, int, int], Tiles] = {}
for _arch in (80, 90, 100):
    for _width in (16, 32, 64, 128):
        for _pass in ("forward", "backward_q", "backward_kv"):
            TILES[_pass, _arch, 16, _width] = Tiles(128, 64, 8, 3) if _pass != "backward_kv" else Tiles(32, 128, 8, 3)
            TILES[_pass, _arch, 32, _width] = Tiles(32, 32, 4, 2)
SHARES = {16: 1, 32: 1}  # channels -> eighths of the exponentials by polynomial, in half precision


def _width(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))


def _choice(name: str, arch: int, bits: int, heads: int, channels: int, rotated: int) -> tuple[dict, Tiles]:
    """The compile-time arguments of a pass, and its tiles."""
    width = _width(channels)
    tiles = TILES[name, arch, bits, width]
    share = SHARES.get(width, 0) if bits == 16 else 0
    blocks = dict(BLOCK_M=tiles.queries, BLOCK_N=tiles.keys, BLOCK_D=width)
    return dict(H=heads, D=channels, R=rotated, SHARE=share, **blocks), tiles


def _turning(heads: int, channels: int, rotated: int, parts: int) -> dict:
    """The compile-time arguments of ``turn``: of the keys, or of queries and keys."""
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
        major = torch.cuda.get_device_capability(qkv.device)[0] if qkv.is_cuda else 9
        self.arch = {9: 90, 10: 100, 11: 100}.get(major, 80)

    def turned(self, parts: int) -> torch.Tensor:
        """[rows, parts*E]: keys, or queries and keys, turned by their positions; qkv itself where they have none."""
        if not self.rotated:
            return self.qkv
        choice = _turning(self.heads, self.channels, self.rotated, parts)
        out = self.qkv.new_empty(self.rows, parts * self.heads * self.channels)
        grid = (triton.cdiv(self.rows, choice["BLOCK"]),)
        device.turn[grid](self.qkv, self.table, out, self.rows, self.period, **choice, num_warps=4)
        return out

    def launch(self, name: str, turned: torch.Tensor, *tensors: torch.Tensor) -> None:
        bits = 8 * self.qkv.element_size()
        choice, tiles = _choice(name, self.arch, bits, self.heads, self.channels, self.rotated)
        block = tiles.keys if name == "backward_kv" else tiles.queries
        grid = (self.rows // block + self.segments + 1, self.heads)
        table = tensors[-1] if self.table is None else self.table
        numbers = self.rows, self.segments, self.period
        getattr(device, name)[grid](
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
