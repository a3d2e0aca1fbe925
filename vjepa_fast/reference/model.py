"""Encoder and predictor as V-JEPA 2.1 has them (V-JEPA 2, arXiv:2506.09985), written for reading, not for speed.

Every token of the clip is embedded by a Conv3d before the masked ones are dropped; the encoder runs once per mask; the
predictor sorts its tokens by position and un-sorts them. Parameters carry the FAIR names, so that state dicts exchange
with ``vjepa_fast.models``. Shapes: B clips, K kept tokens, N = T*H*W tokens, E width, L levels.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

ENCODER_LEVELS = {12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 40: (9, 19, 29, 39), 48: (11, 23, 37, 47)}


def level_blocks(depth: int, levels: int) -> list[int]:
    """The blocks whose outputs are kept: the published ones of a depth, else equally spaced."""
    if levels == 4 and depth in ENCODER_LEVELS:
        return list(ENCODER_LEVELS[depth])
    return [(level + 1) * depth // levels - 1 for level in range(levels)]


def take_tokens(x, indices):
    """Rows ``indices [B,K]`` of ``x [B,N,E]``."""
    return torch.gather(x, 1, indices.unsqueeze(-1).expand(-1, -1, x.size(-1)))


def rotate(x, positions, variant: str):
    """Rotate the interleaved channel pairs of ``x [B,heads,K,d]`` by ``positions [K]`` or ``[B,heads,K]``."""
    half = x.size(-1) // 2
    omega = torch.arange(half, dtype=x.dtype, device=x.device)
    omega = 1.0 / 10000 ** (omega / half)
    angle = torch.einsum("..., f -> ... f", positions, omega)
    if variant == "v2.1":
        sin, cos = angle.sin().repeat_interleave(2, dim=-1), angle.cos().repeat_interleave(2, dim=-1)
    else:  # v2 repeats the frequencies in halves, though the pairs are interleaved
        sin, cos = torch.cat([angle.sin()] * 2, dim=-1), torch.cat([angle.cos()] * 2, dim=-1)
    first, second = x.unflatten(-1, (-1, 2)).unbind(dim=-1)
    turned = torch.stack((-second, first), dim=-1).flatten(-2)
    return x * cos + turned * sin


class Attention(nn.Module):
    """Self-attention with rotary positions along time, rows and columns."""

    def __init__(self, dim, num_heads, patch_size, grid_size, interpolate_rope, rope_variant):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.axis_dim = 2 * ((self.head_dim // 3) // 2)
        self.grid_size = grid_size
        self.interpolate_rope = interpolate_rope
        self.rope_variant = rope_variant
        self.pretrained_grid = {16: 16, 14: 18}.get(patch_size, round(256 / patch_size))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, positions, height, width):
        """``x [B,K,E]`` at token ids ``positions [K]`` or ``[B,K]`` -> ``[B,K,E]``."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        if positions.dim() == 2:
            positions = positions.unsqueeze(1).repeat(1, self.num_heads, 1)
        t = positions // (height * width)
        y = (positions - t * height * width) // width
        w = positions - t * height * width - y * width
        t, y, w = 1.0 * t, 1.0 * y, 1.0 * w
        if self.interpolate_rope:
            y = y * (self.pretrained_grid - 1) / max(height - 1, 1)
            w = w * (self.pretrained_grid - 1) / max(width - 1, 1)
        q, k = self._rotate_axes(q, (t, y, w)), self._rotate_axes(k, (t, y, w))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))

    def _rotate_axes(self, x, axes):
        parts = []
        for i, positions in enumerate(axes):
            part = x[..., i * self.axis_dim : (i + 1) * self.axis_dim]
            parts.append(rotate(part, positions, self.rope_variant))
        parts.append(x[..., 3 * self.axis_dim :])
        return torch.cat(parts, dim=-1)


