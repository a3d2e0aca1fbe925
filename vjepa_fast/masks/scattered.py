"""Masks of single tokens drawn uniformly over the grid, as in masked autoencoders (arXiv:2111.06377, 2205.09113)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from vjepa_fast.config.schema import MaskConfig, MasksConfig
from vjepa_fast.errors import ConfigError
from vjepa_fast.masks.api import STRATEGIES, MaskStrategy
from vjepa_fast.ops.block_masks import BlockMasks


@STRATEGIES.register("random")
class RandomMasks(MaskStrategy):
    """One mask per entry of ``masks.specs``: single tokens drawn uniformly, the same number in every sample.

    Options: ``context`` is the share of the grid's tokens that is context, ``predict`` the share of all others that
    is predicted; at least one token each. Specs are empty (``specs: [{}]`` is one mask): there are no blocks.
    """

    OPTIONS: ClassVar[Mapping[str, Any]] = {"context": 0.25, "predict": 1.0}

    def __init__(self, cfg: MasksConfig, **settings: Any) -> None:
        super().__init__(cfg, **settings)
        self.number = len(cfg.specs)

    @classmethod
    def check(cls, cfg: MasksConfig, section: str = "masks") -> None:
        """As ``MaskStrategy.check``; also a share outside of its range, or specs that describe blocks."""
        super().check(cfg, section)
        options = {**cls.OPTIONS, **cfg.options}
        for name, highest in (("context", 0.95), ("predict", 1.0)):
            if not 0 < options[name] <= highest:
                raise ConfigError(
                    f"{section}.options.{name}: must be greater than 0 and at most {highest:g}, got {options[name]}"
                )
        if cfg.specs != MasksConfig().specs and any(spec != MaskConfig() for spec in cfg.specs):
            raise ConfigError(
                f"{section}.specs: strategy random has no blocks to describe; give one empty entry per mask, "
                f"as in specs: [{{}}], and the shares in {section}.options"
            )

    def sample(
        self, clip: Tensor, grid: tuple[int, int, int], *, step: int, first_sample: int, group: int
    ) -> BlockMasks:
        """As ``MaskStrategy.sample``, drawn on the CPU."""
        tokens, batch = grid[0] * grid[1] * grid[2], clip.shape[0]
        context = min(max(1, round(tokens * self.options["context"])), tokens - 1)
        predicted = max(1, round((tokens - context) * self.options["predict"]))
        rank_SBN = torch.empty(self.number, batch, tokens, dtype=torch.int64)
        for b in range(batch):
            generator = self.generator(step=step, sample=first_sample + b, group=group)
            for mask_BN in rank_SBN:
                mask_BN[b] = torch.randperm(tokens, generator=generator)
        within = rank_SBN < context, (rank_SBN >= context) & (rank_SBN < context + predicted)
        return self.cut(*within, step=step, first_sample=first_sample, group=group)
