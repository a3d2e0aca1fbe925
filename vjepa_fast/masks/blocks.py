"""Multi-block masks (V-JEPA, arXiv:2404.08471, section 3.2), whose specs may each be guided by motion."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vjepa_fast.config.schema import MasksConfig
from vjepa_fast.masks.api import STRATEGIES, MaskStrategy
from vjepa_fast.ops.block_masks import BlockMasks, check_number, sample_block_masks
from vjepa_fast.ops.saliency import check_published, motion_saliency


@STRATEGIES.register("blocks")
class MaskSampler(MaskStrategy):
    """One mask per entry of ``masks.specs``: the union of its blocks is predicted.

    The blocks of a spec with ``motion_guided`` start where the clip moves (arXiv:2605.17165). With ``compat:
    published`` motion maps are normalised as in the released code.
    """

    def __init__(self, cfg: MasksConfig, **settings: Any) -> None:
        super().__init__(cfg, **settings)
        self.specs = tuple(cfg.specs)
        self.saliency = cfg.saliency

    def sample(
        self, clip: Tensor, grid: tuple[int, int, int], *, step: int, first_sample: int, group: int
    ) -> BlockMasks:
        """As ``MaskStrategy.sample``, drawn where the clip is."""
        return sample_block_masks(
            clip.shape[0],
            grid,
            self.specs,
            self._motion(clip, grid),
            seed=self.seed,
            step=step,
            first_sample=first_sample,
            truncate=self.truncate,
            first_spec=group * len(self.specs),
            device=clip.device,
        )

    def check_group(self, grid: tuple[int, int, int], *, clips: int | None, group: int) -> None:
        """As ``MaskStrategy.check_group``: there are too many masks, or published motion maps do not fit the batch."""
        check_number(len(self.specs), group * len(self.specs))
        if clips is not None and self.compat == "published" and any(spec.motion_guided for spec in self.specs):
            check_published(clips, grid[0])

    def _motion(self, clip: Tensor, grid: tuple[int, int, int]) -> Tensor | None:
        """``[B,T,H,W]`` map of ``clip``, or None where no spec is guided or a single frame shows no motion.

        ``compat: published`` uses the released code's normalisation, which raises ConfigError unless B is 1 or T.
        """
        if clip.shape[2] == 1 or not any(spec.motion_guided for spec in self.specs):
            return None
        normalize = "published" if self.compat == "published" else "sample"
        return motion_saliency(clip, grid, self.mean, self.std, mode=self.saliency, normalize=normalize)
