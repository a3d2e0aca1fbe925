"""tubelet_patchify, what the context encoder makes of it, and patch_mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.ops._inputs import GRID, MEAN, PATCH, STD, TUBELET, Case, E, Inputs, N, eager_code
from vjepa_fast import ops
from vjepa_fast.ops.linear import linear
from vjepa_fast.ops.patchify import Tubelets
from vjepa_fast.reference.model import take_tokens


def patch_embed(x: Inputs) -> Case:
    """Pixels to embedded context tokens of both masks: what the context encoder does before its first block.

    The reference normalises the clip once and embeds all of it for every mask, as published; eager embeds it once.
    """
    clip, (enc, _) = x.clip(), x.masks()
    conv = torch.nn.Conv3d(3, E, (TUBELET, PATCH, PATCH), (TUBELET, PATCH, PATCH), device=x.device).to(x.dtype)
    idx, kept = torch.cat(enc, 1), sum(m.shape[1] for m in enc)
    stats = [torch.tensor(s, device=x.device).view(1, 3, 1, 1, 1) for s in (MEAN, STD)]

    def embedded():
        normal = ((clip.float() / 255.0 - stats[0]) / stats[1]).to(x.dtype)
        return lambda: conv(normal).flatten(2).transpose(1, 2)

    def published():
        embed = embedded()
        return torch.cat([take_tokens(embed(), m) for m in enc], 1)

    def once():
        return take_tokens(embedded()(), idx)

    def fused():
        rows = ops.tubelet_patchify(clip, idx, TUBELET, PATCH, MEAN, STD, x.dtype)
        product = linear if x.device.type == "cpu" else F.linear
        return product(rows, conv.weight.flatten(1), conv.bias)

    return Case(
        "patch_embed",
        f"B{x.batch} {kept} of {N} tokens",
        {"reference": published, "eager": once, "fused": fused},
        leaves=list(conv.parameters()),
        compile_=once,
        atol=2e-3 if x.dtype == torch.float32 else 5e-2,
    )


def tubelet_patchify(x: Inputs) -> Case:
    clip, (enc, _) = x.clip(), x.masks()
    idx = torch.cat(enc, 1)
    pixels = 3 * TUBELET * PATCH * PATCH

    def published():
        stats = [torch.tensor(s, device=x.device).view(1, 3, 1, 1, 1) for s in (MEAN, STD)]
        normal = (clip.float() / 255.0 - stats[0]) / stats[1]
        t, h, w = GRID
        rows = normal.view(x.batch, 3, t, TUBELET, h, PATCH, w, PATCH).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return take_tokens(rows.reshape(x.batch, N, pixels), idx).to(x.dtype)

    def ours():
        return ops.tubelet_patchify(clip, idx, TUBELET, PATCH, MEAN, STD, x.dtype)

    def plain():
        return eager_code("tubelet_patchify")(Tubelets(clip, idx, TUBELET, PATCH, MEAN, STD, x.dtype))

    return Case(
        "tubelet_patchify",
        f"B{x.batch} {idx.shape[1]} of {N} tokens",
        {"reference": published, "eager": plain, "fused": ours},
        compile_=plain,
        floor_bytes=idx.numel() * (pixels * (1 + x.size) + 8),
        atol=1e-5 if x.size == 4 else 2e-2,
    )


def patch_mean(x: Inputs) -> Case:
    clip = x.clip()

    def published():
        stats = [torch.tensor(s, device=x.device).view(1, 3, 1, 1, 1) for s in (MEAN, STD)]
        normal = (clip.float() / 255.0 - stats[0]) / stats[1]
        return F.avg_pool3d(normal, (TUBELET, PATCH, PATCH), (TUBELET, PATCH, PATCH)).permute(0, 2, 3, 4, 1)

    def ours():
        return ops.patch_mean(clip, TUBELET, PATCH, MEAN, STD)

    def plain():
        return eager_code("patch_mean")(clip, TUBELET, PATCH, list(MEAN), list(STD))

    return Case(
        "patch_mean",
        f"B{x.batch} clip",
        {"reference": published, "eager": plain, "fused": ours},
        compile_=plain,
        floor_bytes=clip.numel() + x.batch * N * 3 * 4,
    )


CASES = {"patch_embed": patch_embed, "tubelet_patchify": tubelet_patchify, "patch_mean": patch_mean}