class MLP(nn.Module):
    """Feed-forward with GELU."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        """``[...,E]`` -> ``[...,E]``."""
        return self.fc2(self.act(self.fc1(x)))


class SwiGLU(nn.Module):
    """Gated feed-forward."""

    def __init__(self, dim, hidden, wide):
        super().__init__()
        if wide:
            hidden = (int(2 * hidden / 3) + 7) // 8 * 8
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(dim, hidden)
        self.fc3 = nn.Linear(hidden, dim)

    def forward(self, x):
        """``[...,E]`` -> ``[...,E]``."""
        return self.fc3(F.silu(self.fc1(x)) * self.fc2(x))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim, num_heads, use_silu, wide_silu, **rope):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, **rope)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim, 4 * dim, wide_silu) if use_silu else MLP(dim, 4 * dim)

    def forward(self, x, positions, height, width):
        """As ``Attention``."""
        x = x + self.attn(self.norm1(x), positions, height, width)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Every tubelet of a clip to a token."""

    def __init__(self, dim, patch_size, tubelet_size):
        super().__init__()
        size = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(3, dim, kernel_size=size, stride=size)

    def forward(self, clip):
        """``[B,3,F,Y,X]`` -> ``[B,N,E]``."""
        return self.proj(clip).flatten(2).transpose(1, 2)


def initialise(module, blocks):
    """Truncated normal 0.02, biases 0; the last layer of each residual branch divided by sqrt(2 x its depth)."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv3d)):
            nn.init.trunc_normal_(part.weight, std=0.02)
            assert part.bias is not None
            nn.init.zeros_(part.bias)
    with torch.no_grad():
        for i, block in enumerate(blocks):
            block.attn.proj.weight.div_(math.sqrt(2.0 * (i + 1)))
            block.mlp.fc2.weight.div_(math.sqrt(2.0 * (i + 1)))


class Encoder(nn.Module):
    """``forward(clip, masks, hierarchical)``: masks None, ``[B,K]``, or a list of equally long ones (stacked in batch).

    Returns ``[B,K,L*E]`` (all levels, each through its own LayerNorm) or, not hierarchical, ``[B,K,E]`` (the last one).
    """

    def __init__(
        self,
        *,
        crop_size=224,
        patch_size=16,
        tubelet_size=2,
        embed_dim=768,
        depth=12,
        num_heads=12,
        levels=4,
        interpolate_rope=True,
        rope_variant="v2.1",
        modality_embedding=True,
        img_temporal_dim_size=1,
        use_silu=False,
        wide_silu=True,
        use_activation_checkpointing=False,
    ):
        super().__init__()
        self.embed_dim, self.num_heads, self.levels = embed_dim, num_heads, levels
        self.patch_size, self.tubelet_size = patch_size, tubelet_size
        self.img_temporal_dim_size = img_temporal_dim_size
        self.modality_embedding = modality_embedding
        self.use_activation_checkpointing = use_activation_checkpointing
        self.patch_embed = PatchEmbed(embed_dim, patch_size, tubelet_size)
        if img_temporal_dim_size is not None:
            self.patch_embed_img = PatchEmbed(embed_dim, patch_size, 1)
        rope = dict(
            patch_size=patch_size,
            grid_size=crop_size // patch_size,
            interpolate_rope=interpolate_rope,
            rope_variant=rope_variant,
        )
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, use_silu, wide_silu, **rope) for _ in range(depth))
        self.level_blocks = level_blocks(depth, levels)
        initialise(self, self.blocks)
        self.norms_block = nn.ModuleList(nn.LayerNorm(embed_dim, eps=1e-6) for _ in range(levels))
        if modality_embedding:
            self.img_mod_embed = nn.Parameter(1e-6 * torch.randn(1, 1, embed_dim))
            self.video_mod_embed = nn.Parameter(1e-6 * torch.randn(1, 1, embed_dim))

    def is_image(self, clip) -> bool:
        """Whether the clip has the number of frames of a still image."""
        return self.img_temporal_dim_size is not None and clip.shape[2] == self.img_temporal_dim_size

    def grid(self, clip) -> tuple[int, int, int]:
        """(T,H,W) of the clip's tokens."""
        frames, height, width = clip.shape[2:]
        duration = frames if self.is_image(clip) else frames // self.tubelet_size
        return duration, height // self.patch_size, width // self.patch_size

    def forward(self, clip, masks=None, hierarchical=True):
        """See the class."""
        duration, height, width = self.grid(clip)
        if self.is_image(clip):
            x = self.patch_embed_img(clip)
            x = x + self.img_mod_embed if self.modality_embedding else x
        else:
            x = self.patch_embed(clip)
            x = x + self.video_mod_embed if self.modality_embedding else x
        if masks is None:
            positions = torch.arange(duration * height * width, device=clip.device)
        else:
            masks = masks if isinstance(masks, list) else [masks]
            x = torch.cat([take_tokens(x, mask) for mask in masks], dim=0)
            positions = torch.cat(masks, dim=0)
        outputs = []
        for i, block in enumerate(self.blocks):
            if self.use_activation_checkpointing:
                x = checkpoint(block, x, positions, height, width, use_reentrant=False)
            else:
                x = block(x, positions, height, width)
            if i in self.level_blocks:
                outputs.append(self.norms_block[self.level_blocks.index(i)](x))
        return torch.cat(outputs, dim=2) if hierarchical else self.norms_block[-1](x)


