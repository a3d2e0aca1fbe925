"""The V-JEPA 2.1 encoder: a video vision transformer that returns several depths of itself.

Legend: B batch, F frames, grid (T,H,W), N = T*H*W tokens, K kept tokens, E embed_dim, L levels, P pixels of a tubelet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vjepa_fast import ops
from vjepa_fast.config.checks import not_multiple, not_tubelets, refuse, token_grid
from vjepa_fast.config.fields import require
from vjepa_fast.config.schema import ModelConfig
from vjepa_fast.errors import ConfigError
from vjepa_fast.imagenet import IMAGENET_MEAN, IMAGENET_STD
from vjepa_fast.layers import packed
from vjepa_fast.layers.attention import FrameCausal, Lengths
from vjepa_fast.layers.block import Block, init_weights, run_blocks
from vjepa_fast.layers.packed import Packed, Stream
from vjepa_fast.models import rope
from vjepa_fast.ops.linear import linear
from vjepa_fast.registry import suggestion

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Size:
    """The blocks of an encoder; the hidden layer of a feed-forward has ``mlp_ratio`` times their width."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0


SIZES = {
    "vit_tiny": Size(192, 12, 3),
    "vit_small": Size(384, 12, 6),
    "vit_base": Size(768, 12, 12),
    "vit_large": Size(1024, 24, 16),
    "vit_huge": Size(1280, 32, 16),
    "vit_giant": Size(1408, 40, 16, 48 / 11),
    "vit_giant_xformers": Size(1408, 40, 22, 48 / 11),
    "vit_gigantic": Size(1664, 48, 16, 64 / 13),
    "vit_gigantic_xformers": Size(1664, 48, 26, 64 / 13),
}


