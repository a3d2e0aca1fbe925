"""Clips of a suite in memory, as a study's encoders see them: rendered at its size, then its frames and centre view.

The same geometry as its videos, without the losses of their compression.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import torch

from vjepa_fast.data.synthetic import SUITES, render_clip
from vjepa_fast.data.views.augment import apply_view, centre_view
from vjepa_fast.evaluation import ClipSet


def rendered(name: str, split: str, number: int, size: int, view: Mapping[str, int], seed: int) -> ClipSet:
    """``number`` clips of a split's labels in turn: uint8 ``[n, 3, F, S, S]``; each depends on (seed, suite, split,
    index) alone, and on no clip of a study, whose videos are drawn from another stream.

    Args:
        name: of the suite.
        split: train, val or test.
        number: of clips.
        size: pixels of a rendered frame.
        view: num_frames F, frame_step and crop_size S; a still image is repeated over the frames.
        seed: of everything random.
    """
    suite, clips, labels = SUITES[name], [], []
    possible, place = suite.split_labels(split), centre_view(size, size, view["crop_size"])
    stream = [seed, zlib.crc32(b"instrument"), zlib.crc32(name.encode()), zlib.crc32(split.encode())]
    frames, step = view["num_frames"], view["frame_step"]
    for index in range(number):
        rng = np.random.default_rng([*stream, index])
        clip, label, _ = render_clip(suite, rng, size, frames * step, possible[index % len(possible)])
        clips.append(apply_view(clip[::step], place, view["crop_size"]).expand(-1, frames, -1, -1))
        labels.append(label)
    identity = f"{name} {split} {number} {size} {sorted(view.items())} {seed}"
    return ClipSet(
        torch.stack(clips), np.array(labels, np.int64), identity, f"{name}-{split}", suite.modality == "image"
    )
