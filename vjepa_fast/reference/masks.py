"""The published mask collator: loops over samples and blocks, drawing from torch's global generator in its order.

Block sizes come from a generator seeded with a call counter (whatever the run's seed); positions from the global one.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


def motion_map(clip, grid, per_sample: bool = False):
    """Absolute frame difference, mean over RGB, first one repeated, trilinear to the grid, over its maximum.

    ``clip [B,3,F,Y,X]`` float -> ``[B,T,H,W]``, or None for a single frame. As published, the maxima ``[B,1,1]``
    broadcast along time: slice t of every map is divided by the maximum of sample t, which is only possible for B in
    {1, T}. ``per_sample`` divides as the paper means it.
    """
    if clip.shape[2] < 2:
        return None
    change = (clip[:, :, 1:] - clip[:, :, :-1]).abs().mean(dim=1)
    change = torch.cat([change[:, :1], change], dim=1)
    maps = F.interpolate(change.unsqueeze(1), size=tuple(grid), mode="trilinear", align_corners=False).squeeze(1)
    peak = maps.flatten(1).max(dim=1).values.clamp(min=1e-6)
    return maps / (peak.view(-1, 1, 1, 1) if per_sample else peak.view(-1, 1, 1))


class MaskGenerator:
    """Masks of one configuration; called with (batch_size, motion ``[B,T,H,W]`` or None) -> ``[B,Ke]``, ``[B,Kp]``."""

    def __init__(
        self,
        *,
        grid,
        num_blocks=8,
        spatial_scale=(0.15, 0.15),
        temporal_scale=(1.0, 1.0),
        aspect_ratio=(0.75, 1.5),
        max_temporal_keep=1.0,
        max_keep=None,
        full_complement=False,
        pred_full_complement=False,
        inv_block=False,
        motion_guided=False,
        motion_guided_strength=2.0,
        motion_guided_random_rate=0.1,
    ):
        self.duration, self.height, self.width = grid
        self.num_blocks = num_blocks
        self.spatial_scale, self.temporal_scale, self.aspect_ratio = spatial_scale, temporal_scale, aspect_ratio
        self.max_context_duration = max(1, int(self.duration * max_temporal_keep))
        self.max_keep = max_keep
        self.full_complement, self.pred_full_complement = full_complement, pred_full_complement
        self.inv_block = inv_block
        self.motion_guided = motion_guided
        self.strength, self.random_rate = motion_guided_strength, motion_guided_random_rate
        self.counter = -1

    def sample_block_size(self, counter: int) -> tuple[int, int, int]:
        """(t, h, w) of the blocks of call number ``counter``."""
        generator = torch.Generator().manual_seed(counter)

        def uniform(bounds):
            return bounds[0] + torch.rand(1, generator=generator).item() * (bounds[1] - bounds[0])

        t = max(1, int(self.duration * uniform(self.temporal_scale)))
        area = int(self.height * self.width * uniform(self.spatial_scale))
        aspect = uniform(self.aspect_ratio)
        h = min(int(round(math.sqrt(area * aspect))), self.height)
        w = min(int(round(math.sqrt(area / aspect))), self.width)
        return t, h, w

    def origin_probabilities(self, motion, size):
        """``motion [T,H,W]`` -> (origins, float32 probabilities): every position of the block is scored on its own."""
        t, h, w = size
        origins, scores = [], []
        for start in range(self.duration - t + 1):
            for top in range(self.height - h + 1):
                for left in range(self.width - w + 1):
                    score = motion[start : start + t, top : top + h, left : left + w].mean().clamp(min=1e-6)
                    origins.append((start, top, left))
                    scores.append(score)
        weights = torch.stack(scores) ** self.strength
        return origins, weights / weights.sum()

    def sample_origin(self, size, guidance):
        """(start, top, left) of a block; ``guidance``: what ``origin_probabilities`` returns, or None: uniform."""
        if guidance is not None:
            origins, probabilities = guidance
            if torch.rand(1).item() < self.random_rate:
                return origins[int(torch.randint(0, len(origins), (1,)))]
            return origins[int(torch.multinomial(probabilities, 1))]
        t, h, w = size
        top = int(torch.randint(0, self.height - h + 1, (1,)))
        left = int(torch.randint(0, self.width - w + 1, (1,)))
        start = int(torch.randint(0, self.duration - t + 1, (1,)))
        return start, top, left

    def sample_block_mask(self, size, guidance):
        """int32 ``[T,H,W]``, 0 where predicted."""
        t, h, w = size
        start, top, left = self.sample_origin(size, guidance)
        mask = torch.ones((self.duration, self.height, self.width), dtype=torch.int32)
        mask[start : start + t, top : top + h, left : left + w] = 0
        mask[self.max_context_duration :] = 0
        return mask

    def __call__(self, batch_size, motion=None):
        """The next masks: context ``[B,Ke]`` and predicted ``[B,Kp]``."""
        self.counter += 1
        size = self.sample_block_size(self.counter)
        tokens = self.duration * self.height * self.width
        enc, pred = [], []
        for b in range(batch_size):
            guidance = None
            if self.motion_guided and motion is not None:
                guidance = self.origin_probabilities(motion[b], size)
            while True:
                mask = torch.ones((self.duration, self.height, self.width), dtype=torch.int32)
                for _ in range(self.num_blocks):
                    mask *= self.sample_block_mask(size, guidance)
                mask = mask.flatten()
                if mask.any():
                    break
            enc.append(mask.nonzero().flatten())
            pred.append((mask == 0).nonzero().flatten())
        keep_enc, keep_pred = min(len(m) for m in enc), min(len(m) for m in pred)
        if self.max_keep is not None:
            keep_enc = min(keep_enc, self.max_keep)
        enc, pred = [m[:keep_enc] for m in enc], [m[:keep_pred] for m in pred]
        if self.full_complement:
            pred = [self._complement(m, tokens) for m in enc]
        elif self.pred_full_complement:
            enc = [self._complement(m, tokens) for m in pred]
        enc, pred = torch.stack(enc), torch.stack(pred)
        return (pred, enc) if self.inv_block else (enc, pred)

    @staticmethod
    def _complement(mask, tokens):
        return torch.tensor(sorted(set(range(tokens)) - set(mask.tolist())), dtype=mask.dtype)


class MaskCollator:
    """One generator per mask; ``call(clip)`` -> (masks_enc, masks_pred), lists of ``[B,K]``."""

    def __init__(self, configs, grid, per_sample_motion: bool = False):
        self.grid = tuple(grid)
        self.per_sample_motion = per_sample_motion
        self.generators = [MaskGenerator(grid=self.grid, **config) for config in configs]

    def __call__(self, clip):
        """Masks of ``clip [B,3,F,Y,X]``."""
        motion = None
        if any(generator.motion_guided for generator in self.generators):
            motion = motion_map(clip.float(), self.grid, self.per_sample_motion)
        pairs = [generator(clip.shape[0], motion) for generator in self.generators]
        return [enc for enc, _ in pairs], [pred for _, pred in pairs]
