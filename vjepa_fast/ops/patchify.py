"""From pixels to tubelets: the gather that feeds the patch embedding, colour means, normalisation.

Legend: B batch, C channels, F frames, grid (T,H,W), N = T*H*W tokens, K kept tokens, P = C*tubelet*patch*patch pixels
of a tubelet, ordered (channel, frame, row, column): ``F.linear(patches, conv3d.weight.flatten(1), conv3d.bias)`` is the
Conv3d with kernel and stride (tubelet, patch, patch).

uint8 clips are divided by 255, then normalised with mean and std; float clips are taken as already normalised.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vjepa_fast.imagenet import IMAGENET_MEAN, IMAGENET_STD
from vjepa_fast.ops import _backend, _check, _cpp, _triton


def normalize_clip(clip: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """The normalised clip [B,C,F,height,width], float32 (float64 if the clip is).

    uint8 is divided by 255 and normalised by the C values of ``mean`` and ``std``; a float clip is returned as it is,
    in promote_types(dtype, float32).

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    _check.clip("normalize_clip", clip)
    mean, std = _check.channel_stats("normalize_clip", mean, std, clip.shape[1])
    if clip.dtype != torch.uint8:
        return clip.to(torch.promote_types(clip.dtype, torch.float32))
    return _normalize(clip.to(torch.float32), 1, mean, std)


