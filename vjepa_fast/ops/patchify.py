"""From pixels to tubelets: the gather that feeds the patch embedding, colour means, normalisation.

Legend: B batch, C channels, F frames, grid (T,H,W), N = T*H*W tokens, K kept tokens, P = C*tubelet*patch*patch pixels
of a tubelet, ordered (channel, frame, row, column): ``F.linear(patches, conv3d.weight.flatten(1), conv3d.bias)`` is the
Conv3d with kernel and stride (tubelet, patch, patch).

uint8 clips are divided by 255, then normalised with mean and std; float clips are taken as already normalised.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch

from vjepa_fast.ops import _backend, _check

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalize_clip(
    clip: torch.Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> torch.Tensor:
    """The normalised clip.

    Args:
        clip: [B,C,F,height,width]; uint8 is divided by 255 and normalised; a float clip is returned as it is, in
            promote_types(dtype, float32).
        mean, std: C values each, of pixels in [0, 1].
    Returns:
        [B,C,F,height,width] float32 (float64 if the clip is).
    Raises:
        ValueError: a shape or dtype does not fit.
    """
    _check.clip("normalize_clip", clip)
    mean, std = _check.channel_stats("normalize_clip", mean, std, clip.shape[1])
    if clip.dtype != torch.uint8:
        return clip.to(torch.promote_types(clip.dtype, torch.float32))
    return _normalize(clip.to(torch.float32), 1, mean, std)


def tubelet_patchify(
    clip: torch.Tensor,
    idx: torch.Tensor | None,
    tubelet: int,
    patch: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The kept tubelets of a clip as rows: gather, conversion, normalisation and cast in one go.

    Args:
        clip: [B,C,F,height,width], uint8 or floating (taken as normalised).
        idx: int64 [B,K] token indices n = (t*H+h)*W+w to keep, in this order; None keeps all N.
        tubelet, patch: frames and pixels of a tubelet; they must divide F, height and width.
        mean, std: C values each, for uint8 clips.
        out_dtype: floating dtype of the result; None means float32 for uint8 and the clip's dtype otherwise.
    Returns:
        [B,K,P], or [B,N,P] without ``idx``. A float clip receives gradient.
    Raises:
        ValueError: a shape, dtype or (on the CPU) token index does not fit.
    """
    op = "tubelet_patchify"
    _check.clip(op, clip, tubelet, patch)
    mean, std = _check.channel_stats(op, mean, std, clip.shape[1])
    if idx is not None:
        _check.indices(op, "idx", idx, batch=clip.shape[0])
    out_dtype = out_dtype or (torch.float32 if clip.dtype == torch.uint8 else clip.dtype)
    _check.require(out_dtype.is_floating_point, op, "out_dtype", "a floating dtype", out_dtype)
    return _patchify(clip, idx, tubelet, patch, mean, std, out_dtype)