def level_blocks(depth: int, levels: int) -> tuple[int, ...]:
    """The blocks (from 0) whose outputs are the levels; the last one is always the last block."""
    if not 1 <= levels <= depth:
        raise ConfigError(f"model.levels: {levels} levels of {depth} blocks; accepted: 1 to {depth}")
    if (depth, levels) == (48, 4):
        return (11, 23, 37, 47)
    return tuple((level + 1) * depth // levels - 1 for level in range(levels))


class PatchEmbed3D(nn.Module):
    """Tubelets to tokens: the weights of a strided Conv3d (``proj``), applied as one matrix product."""

    def __init__(self, tubelet: int, patch: int, embed_dim: int):
        super().__init__()
        self.tubelet, self.patch = tubelet, patch
        size = (tubelet, patch, patch)
        self.proj = nn.Conv3d(3, embed_dim, kernel_size=size, stride=size)

    def forward(self, clip: Tensor, idx_BK: Tensor | None, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """Clip [B,3,F,height,width], idx int64 [B,K], packed [1,M] or None (all) -> [B,K,E] or [1,M,E].

        Only kept tubelets are multiplied.
        """
        weight = self.proj.weight.flatten(1)
        patches_BKP = ops.tubelet_patchify(clip, idx_BK, self.tubelet, self.patch, mean, std, weight.dtype)
        return linear(patches_BKP, weight, self.proj.bias)


class VisionTransformer(nn.Module):
    """Encoder; made by ``build_encoder``. Parameter names and shapes are as in FAIR's V-JEPA 2.1 code.

    Attributes:
        embed_dim: E. levels: L. num_features: L*E, the width of the output. level_blocks: the blocks of the levels.
        built_grid: the grid (T,H,W) of a clip of the configured size.
        block_causal: no frame (time step of the grid) sees a later one; a class token, which sees all, is seen by none.
        clip_settings, checkpoint_hash, loaded_as: set by ``interop.load_encoder`` only.
    """

    clip_settings: dict[str, Any]
    checkpoint_hash: str
    loaded_as: str  # target_encoder or encoder

    def __init__(
        self,
        size: Size,
        *,
        img_size: tuple[int, int],
        patch_size: int,
        num_frames: int,
        tubelet_size: int,
        levels: int,
        use_rope: bool,
        interpolate_rope: bool,
        rope_variant: str,
        use_silu: bool,
        wide_silu: bool,
        uniform_power: bool,
        modality_embedding: bool,
        img_temporal_dim_size: int | None,
        init: str,
        use_activation_checkpointing: bool,
        cls_token: bool,
        block_causal: bool,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        super().__init__()
        self.embed_dim, self.num_heads, self.mlp_ratio = size.embed_dim, size.num_heads, size.mlp_ratio
        self.levels, self.num_features = levels, levels * size.embed_dim
        self.level_blocks = level_blocks(size.depth, levels)
        self.img_size, self.patch_size = img_size, patch_size
        self.num_frames, self.tubelet_size = num_frames, tubelet_size
        self.built_grid = (num_frames // tubelet_size, img_size[0] // patch_size, img_size[1] // patch_size)
        self.use_rope, self.rope_variant = use_rope, rope_variant
        self.rope_base = rope.base_grid(patch_size) if interpolate_rope else None
        self.uniform_power, self.modality_embedding = uniform_power, modality_embedding
        self.img_temporal_dim_size = img_temporal_dim_size
        self.use_activation_checkpointing = use_activation_checkpointing
        self.block_causal = block_causal
        self.mean, self.std = tuple(mean), tuple(std)

        self.patch_embed = PatchEmbed3D(tubelet_size, patch_size, size.embed_dim)
        self.patch_embed_img = None
        if img_temporal_dim_size is not None:
            self.patch_embed_img = PatchEmbed3D(1, patch_size, size.embed_dim)
        if not use_rope:
            embed = rope.sincos_3d(size.embed_dim, self.built_grid, uniform_power)
            self.pos_embed = nn.Parameter(torch.empty(embed.shape).copy_(embed), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(size.embed_dim, size.num_heads, size.mlp_ratio, use_silu, wide_silu) for _ in range(size.depth)
        )
        self.norms_block = nn.ModuleList(nn.LayerNorm(size.embed_dim, eps=1e-6) for _ in range(levels))
        init_weights(self, self.blocks, fan_in=init == "fan_in")
        if modality_embedding:
            self.img_mod_embed = nn.Parameter(torch.empty(1, 1, size.embed_dim).normal_(std=1e-6))
            self.video_mod_embed = nn.Parameter(torch.empty(1, 1, size.embed_dim).normal_(std=1e-6))
        self.cls_token = None
        if cls_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, size.embed_dim).normal_(std=0.02))

    def is_image(self, num_frames: int) -> bool:
        """Whether a clip of so many frames goes through the image patch embedding."""
        return self.img_temporal_dim_size is not None and num_frames == self.img_temporal_dim_size

    def grid(self, clip_shape: tuple[int, ...]) -> rope.Grid:
        """(T,H,W) of a clip of shape [B,C,F,height,width]; ConfigError where patches or tubelets do not fit."""
        frames, height, width = clip_shape[-3:]
        tubelet = 1 if self.is_image(frames) else self.tubelet_size
        return token_grid(frames, height, width, tubelet=tubelet, patch=self.patch_size)

    def forward(
        self, clip: Tensor, masks: Tensor | Sequence[Tensor] | Sequence[Packed] | None = None, hierarchical: bool = True
    ) -> Tensor | list[Tensor]:
        """Encode a clip (V-JEPA 2, arXiv:2506.09985, section 2; levels as in the study, arXiv:2605.17165).

        Args:
            clip: [B,3,F,height,width], normalised float (``ops.normalize_clip``), or uint8, which the patch embedding
                normalises with ``mean`` and ``std``. F = ``img_temporal_dim_size`` is an image. Other numbers of frames
                and other sizes than configured are accepted where patches fit.
            masks: None (all tokens), ids of kept tokens int64 [B,K], or a list of such: one pass, each attending
                to itself only. Or a list of ``layers.Packed``: then the tokens of all samples are one stream; or of
                one ``layers.packed.Stream``, which has all masks.
            hierarchical: True returns all levels, concatenated; False the last one.

        Returns:
            [B,K,L*E] or [B,K,E]; a list of them if ``masks`` is a list ([1,M,L*E] of a packed mask with M tokens).
            Patch tokens only: a class token takes part and is left out (see `summary`).
        """
        if masks is None or isinstance(masks, Tensor):
            return self._patches(self._whole(clip, masks, hierarchical))
        if not masks:
            return []
        if self.cls_token is not None or self.block_causal:
            raise ValueError("an encoder with a class token or block-causal attention takes one mask [B,K], not a list")
        grid = self.grid(clip.shape)
        idx_BK = torch.cat([packed.ids(m) for m in masks], 1)  # one pass: tokens of all masks side by side
        place_BK = idx_BK % masks[0].tokens if isinstance(masks[0], Packed) else idx_BK
        x = self._embed(clip, grid, idx_BK, place_BK)
        if isinstance(masks[0], Stream):  # filler is zeros, whatever it read
            x = x.masked_fill(~masks[0].real[..., None], 0.0)
        outs = self._levels(x, self._rope(x, grid, place_BK), hierarchical, packed.segments(masks))
        parts = [out.split([m.shape[1] for m in masks], 1) for out in outs]
        if len(parts) == 1:
            return [part.contiguous() for part in parts[0]]
        return [torch.cat([level[i] for level in parts], -1) for i in range(len(masks))]

    def summary(self, clip: Tensor, idx_BK: Tensor | None) -> Tensor:
        """The class token of the last level, [B,E], having seen the tokens ``idx`` int64 [B,K] of the clip (None: all).

        Raises:
            ValueError: the encoder has none.
        """
        if self.cls_token is None:
            raise ValueError("this encoder was built without cls_token")
        return self._whole(clip, idx_BK, hierarchical=False)[0][:, 0]

    def with_summary(self, clip: Tensor, hierarchical: bool = True) -> tuple[Tensor, Tensor]:
        """What `forward` and `summary` return for all tokens of a clip, from one pass: [B,N,L*E] or [B,N,E], and [B,E].

        Raises:
            ValueError: the encoder has no class token.
        """
        if self.cls_token is None:
            raise ValueError("this encoder was built without cls_token")
        outs = self._whole(clip, None, hierarchical)
        return self._patches(outs), outs[-1][:, 0]

    def _patches(self, outs: list[Tensor]) -> Tensor:
        """The levels side by side, without the class token."""
        if self.cls_token is not None:
            outs = [out[:, 1:].contiguous() for out in outs]
        return torch.cat(outs, -1) if len(outs) > 1 else outs[0]

    def features(self, videos: Any, **how: Any) -> Any:
        """``vjepa_fast.features(encoder, videos, **how)``: frozen features of videos, folders or manifests.

        Returns:
            ``evaluation.VideoFeatures``: ``x`` [n, ...] and the path of each row; see ``evaluation.video_features``.
        """
        import vjepa_fast  # the package's own name for it: models knows no room below

        return vjepa_fast.features(self, videos, **how)

    def _whole(self, clip: Tensor, idx_BK: Tensor | None, hierarchical: bool) -> list[Tensor]:
        """The levels of one segment per sample; a class token comes first."""
        grid, idx_BK = self.grid(clip.shape), None if idx_BK is None else idx_BK.long()
        x = self._embed(clip, grid, idx_BK)
        table, lengths = self._rope(x, grid, idx_BK), None
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.to(x.dtype).expand(len(x), -1, -1), x), 1)
            table = None if table is None else rope.unrotated_first(table)
        if self.block_causal:
            per_frame = grid[1] * grid[2]
            ids = torch.arange(grid[0] * per_frame, device=x.device) if idx_BK is None else idx_BK
            frames = ids // per_frame
            if self.cls_token is not None:
                frames = torch.nn.functional.pad(frames, (1, 0), value=grid[0])
            lengths = FrameCausal(frames)
        return self._levels(x, table, hierarchical, lengths)

    def _embed(self, clip: Tensor, grid: rope.Grid, idx_BK: Tensor | None, place_BK: Tensor | None = None) -> Tensor:
        """``place``: token of each index within its sample, where that is not the index itself."""
        image = self.is_image(clip.shape[2])
        embed = self.patch_embed_img if image else self.patch_embed
        assert embed is not None
        x = embed(clip, idx_BK, self.mean, self.std)
        if self.modality_embedding:
            x = x + (self.img_mod_embed if image else self.video_mod_embed).to(x.dtype)
        if not self.use_rope:
            pos = rope.resize_sincos(self.pos_embed, self.built_grid, grid).to(x.dtype)
            place_BK = idx_BK if place_BK is None else place_BK
            x = x + (pos if place_BK is None else pos[0, place_BK])
        return x

    def _rope(self, x: Tensor, grid: rope.Grid, idx_BK: Tensor | None) -> Tensor | None:
        if not self.use_rope:
            return None
        return rope.rows(x, grid, idx_BK, self.embed_dim // self.num_heads, self.rope_variant, self.rope_base)

    def _levels(self, x_BKE: Tensor, table: Tensor | None, hierarchical: bool, lengths: Lengths = None) -> list[Tensor]:
        """The levels of the tokens, normalised, as `run_blocks` returns them; not ``hierarchical``: the last one."""
        last = len(self.blocks) - 1
        norms = dict(zip(self.level_blocks, self.norms_block)) if hierarchical else {last: self.norms_block[-1]}
        return run_blocks(self.blocks, norms, x_BKE, table, self.use_activation_checkpointing, lengths)


def build_encoder(
    name: str | None = None,
    *,
    img_size: int | tuple[int, int] = 224,
    patch_size: int = 16,
    num_frames: int = 16,
    tubelet_size: int = 2,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    mlp_ratio: float | None = None,
    levels: int = 4,
    use_rope: bool = True,
    interpolate_rope: bool = True,
    rope_variant: str = "v2.1",
    use_silu: bool = False,
    wide_silu: bool = True,
    uniform_power: bool = True,
    modality_embedding: bool = True,
    img_temporal_dim_size: int | None = 1,
    init: str = "fixed",
    use_activation_checkpointing: bool = False,
    cls_token: bool = False,
    block_causal: bool = False,
    n_registers: int = 0,
    has_cls_first: bool = False,
    mean: RGB = IMAGENET_MEAN,
    std: RGB = IMAGENET_STD,
    device: torch.device | str | None = None,
) -> VisionTransformer:
    """Build a V-JEPA 2.1 encoder with fresh weights (global torch generator).

    Args:
        name: of ``SIZES``; None: the next three are given.
        img_size: pixels, one number or (height, width).
        patch_size: pixels per side of a token.
        num_frames: frames of a clip.
        tubelet_size: frames of a token.
        embed_dim: width E, in place of that of ``name``, as the three that follow.
        depth: number of blocks.
        num_heads: attention heads of a block.
        mlp_ratio: hidden width of a feed-forward over E; 4 without ``name``.
        levels: how many depths have their outputs concatenated.
        use_rope: rotary positions; False adds fixed sine-cosine positions instead.
        interpolate_rope: stretch rows and columns to the base grid (``rope.base_grid``).
        rope_variant: ``v2.1``, or ``v2`` for V-JEPA 2 weights.
        use_silu: gated feed-forward (SwiGLU) instead of GELU.
        wide_silu: shrink its hidden width to 2/3.
        uniform_power: sine-cosine positions split the channels evenly over the axes.
        modality_embedding: a learnt vector is added to the tokens of images, another to those of videos.
        img_temporal_dim_size: frames of a still image, which has its own patch embedding; None: images pass as video.
        init: scale of the initial weights, ``fixed`` (0.02) or ``fan_in`` (1/sqrt(3 inputs)); see ``init_weights``.
        use_activation_checkpointing: recompute the activations of a block in the backward pass.
        cls_token: a learnt token before the patches, without a position, that sums the clip up (`summary`).
        block_causal: tokens attend within their frame and to earlier ones; see ``VisionTransformer.block_causal``.
        n_registers: must be 0: the published encoder has no weights for register tokens.
        has_cls_first: must be False, likewise (`cls_token` is another thing: LeVJEPA's).
        mean: of pixels in [0, 1], for uint8 clips.
        std: likewise.
        device: where to create the parameters; "meta" allocates nothing.

    Raises:
        ConfigError: names the key, its value and what is accepted.
    """
    require(ModelConfig, "model", init=init)
    if n_registers or has_cls_first:
        key = "model.n_registers" if n_registers else "model.has_cls_first"
        raise ConfigError(f"{key}: the published encoder has no weights for register or cls tokens; use 0 / false")
    size = _resolve_size(name, embed_dim, depth, num_heads, mlp_ratio)
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    for pixels in (height, width):
        refuse(not_multiple(pixels, patch_size, "data.crop_size", "data.patch_size"))
    if num_frames != img_temporal_dim_size:
        refuse(not_tubelets(num_frames, tubelet_size, "data.dataset_fpcs", "data.tubelet_size"))
    check_heads("model.", size.embed_dim, size.num_heads, rope_variant if use_rope else None)
    with torch.device(device if device is not None else torch.get_default_device()):
        return VisionTransformer(
            size,
            img_size=(height, width),
            patch_size=patch_size,
            num_frames=num_frames,
            tubelet_size=tubelet_size,
            levels=levels,
            use_rope=use_rope,
            interpolate_rope=interpolate_rope,
            rope_variant=rope_variant,
            use_silu=use_silu,
            wide_silu=wide_silu,
            uniform_power=uniform_power,
            modality_embedding=modality_embedding,
            img_temporal_dim_size=img_temporal_dim_size,
            init=init,
            use_activation_checkpointing=use_activation_checkpointing,
            cls_token=cls_token,
            block_causal=block_causal,
            mean=mean,
            std=std,
        )


def check_heads(section: str, embed_dim: int, num_heads: int, rope_variant: str | None) -> None:
    """Refuse numbers of heads that do not divide the channels, or whose heads have too few for rotary positions.

    Args:
        section: prefix of the keys to name, such as ``model.pred_``.
        embed_dim: channels of all heads together.
        num_heads: heads.
        rope_variant: None without rotary positions.

    Raises:
        ConfigError: names the key, its value and what is accepted.
    """
    refuse(not_multiple(embed_dim, num_heads, f"{section}embed_dim", f"{section}num_heads"))
    if rope_variant is None:
        return
    require(ModelConfig, "model", rope_variant=rope_variant)
    head_dim = embed_dim // num_heads
    if head_dim % 2 or not rope.rotated_channels(head_dim):
        raise ConfigError(
            f"{section}num_heads: {embed_dim} channels in {num_heads} heads; "
            "each head needs an even number of channels, 6 or more"
        )


def _resolve_size(
    name: str | None, embed_dim: int | None, depth: int | None, num_heads: int | None, mlp_ratio: float | None
) -> Size:
    if name is None:
        if embed_dim is None or depth is None or num_heads is None:
            raise ConfigError("model.model_name: without a name give embed_dim, depth and num_heads, all three")
        return Size(embed_dim, depth, num_heads, 4.0 if mlp_ratio is None else mlp_ratio)
    if name not in SIZES:
        hint = suggestion(name, SIZES)
        raise ConfigError(f"model.model_name: unknown {name!r}; accepted: {', '.join(SIZES)}{hint}")
    given = SIZES[name]
    return Size(
        given.embed_dim if embed_dim is None else embed_dim,
        given.depth if depth is None else depth,
        given.num_heads if num_heads is None else num_heads,
        given.mlp_ratio if mlp_ratio is None else mlp_ratio,
    )
