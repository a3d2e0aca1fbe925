"""The encoders as models of timm: ``import vjepa_fast.timm_models``, then ``timm.create_model("vjepa_fast_...")``.

Legend: B batch, F frames, grid (T,H,W), N = T*H*W tokens, E width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vjepa_fast.errors import CheckpointError, ConfigError
from vjepa_fast.models import SIZES, build_encoder, load_encoder, load_weights
from vjepa_fast.models.describe import architecture
from vjepa_fast.models.interop import encoder_tensors
from vjepa_fast.models.weights import encoder_state

default_cfgs: dict[str, Any] = {}  # where timm looks for them
_POOLINGS = ("avg", "")
_SIZES_OF_CLIPS = ("img_size", "num_frames", "mean", "std")  # what weights do not depend on


class TimmEncoder(nn.Module):
    """An encoder with timm's interface. Images [B,3,height,width] and clips [B,3,F,height,width], normalised.

    Args:
        size: of ``models.SIZES``.
        num_classes: outputs of a linear head; 0: none.
        global_pool: ``avg``, the mean of all tokens, or nothing.
        drop_rate: dropout before the head.
        in_chans: 3.
        **arch: arguments of ``build_encoder``; ``img_temporal_dim_size=0`` is its None, which timm leaves out.
    """

    def __init__(
        self,
        size: str,
        num_classes: int = 0,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        in_chans: int = 3,
        **arch: Any,
    ):
        super().__init__()
        if in_chans != 3:
            raise ConfigError(f"in_chans: the encoder takes 3 channels, got {in_chans}")
        if isinstance(arch.get("img_size"), list):
            arch["img_size"] = tuple(arch["img_size"])
        if arch.get("img_temporal_dim_size") == 0:
            arch["img_temporal_dim_size"] = None
        self.encoder = build_encoder(size, **arch)
        self.embed_dim = self.num_features = self.head_hidden_size = self.encoder.embed_dim
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        stride = self.encoder.patch_size
        self.feature_info = [
            dict(module=f"encoder.blocks.{i}", num_chs=self.embed_dim, reduction=stride)
            for i in range(len(self.encoder.blocks))
        ]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head of so many outputs; 0: none."""
        if global_pool is not None and global_pool not in _POOLINGS:
            raise ConfigError(f"global_pool: {global_pool!r}; accepted: 'avg', ''")
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed."""
        names = ("pos_embed", "img_mod_embed", "video_mod_embed", "cls_token")
        return {f"encoder.{name}" for name in names if getattr(self.encoder, name, None) is not None}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for rates that fall with it."""
        stem = r"^encoder\.(?:patch_embed|pos_embed|img_mod_embed|video_mod_embed|cls_token)"
        return dict(stem=stem, blocks=[(r"^encoder\.blocks\.(\d+)", None), (r"^encoder\.norms_block", (99999,))])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of blocks in the backward pass."""
        self.encoder.use_activation_checkpointing = enable

    def forward_features(self, x: Tensor) -> Tensor:
        """Images or clips -> the last level of the tokens, [B,N,E]."""
        found = self.encoder(self._clip(x), hierarchical=False)
        assert isinstance(found, Tensor)
        return found

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B,N,E] -> [B,num_classes]; the pooled features [B,E] without a head or with ``pre_logits``."""
        x = self.head_drop(x.mean(1) if self.global_pool == "avg" else x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images or clips -> [B,num_classes], or [B,E] without a head."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        """What comes out of blocks: maps [B,E,H,W] of images and [B,E,T,H,W] of clips, or tokens with ``NLC``.

        Args:
            indices: of blocks; a number n: the last n; None: all.
            norm: whether the last norm is applied to each.
            stop_early: leave the blocks after the last index out.
            output_fmt: ``NCHW`` or ``NLC``.
            intermediates_only: else they come after the normalised output of the last block run.
            kwargs: what timm's other models take; none is used.
        """
        encoder, clip = self.encoder, self._clip(x)
        if encoder.cls_token is not None or encoder.block_causal:
            raise ValueError("features of blocks are not there for a class token or block-causal attention")
        take, last = _chosen(len(encoder.blocks), indices)
        wanted = range(last + 1 if stop_early else len(encoder.blocks))
        grid = encoder.grid(tuple(clip.shape))
        tokens, outs = encoder._embed(clip, grid, None), []
        table = encoder._rope(tokens, grid, None)
        final = encoder.norms_block[-1] if len(encoder.norms_block) else nn.Identity()
        for number in wanted:
            tokens = encoder.blocks[number](tokens, table)
            if number in take:
                outs.append(final(tokens) if norm else tokens)
        if str(getattr(output_fmt, "value", output_fmt)).upper() == "NCHW":
            outs = [out.transpose(1, 2).unflatten(2, grid[1:] if x.dim() == 4 else grid) for out in outs]
        return outs if intermediates_only else (final(tokens), outs)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last of ``indices``, and the head; returns the indices counted from 0."""
        take, last = _chosen(len(self.encoder.blocks), indices)
        self.encoder.blocks = self.encoder.blocks[: last + 1]
        if prune_norm:
            self.encoder.norms_block = nn.ModuleList()
        if prune_head:
            self.reset_classifier(0)
        return take

    def load_pretrained(self, path: str | Path, prefix: str = "") -> None:
        """The weights of whatever ``load_encoder`` reads; the head stays.

        Raises:
            CheckpointError: the file is another encoder; names the arguments of ``create_model`` that fit it.
        """
        mine = architecture(self.encoder)
        try:
            loaded = load_encoder(path)
        except CheckpointError:  # it does not say what it is: this model does
            loaded = load_encoder(path, **{**mine, "img_size": self.encoder.img_size})
        its = architecture(loaded)
        differ = [key for key in its if key not in _SIZES_OF_CLIPS and its[key] != mine[key]]
        if not mine["use_rope"] and its["img_size"] != mine["img_size"]:
            differ.append("img_size")
        if differ:
            its["img_temporal_dim_size"] = its["img_temporal_dim_size"] or 0
            raise CheckpointError(f"{path}: another encoder; give {', '.join(f'{k}={its[k]!r}' for k in differ)}")
        self.encoder.load_state_dict(loaded.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Own names, or those of a checkpoint that ``load_encoder`` reads, as ``checkpoint_path=`` hands it over."""
        own = {key.split(".")[0] for key in state_dict} <= {"encoder", "head"}
        if own and all(isinstance(value, Tensor) for value in state_dict.values()):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        state, _ = encoder_state(state_dict, "target_encoder", Path("checkpoint"))
        load_weights(self.encoder, encoder_tensors(state, self.encoder.use_rope), "checkpoint")
        return nn.modules.module._IncompatibleKeys([], [])

    def _clip(self, x: Tensor) -> Tensor:
        """Images as clips: of one frame where the encoder embeds images, else as standing clips of one tubelet."""
        if x.dim() == 5:
            return x
        frames = 1 if self.encoder.img_temporal_dim_size == 1 else self.encoder.tubelet_size
        return x[:, :, None].expand(-1, -1, frames, -1, -1)


def _chosen(blocks: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """Blocks counted from 0, and the last of them; a number n: the last n; None: all."""
    if indices is None or isinstance(indices, int):
        n = blocks if indices is None else indices
        if not 0 < n <= blocks:
            raise ConfigError(f"out_indices: {n} of {blocks} blocks; accepted: 1 to {blocks}")
        return list(range(blocks - n, blocks)), blocks - 1
    if wrong := [i for i in indices if not -blocks <= i < blocks]:
        raise ConfigError(f"out_indices: there is no block {wrong[0]}; there are {blocks}")
    take = [i % blocks for i in indices]
    return take, max(take)


def _register() -> list[str]:
    from timm.models import generate_default_cfgs, is_model, register_model

    names = [f"vjepa_fast_{size}_patch16_224" for size in SIZES]
    cfg = dict(num_classes=0, custom_load=True, classifier="head", first_conv="encoder.patch_embed_img.proj")
    default_cfgs.update(generate_default_cfgs({f"{name}.untrained": dict(cfg) for name in names}))
    for name, size in zip(names, SIZES):
        if not is_model(name):
            globals()[name] = register_model(_entry(name, size))
    return names


def _entry(name: str, size: str) -> Any:
    def create(
        pretrained: bool = False, pretrained_cfg_overlay: dict[str, Any] | None = None, **kwargs: Any
    ) -> nn.Module:
        from timm.models import build_model_with_cfg

        overlay = dict(pretrained_cfg_overlay or {})
        if "file" in overlay:
            overlay.setdefault("custom_load", True)  # by `TimmEncoder.load_pretrained`
        feature_cfg = dict(out_indices=3, feature_cls="getter")
        return build_model_with_cfg(
            TimmEncoder, name, pretrained, pretrained_cfg_overlay=overlay, feature_cfg=feature_cfg, size=size, **kwargs
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"The encoder {size}, with timm's interface; see `TimmEncoder`."
    return create


NAMES = _register()