class Predictor(nn.Module):
    """``forward(z [B,Ke,L*E], mask_enc, mask_pred, modality, mask_index)`` -> ``[B,Kp,L*E]``, ``[B,Ke,L*E]``|None."""

    def __init__(
        self,
        *,
        crop_size=224,
        patch_size=16,
        num_frames=16,
        tubelet_size=2,
        embed_dim=768,
        predictor_embed_dim=256,
        depth=8,
        num_heads=8,
        levels=4,
        num_mask_tokens=2,
        zero_init_mask_tokens=True,
        interpolate_rope=True,
        rope_variant="v2.1",
        modality_embedding=True,
        img_temporal_dim_size=1,
        use_silu=False,
        wide_silu=True,
        return_all_tokens=True,
        use_activation_checkpointing=False,
    ):
        super().__init__()
        self.grid_size = crop_size // patch_size
        self.num_patches = max(1, num_frames // tubelet_size) * self.grid_size**2
        self.return_all_tokens = return_all_tokens
        self.use_activation_checkpointing = use_activation_checkpointing
        self.modality_embedding = modality_embedding and img_temporal_dim_size is not None
        if levels == 1:
            self.predictor_embed = nn.Linear(embed_dim, predictor_embed_dim)
        else:
            activation = nn.SiLU() if use_silu else nn.GELU()
            self.predictor_embed = nn.Sequential(
                nn.Linear(levels * embed_dim, embed_dim), activation, nn.Linear(embed_dim, predictor_embed_dim)
            )
        shape = (1, 1, predictor_embed_dim)
        self.mask_tokens = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for _ in range(num_mask_tokens))
        if self.modality_embedding:
            self.video_mod_embed = nn.Parameter(1e-6 * torch.randn(shape))
            self.img_mod_embed = nn.Parameter(1e-6 * torch.randn(shape))
        rope = dict(
            patch_size=patch_size,
            grid_size=self.grid_size,
            interpolate_rope=interpolate_rope,
            rope_variant=rope_variant,
        )
        self.predictor_blocks = nn.ModuleList(
            Block(predictor_embed_dim, num_heads, use_silu, wide_silu, **rope) for _ in range(depth)
        )
        self.predictor_norm = nn.LayerNorm(predictor_embed_dim, eps=1e-6)
        self.predictor_proj = nn.Linear(predictor_embed_dim, levels * embed_dim)
        if return_all_tokens:
            self.predictor_proj_context = nn.Linear(predictor_embed_dim, levels * embed_dim)
        initialise(self, self.predictor_blocks)
        if not zero_init_mask_tokens:
            for token in self.mask_tokens:
                nn.init.trunc_normal_(token, std=0.02)

    def forward(self, z, mask_enc, mask_pred, modality="video", mask_index=0):
        """See the class."""
        context = self.predictor_embed(z)
        batch, num_context, _ = context.shape
        token = self.mask_tokens[mask_index % len(self.mask_tokens)]
        targets = take_tokens(token.repeat(batch, self.num_patches, 1), mask_pred)
        x = torch.cat([context, targets], dim=1)
        positions = torch.cat([mask_enc, mask_pred], dim=1)

        order = torch.argsort(positions, dim=1)
        positions = torch.stack([positions[i, row] for i, row in enumerate(order)])
        x = torch.stack([x[i, row] for i, row in enumerate(order)])
        if self.modality_embedding:
            x = x + (self.img_mod_embed if modality == "image" else self.video_mod_embed)
        for block in self.predictor_blocks:
            if self.use_activation_checkpointing:
                x = checkpoint(block, x, positions, self.grid_size, self.grid_size, use_reentrant=False)
            else:
                x = block(x, positions, self.grid_size, self.grid_size)
        x = self.predictor_norm(x)
        x = torch.stack([x[i, row] for i, row in enumerate(torch.argsort(order, dim=1))])

        z_pred = self.predictor_proj(x[:, num_context:])
        z_context = self.predictor_proj_context(x[:, :num_context]) if self.return_all_tokens else None
        return z_pred, z_context
