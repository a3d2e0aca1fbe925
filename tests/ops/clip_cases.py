"""Clips for the tests of the kernels that read them, and how those are held to the exact values."""

from __future__ import annotations

import torch

from tests.ops.parity import KERNELS, assert_parity

DTYPES = [torch.uint8, torch.float32, torch.bfloat16]
MEAN, STD = (0.4, 0.5, 0.6, 0.3), (0.2, 0.25, 0.3, 0.1)
AVAILABLE = [k.values[0] for k in KERNELS if not k.marks[0].args[0]]  # those that pytest would not skip

VIEWS = {  # of a clip, with its values but other strides
    "channels last": lambda x: x.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3),
    "every third frame": lambda x: x.repeat_interleave(3, 2)[:, :, 1::3],
    "every other column": lambda x: x.repeat_interleave(2, 4)[..., ::2],
    "transposed": lambda x: x.transpose(3, 4).contiguous().transpose(3, 4),
    "crop": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 4))[..., 1:-4, 3:-2],
}


def make_clip(shape, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype, generator=g)
    return torch.randn(shape, generator=g).to(dtype)


def assert_clip_parity(op, clip, *, backend, view=lambda x: x, wrt=()):
    """``op(clip, mean, std)`` by parity's bound; the exact value of a uint8 clip is that of its float64 pixels."""
    mean, std = MEAN[: clip.shape[1]], STD[: clip.shape[1]]

    def fn(c):
        if clip.dtype == torch.uint8 and c.dtype == torch.float64:
            m, s = (torch.tensor(v, dtype=c.dtype).view(-1, 1, 1, 1) for v in (mean, std))
            c = (c / 255 - m) / s
        elif clip.dtype == torch.uint8:
            c = c.to(torch.uint8)
        return op(view(c), mean, std)

    dtype = clip.dtype if clip.is_floating_point() else torch.float32
    assert_parity(fn, [clip.to(dtype)], backend=backend, dtype=dtype, wrt=wrt)
