"""The V-JEPA 2.1 predictor: fills in target features at masked positions from context features.

Legend: B batch, Ke context tokens, Kp predicted tokens, D = levels * embed_dim of the encoder, E predictor width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from vjepa_fast import ops
from vjepa_fast.config.fields import require
from vjepa_fast.config.schema import ModelConfig
from vjepa_fast.layers import packed
from vjepa_fast.layers.block import Block, init_weights, run_blocks
from vjepa_fast.layers.linear import Linear
from vjepa_fast.layers.packed import Masks, Stream
from vjepa_fast.models import rope
from vjepa_fast.models.vit import VisionTransformer, check_heads


def predictor_levels(depth: int, levels: int = 4) -> tuple[int, ...]:
    """The blocks that the published code associates with the levels. It counts them only: no output is taken there."""
    if (depth, levels) == (24, 4):
        return (4, 11, 17, 23)
    return tuple(max(0, (level + 1) * depth // levels - 1) for level in range(levels))


class Predictor(nn.Module):
    """Made by ``build_predictor``. Parameter names and shapes are as in FAIR's V-JEPA 2.1 code."""

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        levels: int,
        out_embed_dim: int,
        num_mask_tokens: int,
        zero_init_mask_tokens: bool,
        init: str,
        return_all_tokens: bool,
        use_silu: bool,
        wide_silu: bool,
        normalize: bool,
        use_activation_checkpointing: bool,
    ):
        super().__init__()
        self.embed_dim, self.num_heads, self.levels = embed_dim, num_heads, levels
        self.num_mask_tokens, self.return_all_tokens, self.normalize = num_mask_tokens, return_all_tokens, normalize
        self.hierarchical_layers = predictor_levels(depth, levels)
        self.patch_size, self.built_grid = encoder.patch_size, encoder.built_grid
        self.use_rope, self.rope_variant, self.rope_base = encoder.use_rope, encoder.rope_variant, encoder.rope_base
        self.modality_embedding = encoder.modality_embedding and encoder.img_temporal_dim_size is not None
        self.use_activation_checkpointing = use_activation_checkpointing

        width = encoder.embed_dim
        if levels == 1:
            self.predictor_embed = Linear(width, embed_dim)
        else:
            act = nn.SiLU() if use_silu else nn.GELU()
            self.predictor_embed = nn.Sequential(Linear(levels * width, width), act, Linear(width, embed_dim))
        self.mask_tokens = nn.ParameterList(nn.Parameter(torch.zeros(1, 1, embed_dim)) for _ in range(num_mask_tokens))
        if not self.use_rope:
            embed = rope.sincos_3d(embed_dim, self.built_grid, encoder.uniform_power)
            self.predictor_pos_embed = nn.Parameter(torch.empty(embed.shape).copy_(embed), requires_grad=False)
        self.predictor_blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, use_silu, wide_silu) for _ in range(depth)
        )
        self.predictor_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.predictor_proj = Linear(embed_dim, levels * out_embed_dim)
        if return_all_tokens:
            self.predictor_proj_context = Linear(embed_dim, levels * out_embed_dim)
        init_weights(self, self.predictor_blocks, fan_in=init == "fan_in")
        if not zero_init_mask_tokens:
            for token in self.mask_tokens:
                nn.init.trunc_normal_(token, std=0.02)
        if self.modality_embedding:
            self.video_mod_embed = nn.Parameter(torch.empty(1, 1, embed_dim).normal_(std=1e-6))
            self.img_mod_embed = nn.Parameter(torch.empty(1, 1, embed_dim).normal_(std=1e-6))

    def forward(
        self,
        z_BKD: Tensor | Sequence[Tensor],
        idx_enc: Tensor | Masks,
        idx_pred: Tensor | Masks,
        mask_index: int | Sequence[int] = 0,
        modality: str = "video",
        *,
        grid: Sequence[int] | None = None,
        context: bool = True,
    ) -> tuple[Tensor, Tensor | None] | tuple[list[Tensor], list[Tensor] | None]:
        """Predict features (V-JEPA 2, arXiv:2506.09985, section 2).

        Tokens carry their positions, so their order does not matter and nothing is sorted. The first four arguments may
        also be lists, one entry per mask: one pass for all, each attending to itself only. Ids may then be
        ``layers.Packed``, where samples keep different numbers of tokens; features are [1,M,D]. Or lists of one
        ``layers.packed.Stream`` each, with all masks; ``mask_index`` still has an entry for each of these.

        Args:
            z_BKD: encoder output of the context [B,Ke,D].
            idx_enc: int64 [B,Ke], token ids of the context.
            idx_pred: int64 [B,Kp], token ids of what to predict.
            mask_index: which mask token to use, taken modulo their number.
            modality: "video" or "image".
            grid: (T,H,W) of the clip, where it differs from the configured one.
            context: False skips the second output.

        Returns:
            z_pred [B,Kp,D] and z_context [B,Ke,D] (None without ``return_all_tokens``); lists of them for lists.
        """
        if modality not in ("video", "image"):
            raise ValueError(f"predictor: modality: expected 'video' or 'image', got {modality!r}")
        t, h, w = self.built_grid if grid is None else grid
        z_pred, z_context = self._stream(
            _listed(z_BKD), _listed(idx_enc), _listed(idx_pred), _listed(mask_index), modality, (t, h, w), context
        )
        if isinstance(z_BKD, Tensor):
            return z_pred[0], z_context[0] if z_context else None
        return z_pred, z_context

    def _stream(
        self,
        z_BKD: Sequence[Tensor],
        idx_enc: Masks,
        idx_pred: Masks,
        mask_index: Sequence[int],
        modality: str,
        grid: rope.Grid,
        context: bool,
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        x = self.predictor_embed(torch.cat(list(z_BKD), 1) if len(z_BKD) > 1 else z_BKD[0])
        tokens = torch.stack([self.mask_tokens[m % self.num_mask_tokens] for m in mask_index])  # [masks,1,1,E]
        if self.modality_embedding:
            mod = self.img_mod_embed if modality == "image" else self.video_mod_embed
            x, tokens = x + mod, tokens + mod
        enc, pred = idx_enc[0], idx_pred[0]
        if isinstance(enc, Stream) and isinstance(pred, Stream):
            x = x.masked_fill(~enc.real[..., None], 0.0)  # filler is zeros, whatever came out of the encoder
            stream = _Woven(enc, pred)
        else:
            stream = _Joined(idx_enc, idx_pred)
        x = stream.join(x.split([m.shape[1] for m in idx_enc], 1), stream.fill(x, tokens))
        idx_BK = stream.join([packed.places(m) for m in idx_enc], [packed.places(m) for m in idx_pred])
        table = None
        if self.use_rope:
            table = rope.rows(x, grid, idx_BK, self.embed_dim // self.num_heads, self.rope_variant, self.rope_base)
        else:
            pos = rope.resize_sincos(self.predictor_pos_embed, self.built_grid, grid)
            x = x + pos[0, idx_BK]
        lengths = packed.segments(idx_enc, idx_pred)
        norms = {len(self.predictor_blocks) - 1: self.predictor_norm}
        (x,) = run_blocks(self.predictor_blocks, norms, x, table, self.use_activation_checkpointing, lengths)
        seen, hidden = stream.apart(x)
        z_pred = [self._out(self.predictor_proj, part) for part in hidden]
        if not (self.return_all_tokens and context):
            return z_pred, None
        return z_pred, [self._out(self.predictor_proj_context, part) for part in seen]

    def _out(self, proj: nn.Linear, x_BKE: Tensor) -> Tensor:
        z = proj(x_BKE)
        return ops.target_norm(z, self.levels) if self.normalize else z


def _listed(x):
    """A list of a tensor or number alone; a sequence as it is."""
    return [x] if isinstance(x, Tensor | int) else x


class _Joined:
    """A stream of context and hidden tokens of the first segment, then those of the second, and so on.

    A segment is a mask, or where tokens are packed one sample of a mask.
    """

    def __init__(self, enc: Masks, pred: Masks):
        self.enc, self.pred = enc, pred

    def fill(self, x: Tensor, tokens: Tensor) -> list[Tensor]:
        """The hidden tokens of each mask, from the mask tokens [masks,1,1,E]."""
        return [token.expand(x.shape[0], m.shape[1], -1) for token, m in zip(tokens, self.pred)]

    def join(self, seen: Sequence[Tensor], hidden: Sequence[Tensor]) -> Tensor:
        """What there is of the context and hidden tokens of each mask, in the order of the stream."""
        sides = ((seen, self.enc), (hidden, self.pred))
        parts = ([part for x, m in zip(xs, side) for part in packed.pieces(x, m)] for xs, side in sides)
        return torch.cat([part for pair in zip(*parts) for part in pair], 1)

    def apart(self, x: Tensor) -> tuple[Iterator[Tensor], Iterator[Tensor]]:
        """The inverse of ``join``."""
        seen, hidden = ([n for m in side for n in packed.lengths(m)] for side in (self.enc, self.pred))
        parts = x.split([n for pair in zip(seen, hidden) for n in pair], 1)
        return _by_mask(parts[::2], self.enc), _by_mask(parts[1::2], self.pred)


def _by_mask(parts: Sequence[Tensor], masks: Masks) -> Iterator[Tensor]:
    """The segments [B,K,E] of each mask, side by side."""
    rest = iter(parts)
    for mask in masks:
        own = [next(rest) for _ in packed.lengths(mask)]
        yield torch.cat(own, 1) if len(own) > 1 else own[0]


class _Woven:
    """The same of all masks at once where their lengths are on the device, and so are the places of all tokens."""

    def __init__(self, enc: Stream, pred: Stream):
        self.enc, self.pred = enc, pred
        self.at = packed.weave(enc, pred)
        at = torch.cat(self.at)
        self.order = torch.empty_like(at).scatter_(0, at, torch.arange(len(at), device=at.device))

    def fill(self, x: Tensor, tokens: Tensor) -> list[Tensor]:
        """As ``_Joined.fill``; filler gets the first mask's token."""
        found = tokens[0].expand(1, self.pred.shape[1], -1)
        for own_C, token in zip(self.pred.own[1:], tokens[1:]):
            found = torch.where(own_C[:, None], token, found)
        return [found]

    def join(self, seen: Sequence[Tensor], hidden: Sequence[Tensor]) -> Tensor:
        """As ``_Joined.join``."""
        return torch.cat([*seen, *hidden], 1).index_select(1, self.order)

    def apart(self, x: Tensor) -> tuple[Iterator[Tensor], Iterator[Tensor]]:
        """As ``_Joined.apart``."""
        seen, hidden = ((x.index_select(1, rows) for rows in (side,)) for side in self.at)
        return seen, hidden


def build_predictor(
    encoder: VisionTransformer,
    *,
    embed_dim: int = 256,
    depth: int = 8,
    num_heads: int = 8,
    mlp_ratio: float = 4.0,
    num_mask_tokens: int = 2,
    return_all_tokens: bool = True,
    levels: int | None = None,
    out_embed_dim: int | None = None,
    zero_init_mask_tokens: bool = True,
    init: str = "fixed",
    use_silu: bool = False,
    wide_silu: bool = True,
    normalize: bool = False,
    use_activation_checkpointing: bool = False,
    device: torch.device | str | None = None,
) -> Predictor:
    """Build the predictor that fits an encoder (grid, rotary positions, modalities and levels are the encoder's).

    Args:
        encoder: gives grid, positions, modalities and the width of the context.
        embed_dim: width of the blocks.
        depth: number of blocks.
        num_heads: attention heads of a block.
        mlp_ratio: hidden width of a feed-forward over ``embed_dim``.
        num_mask_tokens: learnt tokens, one per mask.
        return_all_tokens: predict the context tokens too.
        levels: None: the encoder's.
        out_embed_dim: width of one level's target; None: the encoder's.
        zero_init_mask_tokens: mask tokens start at zero, else at random values.
        init: scale of the initial weights, ``fixed`` (0.02) or ``fan_in`` (1/sqrt(3 inputs)); see ``init_weights``.
        use_silu: gated feed-forward (SwiGLU) instead of GELU.
        wide_silu: shrink its hidden width to 2/3.
        normalize: layer-normalise each level of the outputs (``model.normalize_predictor``).
        use_activation_checkpointing: recompute the activations of a block in the backward pass.
        device: None: the encoder's.

    Raises:
        ConfigError: names the key, its value and what is accepted.
    """
    require(ModelConfig, "model", num_mask_tokens=num_mask_tokens, pred_depth=depth, pred_init=init)
    check_heads("model.pred_", embed_dim, num_heads, encoder.rope_variant if encoder.use_rope else None)
    with torch.device(device if device is not None else next(encoder.norms_block.parameters()).device):
        return Predictor(
            encoder,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            levels=encoder.levels if levels is None else levels,
            out_embed_dim=encoder.embed_dim if out_embed_dim is None else out_embed_dim,
            num_mask_tokens=num_mask_tokens,
            zero_init_mask_tokens=zero_init_mask_tokens,
            init=init,
            return_all_tokens=return_all_tokens,
            use_silu=use_silu,
            wide_silu=wide_silu,
            normalize=normalize,
            use_activation_checkpointing=use_activation_checkpointing,
        )
