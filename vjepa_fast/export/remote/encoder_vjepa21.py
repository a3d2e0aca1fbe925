"""The encoder of a V-JEPA 2.1 in plain PyTorch: this file needs torch and nothing else. Written by vjepa_fast (MIT).

Legend: B batch, F frames, grid (T,H,W), N = T*H*W tokens, K kept tokens, E width, L levels, d channels of a head,
R rotated channels of a head. Token n = (t*H + h)*W + w.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int, int]


class Attention(nn.Module):
    """Self-attention with packed ``qkv``; ``turn`` rotates queries and keys by their positions."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, table: Tensor | None, seen: Tensor | None) -> Tensor:
        """[B,K,E] -> [B,K,E]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if table is not None:
            q, k = turn(q, table), turn(k, table)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Feed-forward with exact GELU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[...,E] -> [...,E]."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """Gated feed-forward."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(dim, hidden)
        self.fc3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[...,E] -> [...,E]."""
        return self.fc3(F.silu(self.fc1(x)) * self.fc2(x))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, hidden: int, gated: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim, hidden) if gated else MLP(dim, hidden)

    def forward(self, x: Tensor, table: Tensor | None, seen: Tensor | None) -> Tensor:
        """[B,K,E] -> [B,K,E]."""
        x = x + self.attn(self.norm1(x), table, seen)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Tubelets to tokens."""

    def __init__(self, tubelet: int, patch: int, dim: int):
        super().__init__()
        size = (tubelet, patch, patch)
        self.proj = nn.Conv3d(3, dim, kernel_size=size, stride=size)

    def forward(self, clip: Tensor) -> Tensor:
        """[B,3,F,height,width] -> [B,N,E]."""
        return self.proj(clip).flatten(2).transpose(1, 2)


