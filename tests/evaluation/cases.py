"""Data with a planted label, tiny encoders, and a run folder as training leaves it."""

import numpy as np
import torch
from torch import nn

from vjepa_fast import config, models
from vjepa_fast.evaluation import ClipSet, Features, random_encoder
from vjepa_fast.models import build_encoder


def planted_features(classes, seed, first=0, per_class=24, signal=8, width=24, noise=6.0, spread=0.25):
    """Class means in a subspace of ``signal`` directions, the same for all parts, under noise that is much larger."""
    rng = np.random.default_rng(seed)
    mix = np.linalg.qr(np.random.default_rng(99).standard_normal((width, width)))[0]
    y = np.repeat(np.arange(classes), per_class)
    part = rng.standard_normal((classes, signal))[y] + spread * rng.standard_normal((len(y), signal))
    x = np.concatenate([part, noise * rng.standard_normal((len(y), width - signal))], 1)
    return Features(x @ mix, y + first, f"planted {first}")


def planted_clips(hues, seed, first=0, per_class=12):
    """Clips uint8 [n,3,4,32,32]: a square of the class's hue on grey blocks that differ from clip to clip; where it is,
    which way it goes and how bright all is tell nothing."""
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(len(hues)), per_class)
    out = np.empty((len(y), 3, 4, 32, 32), np.float32)
    for clip, label in zip(out, y):
        blocks = rng.standard_normal((4, 4)).repeat(8, 0).repeat(8, 1)
        clip[:] = rng.uniform(0.2, 0.8) + 0.25 * blocks
        colour = 0.35 * np.cos(2 * np.pi * (hues[label] - np.arange(3) / 3)) + rng.uniform(0.3, 0.7)
        (top, left), (dy, dx) = rng.integers(0, 16, 2), rng.integers(-2, 3, 2)
        for f in range(4):
            yy, xx = np.clip(top + f * dy, 0, 20), np.clip(left + f * dx, 0, 20)
            clip[:, f, yy : yy + 12, xx : xx + 12] = colour[:, None, None]
    clips = torch.from_numpy((out.clip(0, 1) * 255).astype(np.uint8))
    return ClipSet(clips, y + first, f"planted-{seed}-{first}", f"planted {first}")


def planted_parts():
    """(base, val, novel): 12, 6 and 6 hues, none in two."""
    hues = np.arange(24) / 24
    return planted_clips(hues[::2], 0), planted_clips(hues[3::4], 1, 20), planted_clips(hues[1::4], 2, 40)


def shuffled(part, seed=0):
    """The same part with its labels in random order."""
    order = np.random.default_rng(seed).permutation(len(part.y if isinstance(part, Features) else part.labels))
    if isinstance(part, Features):
        return Features(part.x, part.y[order], part.name)
    return ClipSet(part.clips, part.labels[order], part.hash, part.name)


def tiny_encoder():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return (
            build_encoder(
                embed_dim=24, depth=2, num_heads=2, img_size=32, patch_size=8, num_frames=4, tubelet_size=2, levels=2
            )
            .eval()
            .requires_grad_(False)
        )


SMALL = [
    "data.crop_size=32",
    "data.patch_size=16",
    "data.dataset_fpcs=[4]",
    "data.frame_sample_rate=2",
    "model.embed_dim=24",
    "model.depth=4",
    "model.num_heads=2",
]


def small_run(folder, *overrides, encoders=("encoder", "target_encoder")):
    """A run folder whose target and student differ, with weights unlike the seed's."""
    cfg = config.load("demo_baseline_single", [*SMALL, *overrides])
    (folder / "checkpoints").mkdir()
    states = {name: models.to_fair(random_encoder(cfg, seed=100 + i).state_dict()) for i, name in enumerate(encoders)}
    torch.save({**states, "config": config.to_dict(cfg), "step": 3}, folder / "checkpoints" / "step-00000003.pt")
    return folder


def error_of(capsys):
    """The one error line that a command printed."""
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    return errors[0]


class Toy(nn.Module):
    """A patch embedding and nothing else, with the interface of an encoder."""

    def __init__(self, seed=0, width=6):
        super().__init__()
        torch.manual_seed(seed)
        self.proj = nn.Conv3d(3, width, (2, 8, 8), stride=(2, 8, 8))
        self.calls = 0

    def grid(self, shape):
        return (max(1, shape[2] // 2), shape[3] // 8, shape[4] // 8)

    def forward(self, clip, masks=None, hierarchical=True):
        self.calls += 1
        if clip.shape[2] == 1:
            clip = clip.repeat(1, 1, 2, 1, 1)
        z = self.proj(clip).flatten(2).mT
        return torch.cat([z, z + 1], -1) if hierarchical else z
