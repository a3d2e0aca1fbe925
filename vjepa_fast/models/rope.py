"""Angles of 3-D rotary position embedding and fixed sine-cosine position embedding.

Legend: B batch, K tokens, d channels of a head, R = 3 * 2*((d//3)//2) rotated channels, grid (T,H,W), N = T*H*W.
Token id n = (t*H + h)*W + w. Each axis rotates R/3 channels with base 10000; channels from R on are left alone.
"""

from __future__ import annotations

from functools import cache

import torch

from vjepa_fast import ops

Grid = tuple[int, int, int]


def base_grid(patch_size: int) -> int:
    """Patches per side that ``interpolate_rope`` maps every grid to: 16 at patch 16, 18 at patch 14."""
    return 18 if patch_size == 14 else round(256 / patch_size)


def rotated_channels(head_dim: int) -> int:
    """R, the number of rotated channels of a head."""
    return 3 * 2 * ((head_dim // 3) // 2)


def as_rotor(variant: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether to hold the table as complex rotors: for float64, and on a CPU where ``rope3d`` would run eager code.

    There they are the fastest form, but one that the compiler cannot fuse.
    """
    if variant != "v2.1":
        return False
    if dtype == torch.float64:
        return True
    if device.type not in ("cpu", "meta") or torch.compiler.is_compiling():
        return False
    choice = ops.current_backend()
    return choice == "eager" or (choice == "auto" and ops.backend_report()["rope3d"]["cpp"] != "")


def rope_table(
    grid: Grid, head_dim: int, variant: str, base: int | None, dtype: torch.dtype, device: torch.device, rotor: bool
) -> torch.Tensor:
    """Rotation of every token of a grid (V-JEPA 2, arXiv:2506.09985, section 2.1; computed once per grid and kept).

    Args:
        grid: (T,H,W).
        head_dim: d, even.
        variant: ``v2.1`` gives both channels of a pair (2i, 2i+1) one angle; ``v2`` repeats the frequencies of an axis
            in halves, as the V-JEPA 2 weights were trained.
        base: with ``interpolate_rope``, the patches per side that h and w are stretched to; None leaves them.
        dtype: float32 or float64, of the angles whatever autocast says.
        device: of the result.
        rotor: see ``as_rotor``.

    Returns:
        With ``rotor`` complex [N, d/2], the unit rotor of each channel pair (1 where not rotated).
        Otherwise float32 [N, 2, R], cosines and sines by channel: what ``ops.rope3d`` takes.
    """
    if torch.compiler.is_compiling():  # part of the graph: a few small kernels, and the grid may be symbolic
        return _make_table(grid, head_dim, variant, base, dtype, device, rotor)
    return _kept_table(grid, head_dim, variant, base, dtype, device, rotor)


@cache  # a captured CUDA graph reads it at its address: never dropped
def _kept_table(
    grid: Grid, head_dim: int, variant: str, base: int | None, dtype: torch.dtype, device: torch.device, rotor: bool
) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return _make_table(grid, head_dim, variant, base, dtype, torch.device("cpu"), rotor).to(device)


def _make_table(
    grid: Grid, head_dim: int, variant: str, base: int | None, dtype: torch.dtype, device: torch.device, rotor: bool
) -> torch.Tensor:
    angles = _angles(grid, head_dim, base, device)
    if rotor:
        angles = torch.nn.functional.pad(angles.flatten(1), (0, head_dim // 2 - rotated_channels(head_dim) // 2))
        table = torch.polar(torch.ones_like(angles), angles)
        return table.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
    angles = angles.repeat(1, 1, 2) if variant == "v2" else angles.repeat_interleave(2, -1)
    angles = angles.flatten(1)
    return torch.stack((angles.cos(), angles.sin()), 1).to(torch.float32)


def _angles(grid: Grid, head_dim: int, base: int | None, device: torch.device) -> torch.Tensor:
    """[N, 3, R/6], float64 where the device has it: position times frequency, for the axes t, h, w."""
    exact = {"dtype": torch.float32 if device.type == "mps" else torch.float64, "device": device}

    def axis(n: int, stretch: bool) -> torch.Tensor:
        scale = (base - 1) / (n - 1) if stretch and base is not None and n > 1 else 1.0
        return torch.arange(n, **exact) * scale

    pairs = rotated_channels(head_dim) // 6
    freq = 10000.0 ** -(torch.arange(pairs, **exact) / pairs)
    positions = torch.cartesian_prod(*(axis(n, i > 0) for i, n in enumerate(grid)))
    return positions[:, :, None] * freq


def rows(
    x: torch.Tensor, grid: Grid, idx_BK: torch.Tensor | None, head_dim: int, variant: str, base: int | None
) -> torch.Tensor:
    """The rows of ``rope_table`` for the tokens ``x`` at ids [B,K], or for all tokens of the grid without ids."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    table = rope_table(grid, head_dim, variant, base, dtype, x.device, as_rotor(variant, dtype, x.device))
    return table if idx_BK is None else table[idx_BK]


def unrotated_first(table: torch.Tensor) -> torch.Tensor:
    """Rows [..,K,..] of `rope_table` with one before them that rotates nothing, for a token without a position."""
    if table.is_complex():  # [K, d/2] or [B,K,d/2]
        return torch.cat((torch.ones_like(table[..., :1, :]), table), -2)
    row = torch.zeros_like(table[..., :1, :, :])  # [K,2,R] or [B,K,2,R]
    row[..., 0, :].fill_(1.0)
    return torch.cat((row, table), -3)


def sincos_3d(embed_dim: int, grid: Grid, uniform_power: bool) -> torch.Tensor:
    """Fixed position embedding [1, N, embed_dim] float32 for ``use_rope=False`` (V-JEPA, arXiv:2404.08471).

    Channels are split over t, h, w: evenly with ``uniform_power``, else a half, a quarter and a quarter.
    """
    axes = (torch.arange(n, dtype=torch.float64, device="cpu") for n in grid)
    return sincos_rows(embed_dim, torch.cartesian_prod(*axes), uniform_power)[None]


def sincos_rows(embed_dim: int, positions_N3: torch.Tensor, uniform_power: bool) -> torch.Tensor:
    """Rows [N, embed_dim] float32 of `sincos_3d` for tokens at float64 positions (t,h,w)."""
    if uniform_power:
        dims = (-(-embed_dim // 6) * 2,) * 3
    else:
        dims = (embed_dim // 2, embed_dim // 4, embed_dim // 4)

    def encode(pos: torch.Tensor, dim: int) -> torch.Tensor:
        freq = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device="cpu") / (dim / 2))
        phase = pos[:, None] * freq
        return torch.cat((phase.sin(), phase.cos()), 1)

    embed = torch.cat([encode(positions_N3[:, i], dim) for i, dim in enumerate(dims)], 1)
    return embed[:, :embed_dim].float()


def resize_sincos(embed_1NE: torch.Tensor, built: Grid, grid: Grid) -> torch.Tensor:
    """The position embedding of another grid: cut where only T is smaller, else resized trilinearly."""
    if grid == built:
        return embed_1NE
    if grid[1:] == built[1:] and grid[0] < built[0]:
        return embed_1NE[:, : grid[0] * grid[1] * grid[2]]
    volume = embed_1NE.transpose(1, 2).unflatten(2, built)
    return torch.nn.functional.interpolate(volume, size=grid, mode="trilinear").flatten(2).transpose(1, 2)
