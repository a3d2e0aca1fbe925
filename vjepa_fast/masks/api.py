"""What a mask strategy is: it draws which tokens of a clip are context and which are predicted.

Legend: S masks, B samples, N = T*H*W tokens of the grid, token index n = (t*H + h)*W + w.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vjepa_fast.config.checks import not_multiple, refuse, token_grid
from vjepa_fast.config.fields import require
from vjepa_fast.config.schema import MasksConfig
from vjepa_fast.errors import ConfigError
from vjepa_fast.layers.packed import Packed
from vjepa_fast.masks.drawn import DrawnMasks
from vjepa_fast.ops.block_masks import BlockMasks
from vjepa_fast.registry import Registry, suggestion

Masks = tuple[list[Tensor] | list[Packed], list[Tensor] | list[Packed]]


class MaskStrategy(ABC):
    """Draws the context and prediction masks of a batch; stateless, so a resumed run draws the same.

    A new strategy derives from this, implements `sample` and registers itself:
    ``@STRATEGIES.register("mine")``, then ``masks.strategy: mine``. What it takes in ``masks.options`` are its
    ``OPTIONS``, names with their defaults; `check` compares names and types, ranges are its own to check.

    Args:
        cfg: what ``masks`` (or ``img_masks``) of the recipe holds.
        crop_size, patch_size: pixels. tubelet_size: frames.
        seed: 64-bit key of all draws.
        mean, std: of the clip's normalisation, per channel in [0, 1] units.
        compat: ``published`` or ``intended``.
        section: of the recipe, for error texts.

    Attributes:
        options: ``cfg.options`` over the defaults. truncate: ``cfg.truncate``. The others as given.

    Raises:
        ConfigError: a value cannot be used, or the crop is no multiple of the patch.
    """

    OPTIONS: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        cfg: MasksConfig,
        *,
        crop_size: int,
        patch_size: int,
        tubelet_size: int,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        compat: str,
        section: str = "masks",
    ) -> None:
        self.check(cfg, section)
        self.options = {**self.OPTIONS, **cfg.options}
        self.truncate = cfg.truncate
        self.patch_size, self.tubelet_size = patch_size, tubelet_size
        self.seed, self.mean, self.std, self.compat = seed, mean, std, compat
        refuse(not_multiple(crop_size, patch_size, "data.crop_size", "data.patch_size"))

    @classmethod
    def check(cls, cfg: MasksConfig, section: str = "masks") -> None:
        """Raise ConfigError, with the key, for a value that this strategy cannot use."""
        require(cfg, section)
        for key, value in cfg.options.items():
            if key not in cls.OPTIONS:
                accepted = ", ".join(cls.OPTIONS) or "none"
                raise ConfigError(
                    f"{section}.options.{key}: unknown option; this strategy takes: {accepted}"
                    f"{suggestion(str(key), cls.OPTIONS)}"
                )
            default = cls.OPTIONS[key]
            kinds = (int, float) if type(default) is float else (type(default),)
            if default is not None and type(value) not in kinds:
                kind = "a number" if type(default) is float else f"a value like {default!r}"
                raise ConfigError(f"{section}.options.{key}: expected {kind}, got {value!r}")

    def check_group(self, grid: tuple[int, int, int], *, clips: int | None, group: int) -> None:  # noqa: B027 (optional)
        """Raise ConfigError for a ``group`` of so many ``clips`` (None: it differs) that `sample` would refuse.

        A run asks before its first batch about every group that a batch may hold.
        """

    def grid(self, clip_shape: Sequence[int]) -> tuple[int, int, int]:
        """(T, H, W) of a clip ``[B,C,F,Y,X]``; a single frame is one time step. ConfigError if it does not divide."""
        frames, height, width = clip_shape[2:]
        tubelet = 1 if frames == 1 else self.tubelet_size
        return token_grid(frames, height, width, tubelet=tubelet, patch=self.patch_size)

    def __call__(self, clip: Tensor, *, step: int, first_sample: int, group: int = 0) -> Masks:
        """Masks of one group of clips.

        Args:
            clip: ``[B,C,F,Y,X]``, uint8 or normalised float.
            step: of the run.
            first_sample: global index of ``clip[0]``; the samples count on from it.
            group: which of a step's groups of clips (by frames per clip) this is; groups draw independently.

        Returns:
            (masks_enc, masks_pred): lists with one int64 ``[B,K]`` of ascending token indices per mask; with
            ``truncate: none`` one ``layers.Packed`` per mask, as the samples differ in length.

        Raises:
            ConfigError: no context is left, naming the mask; or the clip does not divide into tokens.
        """
        return self.draw(clip, step=step, first_sample=first_sample, group=group).wait()

    def draw(self, clip: Tensor, *, step: int, first_sample: int, group: int = 0) -> DrawnMasks:
        """The same, without waiting for the device that draws them: ``DrawnMasks.wait`` returns the lists."""
        grid = self.grid(clip.shape)
        masks = self.sample(clip, grid, step=step, first_sample=first_sample, group=group)
        fields = (masks.enc, masks.pred, masks.enc_len, masks.pred_len)
        if any(x.device != clip.device for x in fields):  # drawn on the CPU for clips elsewhere
            masks = BlockMasks(*(x.to(clip.device, non_blocking=True) for x in fields))
        return DrawnMasks(masks, packed=self.truncate == "none")

    @abstractmethod
    def sample(
        self, clip: Tensor, grid: tuple[int, int, int], *, step: int, first_sample: int, group: int
    ) -> BlockMasks:
        """Draw the masks of one group of clips; arguments as for a call, ``grid`` is (T, H, W).

        What is drawn for a sample must depend on (seed, step, first_sample + b, group) and its own clip only; `cut`
        then gives all samples one length, where ``truncate`` asks for it.
        """

    def generator(self, *, step: int, sample: int, group: int, purpose: str = "masks") -> torch.Generator:
        """A CPU generator of random numbers that is a function of the seed and its arguments alone."""
        key = f"{self.seed}/{step}/{sample}/{group}/{purpose}"
        digest = hashlib.sha256(key.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def cut(self, context: Tensor, predicted: Tensor, *, step: int, first_sample: int, group: int) -> BlockMasks:
        """Masks from maps, with one length for all samples of a mask as ``truncate`` asks.

        Args:
            context, predicted: bool ``[S,B,N]``; no token is in both.
            step, first_sample, group: as `sample` got them.

        Returns:
            ``batch``: the earliest tokens of each sample, as many as the sample with the fewest has; ``random``: so
            many drawn at random; ``none``: all.
        """
        order = torch.arange(context.shape[2], device=context.device).expand(context.shape[1:])
        if self.truncate == "random":
            keys = [dict(step=step, sample=first_sample + b, group=group) for b in range(context.shape[1])]
            rows = [torch.randperm(len(order[0]), generator=self.generator(**k, purpose="truncate")) for k in keys]
            order = torch.stack(rows).to(context.device)
        enc, enc_len = _cut(context, order, self.truncate != "none")
        pred, pred_len = _cut(predicted, order, self.truncate != "none")
        return BlockMasks(enc, pred, enc_len, pred_len)


def _cut(kept_SBN: Tensor, order_BN: Tensor, one_length: bool) -> tuple[Tensor, Tensor]:
    """Ascending indices of the tokens kept, followed by zeros, and their number; the first in ``order`` are kept."""
    tokens = kept_SBN.shape[2]
    length_SB = kept_SBN.sum(2)
    if one_length:
        length_SB = length_SB.amin(1, keepdim=True).expand_as(length_SB).contiguous()
        rank_SBN = (
            order_BN.expand_as(kept_SBN).masked_fill(~kept_SBN, tokens).argsort(dim=2, stable=True).argsort(dim=2)
        )
        kept_SBN = kept_SBN & (rank_SBN < length_SB[..., None])
    index_N = torch.arange(tokens, device=kept_SBN.device)
    index_SBN = torch.where(kept_SBN, index_N, tokens).sort(2).values
    return index_SBN.masked_fill(index_SBN == tokens, 0), length_SB


def _check(name: str, kind: type[MaskStrategy]) -> None:
    if not (isinstance(kind, type) and issubclass(kind, MaskStrategy)):
        raise TypeError(f"mask strategy {name!r} must be a class derived from vjepa_fast.masks.MaskStrategy")


STRATEGIES: Registry[type[MaskStrategy]] = Registry("mask strategy", package="vjepa_fast.masks", check=_check)
