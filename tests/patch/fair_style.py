"""A training module in the manner of V-JEPA 2's: what `vjepa_fast.patch` expects to find, written plainly."""

from __future__ import annotations

import math
from multiprocessing import Value

import torch
import torch.nn.functional as F
from torch.utils.data import default_collate


class MaskGenerator:
    def __init__(self, grid, num_blocks, spatial_scale, temporal_scale, aspect_ratio, max_keep=None, inv_block=False):
        self.grid, self.num_blocks, self.max_keep, self.inv_block = grid, num_blocks, max_keep, inv_block
        self.scales = temporal_scale, spatial_scale, aspect_ratio
        self.counter = Value("i", -1)

    def step(self):
        with self.counter.get_lock():
            self.counter.value += 1
            return self.counter.value

    def block_size(self, seed):
        generator = torch.Generator()
        generator.manual_seed(seed)
        t, s, a = (low + torch.rand(1, generator=generator).item() * (high - low) for low, high in self.scales)
        frames, height, width = self.grid
        area = int(height * width * s)
        h, w = int(round(math.sqrt(area * a))), int(round(math.sqrt(area / a)))
        return max(1, int(frames * t)), min(h, height), min(w, width)

    def block(self, size):
        top, left, start = (int(torch.randint(0, self.grid[i] - size[i] + 1, (1,))) for i in (1, 2, 0))
        mask = torch.ones(self.grid, dtype=torch.int32)
        mask[start : start + size[0], top : top + size[1], left : left + size[2]] = 0
        return mask

    def __call__(self, batch_size):
        size = self.block_size(self.step())
        enc, pred = [], []
        while len(enc) < batch_size:
            mask = torch.ones(self.grid, dtype=torch.int32)
            for _ in range(self.num_blocks):
                mask = mask * self.block(size)
            mask = mask.flatten()
            if mask.any():
                enc.append(mask.nonzero()[:, 0])
                pred.append((mask == 0).nonzero()[:, 0])
        keep = min(map(len, enc))
        keep = keep if self.max_keep is None else min(keep, self.max_keep)
        enc = default_collate([x[:keep] for x in enc])
        pred = default_collate([x[: min(map(len, pred))] for x in pred])
        return (pred, enc) if self.inv_block else (enc, pred)


class MaskCollator:
    def __init__(self, cfgs_mask, dataset_fpcs, crop_size=(224, 224), patch_size=(16, 16), tubelet_size=2):
        crop_size = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
        patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        side = [c // p for c, p in zip(crop_size, patch_size)]
        self.mask_generators = {
            fpc: [MaskGenerator((fpc // tubelet_size, *side), **mask) for mask in cfgs_mask] for fpc in dataset_fpcs
        }

    def step(self):
        for generators in self.mask_generators.values():
            for generator in generators:
                generator.step()

    def __call__(self, batch):
        found = []
        for fpc, generators in self.mask_generators.items():
            samples = [sample for sample in batch if len(sample[-1][-1]) == fpc]
            if samples:
                masks = [generator(len(samples)) for generator in generators]
                found.append((default_collate(samples), [enc for enc, _ in masks], [pred for _, pred in masks]))
        return found


def apply_masks(x, masks, concat=True):
    parts = [torch.gather(x, 1, mask.unsqueeze(-1).repeat(1, 1, x.size(-1))) for mask in masks]
    return torch.cat(parts, 0) if concat else parts


def loss_fn(z, h, masks_pred, loss_exp=1.0):
    loss, n = 0, 0
    for zi, hi, mi in zip(z, h, masks_pred):
        for zij, hij in zip(zi, apply_masks(hi, mi, concat=False)):
            loss = loss + torch.mean(torch.abs(zij - hij) ** loss_exp) / loss_exp
            n += 1
    return loss / n


CFGS = [
    dict(num_blocks=4, spatial_scale=(0.2, 0.4), temporal_scale=(0.5, 1.0), aspect_ratio=(0.75, 1.5)),
    dict(num_blocks=5, spatial_scale=(0.5, 0.6), temporal_scale=(1.0, 1.0), aspect_ratio=(0.9, 1.1), max_keep=9),
]


def main(steps=3, loss_exp=1.0, resume=0):
    """Losses of a few steps of a tiny model on clips of 4 and 8 frames; all of the namespace is used."""
    torch.manual_seed(0)
    collator = MaskCollator(cfgs_mask=CFGS, dataset_fpcs=[4, 8], crop_size=32, patch_size=8, tubelet_size=2)
    for _ in range(resume):
        collator.step()
    encoder, predictor = torch.nn.Linear(6, 16), torch.nn.Linear(16, 16)
    parameters = [*encoder.parameters(), *predictor.parameters()]
    optimizer, losses = torch.optim.SGD(parameters, lr=0.1), []
    for _ in range(steps):
        samples = [([torch.randn(n // 2 * 16, 6)], 0, [list(range(n))]) for n in (4, 8, 4, 8, 4)]
        groups = collator(samples)
        x = [clips[0] for (clips, _, _), _, _ in groups]
        masks_pred = [pred for _, _, pred in groups]
        with torch.no_grad():
            h = [F.layer_norm(encoder(xi), (16,)) for xi in x]
        z = [[predictor(encoder(part)) for part in apply_masks(xi, mi, concat=False)] for xi, mi in zip(x, masks_pred)]
        loss = loss_fn(z, h, masks_pred, loss_exp)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