def patch_mean(
    clip: torch.Tensor,
    tubelet: int,
    patch: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> torch.Tensor:
    """Mean colour of each tubelet of the normalised clip: the target of the action-conditioning (``ac``) objective.

    Args:
        clip, tubelet, patch, mean, std: as in ``tubelet_patchify``.
    Returns:
        [B,T,H,W,C] in promote_types(clip dtype, float32) (float32 for uint8). A float clip receives gradient.
    Raises:
        ValueError: a shape or dtype does not fit.
    """
    _check.clip("patch_mean", clip, tubelet, patch)
    mean, std = _check.channel_stats("patch_mean", mean, std, clip.shape[1])
    return _patch_mean(clip, tubelet, patch, mean, std)


def _compute_dtype(clip: torch.Tensor) -> torch.dtype:
    return torch.promote_types(clip.dtype, torch.float32)  # uint8 gives float32


def _normalize(x: torch.Tensor, dim: int, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """In place: x in 0..255, channels along ``dim``. By scalars, as a tensor of them would be copied to the device."""
    for c, (m, s) in enumerate(zip(mean, std, strict=True)):
        x.select(dim, c).mul_(1 / (255 * s)).sub_(m / s)
    return x


def _tubelets(clip: torch.Tensor, tubelet: int, patch: int) -> torch.Tensor:
    """View [B,T,H,W,C,tubelet,patch,patch]."""
    x = clip.unflatten(4, (-1, patch)).unflatten(3, (-1, patch)).unflatten(2, (-1, tubelet))
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7)


def _rows(idx_BK: torch.Tensor, n: int) -> torch.Tensor:
    return (idx_BK + torch.arange(idx_BK.shape[0], device=idx_BK.device)[:, None] * n).flatten()


@_backend.register("tubelet_patchify", "eager")
def _patchify_eager(
    clip: torch.Tensor, idx: torch.Tensor | None, tubelet: int, patch: int, mean: list[float], std: list[float],
    out_dtype: torch.dtype,
) -> torch.Tensor:
    b, c = clip.shape[:2]
    x = _tubelets(clip, tubelet, patch)
    n, p = x.shape[1] * x.shape[2] * x.shape[3], c * tubelet * patch * patch
    if idx is None:
        x = x.reshape(b, n, p).contiguous()
    else:  # gathered in the clip's own dtype, a quarter of the traffic for uint8
        x = x.reshape(b * n, p).index_select(0, _rows(idx, n)).view(b, idx.shape[1], p)
    if clip.dtype == torch.uint8:
        x = x.to(torch.promote_types(out_dtype, torch.float32)).view(b, -1, c, p // c)
        x = _normalize(x, 2, mean, std).view(b, -1, p)
    x = x.to(out_dtype)
    return x.clone() if x.untyped_storage().data_ptr() == clip.untyped_storage().data_ptr() else x


@torch.library.custom_op("vjepa_fast::tubelet_patchify", mutates_args=())
def _patchify(
    clip: torch.Tensor, idx: torch.Tensor | None, tubelet: int, patch: int, mean: Sequence[float],
    std: Sequence[float], out_dtype: torch.dtype,
) -> torch.Tensor:
    if idx is not None:
        n = clip.shape[2] // tubelet * (clip.shape[3] // patch) * (clip.shape[4] // patch)
        _check.in_range("tubelet_patchify", "idx", idx, n)
    return _backend.call("tubelet_patchify", clip, idx, tubelet, patch, mean, std, out_dtype)


@_patchify.register_fake
def _(clip, idx, tubelet, patch, mean, std, out_dtype):
    b, c, f, height, width = clip.shape
    k = (f // tubelet) * (height // patch) * (width // patch) if idx is None else idx.shape[1]
    return clip.new_empty((b, k, c * tubelet * patch * patch), dtype=out_dtype)


def _patchify_save(ctx, inputs, output):
    clip, idx, ctx.tubelet, ctx.patch, _, _, _ = inputs
    ctx.clip = clip.shape, clip.dtype
    ctx.save_for_backward(idx)


def _patchify_backward(ctx, grad):
    (idx,), (shape, dtype), tubelet, patch = ctx.saved_tensors, ctx.clip, ctx.tubelet, ctx.patch
    b, c, f, height, width = shape
    t, h, w = f // tubelet, height // patch, width // patch
    if idx is not None:
        full = grad.new_zeros(b * t * h * w, grad.shape[2])
        grad = full.index_add(0, _rows(idx, t * h * w), grad.flatten(0, 1))
    x = grad.reshape(b, t, h, w, c, tubelet, patch, patch).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.reshape(shape).to(dtype), None, None, None, None, None, None


_patchify.register_autograd(_patchify_backward, setup_context=_patchify_save)


@_backend.register("patch_mean", "eager")
def _patch_mean_eager(
    clip: torch.Tensor, tubelet: int, patch: int, mean: list[float], std: list[float]
) -> torch.Tensor:
    x = _tubelets(clip, tubelet, patch).to(_compute_dtype(clip)).mean((5, 6, 7)).contiguous()
    return _normalize(x, 4, mean, std) if clip.dtype == torch.uint8 else x


@torch.library.custom_op("vjepa_fast::patch_mean", mutates_args=())
def _patch_mean(
    clip: torch.Tensor, tubelet: int, patch: int, mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    return _backend.call("patch_mean", clip, tubelet, patch, mean, std)


@_patch_mean.register_fake
def _(clip, tubelet, patch, mean, std):
    b, c, f, height, width = clip.shape
    return clip.new_empty((b, f // tubelet, height // patch, width // patch, c), dtype=_compute_dtype(clip))


def _patch_mean_save(ctx, inputs, output):
    clip, ctx.tubelet, ctx.patch, _, _ = inputs
    ctx.dtype = clip.dtype


def _patch_mean_backward(ctx, grad):
    g = grad.permute(0, 4, 1, 2, 3) / (ctx.tubelet * ctx.patch * ctx.patch)
    for dim, size in ((2, ctx.tubelet), (3, ctx.patch), (4, ctx.patch)):
        g = g.repeat_interleave(size, dim)
    return g.to(ctx.dtype), None, None, None, None


_patch_mean.register_autograd(_patch_mean_backward, setup_context=_patch_mean_save)