def tubelet_patchify(
    clip: Tensor,
    idx: Tensor | None,
    tubelet: int,
    patch: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The kept tubelets of a clip as rows: gather, conversion, normalisation and cast in one go.

    Floor: B*K*P pixels read, as many numbers written, 8 bytes per index. The clip may have any strides.

    Args:
        clip: [B,C,F,height,width], uint8 or floating (taken as normalised).
        idx: int64 [B,K] token indices n = (t*H+h)*W+w to keep, in this order; None keeps all N. Or int64 [1,M] of
            b*N + n, where samples keep different numbers (``Packed.idx``).
        tubelet, patch: frames of a tubelet, which must divide F, and pixels, which must divide height and width.
        mean, std: C values each, for uint8 clips.
        out_dtype: floating dtype of the result; None means float32 for uint8 and the clip's dtype otherwise.

    Returns:
        [B,K,P] ([1,M,P]), or [B,N,P] without ``idx``. A float clip receives gradient.

    Raises:
        ValueError: a shape, dtype or (on the CPU) token index does not fit. On the GPU, looking would wait for the
            device: a token outside the grid gives NaN there.
    """
    op = "tubelet_patchify"
    _check.clip(op, clip, tubelet, patch)
    mean, std = _check.channel_stats(op, mean, std, clip.shape[1])
    if idx is not None:
        _check.indices(op, "idx", idx, batch=None if len(idx) == 1 else clip.shape[0])
    out_dtype = out_dtype or (torch.float32 if clip.dtype == torch.uint8 else clip.dtype)
    _check.require(out_dtype.is_floating_point, op, "out_dtype", "a floating dtype", out_dtype)
    return _patchify(clip, idx, tubelet, patch, mean, std, out_dtype)


def patch_mean(
    clip: Tensor, tubelet: int, patch: int, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """Mean colour of each tubelet of the normalised clip: the target of the action-conditioning (``ac``) objective.

    Floor: the clip read once, [B,T,H,W,C] written once. It shares its loops with ``motion_saliency`` in mode ``area``,
    but not a pass over the clip: masks need the one before the step, the objective needs the other within it.

    Arguments as in ``tubelet_patchify``.

    Returns:
        [B,T,H,W,C] in promote_types(clip dtype, float32) (float32 for uint8). A float clip receives gradient.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    _check.clip("patch_mean", clip, tubelet, patch)
    mean, std = _check.channel_stats("patch_mean", mean, std, clip.shape[1])
    return _patch_mean(clip, tubelet, patch, mean, std)


class Tubelets(NamedTuple):
    """Arguments of ``tubelet_patchify``, defaults filled in."""

    clip: Tensor
    idx: Tensor | None
    tubelet: int
    patch: int
    mean: Sequence[float]
    std: Sequence[float]
    out_dtype: torch.dtype


_KERNEL_FLOATS = {"cpp": _cpp.FLOATS, "triton": _triton.FLOATS}


def objections(backend: str) -> Callable[..., list[str]]:
    """Those of the kernels that read clips: a function of an op's arguments, the clip first, or of `Tubelets`."""
    floats, machine = _KERNEL_FLOATS[backend], {"cpp": _cpp, "triton": _triton}[backend].objections
    names = _check.names(floats)

    def reasons(*args: Any) -> list[str]:
        args = args[0] if args and isinstance(args[0], Tubelets) else args
        found = machine(*(a for a in args if isinstance(a, Tensor)))
        if args and args[0].dtype not in (torch.uint8, *floats):
            found.append(f"{backend} reads clips of uint8, {names}")
        if any(isinstance(a, torch.dtype) and a not in floats for a in args):
            found.append(f"{backend} writes {names}")
        return found

    return reasons


@functools.cache
def channel_table(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [C] on the device. Kept, since copying it there anew would stop the host until the device is done; never
    dropped, since a captured CUDA graph reads it at its address.
    """
    return torch.tensor(values, dtype=torch.float32, device=device)


def _scale_and_shift(clip: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, ...]:
    """X * scale - shift normalises pixels of 0..255; the same float32 numbers that ``_normalize`` uses."""
    scale, shift = tuple(1 / (255 * s) for s in std), tuple(m / s for m, s in zip(mean, std, strict=True))
    return channel_table(scale, clip.device), channel_table(shift, clip.device)


def _compute_dtype(clip: Tensor) -> torch.dtype:
    return torch.promote_types(clip.dtype, torch.float32)  # uint8 gives float32


def _normalize(x: Tensor, dim: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """In place: x in 0..255, channels along ``dim``. By scalars, as a tensor of them would be copied to the device."""
    for c, (m, s) in enumerate(zip(mean, std, strict=True)):
        x.select(dim, c).mul_(1 / (255 * s)).sub_(m / s)
    return x


def _tubelets(clip: Tensor, tubelet: int, patch: int) -> Tensor:
    """View [B,T,H,W,C,tubelet,patch,patch]."""
    x = clip.unflatten(4, (-1, patch)).unflatten(3, (-1, patch)).unflatten(2, (-1, tubelet))
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7)


def _rows(idx_BK: Tensor, n: int) -> Tensor:
    return (idx_BK + torch.arange(idx_BK.shape[0], device=idx_BK.device)[:, None] * n).flatten()


@_backend.register("tubelet_patchify", "eager")
def _patchify_eager(a: Tubelets) -> Tensor:
    clip, idx, tubelet, patch, mean, std, out_dtype = a
    b, c = clip.shape[:2]
    x = _tubelets(clip, tubelet, patch)
    n, p = x.shape[1] * x.shape[2] * x.shape[3], c * tubelet * patch * patch
    if idx is None:
        x = x.reshape(b, n, p).contiguous()
    else:  # gathered in the clip's own dtype, a quarter of the traffic for uint8
        x = x.reshape(b * n, p).index_select(0, _rows(idx, n)).view(*idx.shape, p)
    if clip.dtype == torch.uint8:
        x = x.to(torch.promote_types(out_dtype, torch.float32)).unflatten(2, (c, p // c))
        x = _normalize(x, 2, mean, std).flatten(2)
    x = x.to(out_dtype)
    return x.clone() if x.untyped_storage().data_ptr() == clip.untyped_storage().data_ptr() else x


def _patchify_out(a: Tubelets) -> Tensor:
    b, c, f, height, width = a.clip.shape
    rows = (b, (f // a.tubelet) * (height // a.patch) * (width // a.patch)) if a.idx is None else a.idx.shape
    return a.clip.new_empty((*rows, c * a.tubelet * a.patch * a.patch), dtype=a.out_dtype)


@_backend.register("tubelet_patchify", "cpp", objections("cpp"))
def _patchify_cpp(a: Tubelets) -> Tensor:
    out, numbers = _patchify_out(a), _scale_and_shift(a.clip, a.mean, a.std)
    kept = torch.empty(0, dtype=torch.int64, device="cpu") if a.idx is None else a.idx
    torch.ops.vjepa_fast_cpp.tubelet_patchify(a.clip, kept, a.tubelet, a.patch, *numbers, out)
    return out


@_backend.register("tubelet_patchify", "triton", objections("triton"))
def _patchify_triton(a: Tubelets) -> Tensor:
    out, numbers = _patchify_out(a), _scale_and_shift(a.clip, a.mean, a.std)
    _triton.launch("patchify", "tubelet_patchify", a.clip, *a[:4], *numbers, out)
    return out


@_backend.define(
    "tubelet_patchify",
    "Tensor clip, Tensor? idx, SymInt tubelet, SymInt patch, float[] mean, float[] std, ScalarType out_dtype",
)
def _patchify(*args: Any) -> Tensor:
    a = Tubelets(*args)
    if a.idx is not None:
        b, _, f, height, width = a.clip.shape
        n = f // a.tubelet * (height // a.patch) * (width // a.patch)
        _check.in_range("tubelet_patchify", "idx", a.idx, n * b // max(1, len(a.idx)))
    return _backend.call("tubelet_patchify", a)


@_patchify.register_fake
def _(*args: Any) -> Tensor:
    return _patchify_out(Tubelets(*args))


def _patchify_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    clip, idx, ctx.tubelet, ctx.patch, _, _, _ = inputs
    ctx.clip = clip.shape, clip.dtype
    ctx.save_for_backward(idx)


def _patchify_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
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
def _patch_mean_eager(clip: Tensor, tubelet: int, patch: int, mean: list[float], std: list[float]) -> Tensor:
    x = _tubelets(clip, tubelet, patch).to(_compute_dtype(clip)).mean((5, 6, 7)).contiguous()
    return _normalize(x, 4, mean, std) if clip.dtype == torch.uint8 else x


def _patch_mean_out(clip: Tensor, tubelet: int, patch: int, *_: object) -> Tensor:
    b, c, f, height, width = clip.shape
    return clip.new_empty((b, f // tubelet, height // patch, width // patch, c), dtype=_compute_dtype(clip))


@_backend.register("patch_mean", "cpp", objections("cpp"))
def _patch_mean_cpp(clip: Tensor, tubelet: int, patch: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    out = _patch_mean_out(clip, tubelet, patch)
    torch.ops.vjepa_fast_cpp.patch_mean(clip, tubelet, patch, *_scale_and_shift(clip, mean, std), out)
    return out


@_backend.register("patch_mean", "triton", objections("triton"))
def _patch_mean_triton(clip: Tensor, tubelet: int, patch: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    out = _patch_mean_out(clip, tubelet, patch)
    _triton.launch("patchify", "patch_mean", clip, clip, *_scale_and_shift(clip, mean, std), out)
    return out


@torch.library.custom_op("vjepa_fast::patch_mean", mutates_args=())
def _patch_mean(clip: Tensor, tubelet: int, patch: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return _backend.call("patch_mean", clip, tubelet, patch, mean, std)


_patch_mean.register_fake(_patch_mean_out)


def _patch_mean_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    clip, ctx.tubelet, ctx.patch, _, _ = inputs
    ctx.dtype = clip.dtype


def _patch_mean_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    g = grad.permute(0, 4, 1, 2, 3) / (ctx.tubelet * ctx.patch * ctx.patch)
    for dim, size in ((2, ctx.tubelet), (3, ctx.patch), (4, ctx.patch)):
        g = g.repeat_interleave(size, dim)
    return g.to(ctx.dtype), None, None, None, None


_patch_mean.register_autograd(_patch_mean_backward, setup_context=_patch_mean_save)