class VideoEncoder(nn.Module):
    """An encoder with the parameter names of V-JEPA 2.1; ``a`` holds the arguments of ``VJEPA21Config``."""

    def __init__(self, a: Any):
        super().__init__()
        self.a = a
        hidden = int(a.embed_dim * a.mlp_ratio)
        if a.use_silu and a.wide_silu:
            hidden = -(-int(2 * hidden / 3) // 8) * 8
        self.patch_embed = PatchEmbed(a.tubelet_size, a.patch_size, a.embed_dim)
        self.patch_embed_img = None
        if a.img_temporal_dim_size is not None:
            self.patch_embed_img = PatchEmbed(1, a.patch_size, a.embed_dim)
        height, width = (a.img_size, a.img_size) if isinstance(a.img_size, int) else a.img_size
        self.built: Grid = (a.num_frames // a.tubelet_size, height // a.patch_size, width // a.patch_size)
        if not a.use_rope:
            tokens = self.built[0] * self.built[1] * self.built[2]
            self.pos_embed = nn.Parameter(torch.zeros(1, tokens, a.embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList(Block(a.embed_dim, a.num_heads, hidden, a.use_silu) for _ in range(a.depth))
        self.norms_block = nn.ModuleList(nn.LayerNorm(a.embed_dim, eps=1e-6) for _ in range(a.levels))
        if a.modality_embedding:
            self.img_mod_embed = nn.Parameter(torch.zeros(1, 1, a.embed_dim))
            self.video_mod_embed = nn.Parameter(torch.zeros(1, 1, a.embed_dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, a.embed_dim)) if a.cls_token else None
        self._tables: dict[Any, Tensor] = {}

    def is_image(self, frames: int) -> bool:
        """Whether a clip of so many frames goes through the image patch embedding."""
        return self.a.img_temporal_dim_size is not None and frames == self.a.img_temporal_dim_size

    def grid(self, clip: Tensor) -> Grid:
        """(T,H,W) of a clip [B,3,F,height,width]."""
        frames, height, width = clip.shape[-3:]
        tubelet = 1 if self.is_image(frames) else self.a.tubelet_size
        if frames % tubelet or height % self.a.patch_size or width % self.a.patch_size:
            raise ValueError(
                f"a clip of {frames} frames of {height} x {width} pixels does not divide into patches of "
                f"{tubelet} x {self.a.patch_size} x {self.a.patch_size}"
            )
        return frames // tubelet, height // self.a.patch_size, width // self.a.patch_size

    def forward(self, clip: Tensor, ids: Tensor | None = None, table: Tensor | None = None) -> list[Tensor]:
        """Normalised clip [B,3,F,height,width] -> the levels, [B,K,E] each, K = N without ``ids``.

        Args:
            ids: int64 [B,K], the tokens to look at; None: all.
            table: of `rotations` for this grid, where it is at hand.

        Returns:
            One tensor per level; with a class token it is the first of the tokens.
        """
        grid, image = self.grid(clip), self.is_image(clip.shape[2])
        embed = self.patch_embed_img if image else self.patch_embed
        assert embed is not None
        x = embed(clip)
        if self.a.modality_embedding:
            x = x + (self.img_mod_embed if image else self.video_mod_embed)
        if not self.a.use_rope:
            x = x + resized(self.pos_embed, self.built, grid)
        elif table is None:
            table = self.rotations(grid, x.device)
        if ids is not None:
            x = x.gather(1, ids[..., None].expand(-1, -1, x.shape[2]))
            table = None if table is None else table[:, ids]  # [2,B,K,R]
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1)
            if table is not None:
                still = torch.stack((torch.ones_like(table[0, ..., :1, :]), torch.zeros_like(table[0, ..., :1, :])))
                table = torch.cat((still, table), -2)
        return self._levels(x, table, self._seen(grid, ids, x))

    def _levels(self, x: Tensor, table: Tensor | None, seen: Tensor | None) -> list[Tensor]:
        outs = []
        norms = dict(zip(level_blocks(self.a.depth, self.a.levels), self.norms_block))
        for number, block in enumerate(self.blocks):
            x = block(x, table, seen)
            if number in norms:
                outs.append(norms[number](x))
        return outs

    def _seen(self, grid: Grid, ids: Tensor | None, x: Tensor) -> Tensor | None:
        """Bool [1 or B,1,K,K], whether a query sees a key: its own time step and those before."""
        if not self.a.block_causal:
            return None
        steps = torch.arange(grid[0] * grid[1] * grid[2], device=x.device)[None] if ids is None else ids
        steps = steps // (grid[1] * grid[2])
        if self.cls_token is not None:
            steps = F.pad(steps, (1, 0), value=grid[0])
        return (steps[:, None, :] <= steps[:, :, None])[:, None]

    def rotations(self, grid: Grid, device: torch.device) -> Tensor:
        """float32 [2,N,R]: cosines and sines of every token of a grid, by channel; kept."""
        key = grid, device
        if key not in self._tables:
            with torch.no_grad():
                self._tables[key] = rotations(
                    grid, self.a.embed_dim // self.a.num_heads, self.a.rope_variant, self.base_grid()
                ).to(device)
        return self._tables[key]

    def base_grid(self) -> int | None:
        """Patches per side to which rows and columns are stretched; None: they are not."""
        if not self.a.interpolate_rope:
            return None
        return 18 if self.a.patch_size == 14 else round(256 / self.a.patch_size)


def level_blocks(depth: int, levels: int) -> Sequence[int]:
    """The blocks (from 0) whose outputs are the levels."""
    if (depth, levels) == (48, 4):
        return 11, 23, 37, 47
    return [(level + 1) * depth // levels - 1 for level in range(levels)]


def rotations(grid: Grid, head_dim: int, variant: str, base: int | None) -> Tensor:
    """float32 [2,N,R] on the CPU: three axes of R/3 channels each, base 10000.

    ``v2.1`` gives both channels of a pair one angle, ``v2`` repeats the frequencies of an axis in halves.
    """
    axes = []
    for axis, length in enumerate(grid):
        stretch = (base - 1) / (length - 1) if axis and base is not None and length > 1 else 1.0
        axes.append(torch.arange(length, dtype=torch.float64, device="cpu") * stretch)
    pairs = (head_dim // 3) // 2
    freq = 10000.0 ** -(torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs)
    angles = torch.cartesian_prod(*axes)[:, :, None] * freq  # [N,3,R/6]
    angles = angles.repeat(1, 1, 2) if variant == "v2" else angles.repeat_interleave(2, -1)
    angles = angles.flatten(1)
    return torch.stack((angles.cos(), angles.sin())).float()


def turn(x: Tensor, table: Tensor) -> Tensor:
    """Rotate channel pairs of x [B,heads,K,d] by ``table`` [2,K,R] or [2,B,K,R], in float32 at least."""
    rotated = table.shape[-1]
    cos, sin = table if table.dim() == 3 else table[:, :, None]
    y = x[..., :rotated].to(torch.promote_types(x.dtype, torch.float32))
    quarter = torch.stack((-y[..., 1::2], y[..., 0::2]), -1).flatten(-2)
    return torch.cat(((y * cos + quarter * sin).to(x.dtype), x[..., rotated:]), -1)


def resized(embed: Tensor, built: Grid, grid: Grid) -> Tensor:
    """A position embedding [1,N,E] of another grid: cut where only T is smaller, else resized trilinearly."""
    if grid == built:
        return embed
    if grid[1:] == built[1:] and grid[0] < built[0]:
        return embed[:, : grid[0] * grid[1] * grid[2]]
    volume = embed.transpose(1, 2).unflatten(2, built)
    return F.interpolate(volume, size=grid, mode="trilinear").flatten(2).transpose(1, 2)
