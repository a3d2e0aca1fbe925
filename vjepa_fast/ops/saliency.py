"""Motion saliency: where and when a clip changes, on the token grid (the motion-guided masks of arXiv:2605.17165).

Shapes: B clips, C channels, F frames, Y x X pixels, token grid T x H x W.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vjepa_fast.config.fields import require
from vjepa_fast.config.schema import MasksConfig
from vjepa_fast.errors import ConfigError
from vjepa_fast.ops import _backend, _check, _triton
from vjepa_fast.ops.patchify import channel_table, objections

_FLOOR = 1e-6  # of the maximum by which a map is divided


def motion_saliency(
    clip: Tensor,
    grid: Sequence[int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    mode: str = "trilinear",
    normalize: str = "sample",
) -> Tensor:
    """Size of the change between frames, resampled to the token grid and scaled to a maximum of 1.

    The absolute difference of successive frames of the normalised clip, averaged over channels, its first entry
    repeated to have F entries again, is resampled to the grid.

    Args:
        clip: ``[B,C,F,Y,X]``; uint8 means /255, divided by ``std`` (``mean`` cancels); float is taken as normalised.
        grid: (T, H, W), the tokens along each axis.
        mean: per channel; not used, since it cancels.
        std: per channel; used for uint8 clips only.
        mode: ``trilinear`` as published (samples between pixels, no antialiasing: reads 2 x 2 pixels of a patch) or
            ``area`` (mean over the patch).
        normalize: ``sample`` divides each map by its own maximum, at least 1e-6. ``published`` divides time slice t of
            every map by the maximum of *sample* t, as the released code does; it needs B in {1, T}.

    Returns:
        float32 ``[B,T,H,W]`` (float64 for a float64 clip), without gradient; zeros for a single frame.

    Raises:
        ConfigError: unknown ``mode`` or ``normalize``; ``published`` with another B.

    Floor: [B,T,H,W] written once and, read once, the pixels that matter: for ``trilinear`` C*2*2*2 of two frames per
    token, for ``area`` the clip.
    """
    _check.clip("motion_saliency", clip)
    grid = _check.grid("motion_saliency", grid)
    require(MasksConfig, "masks", saliency=mode)
    if normalize not in ("sample", "published"):
        raise ConfigError(f"motion_saliency: unknown normalize {normalize!r}; use 'sample' or 'published'")
    if normalize == "published":
        check_published(clip.shape[0], grid[0])
    std = [1.0] * clip.shape[1] if std is None else _check.channel_stats("motion_saliency", std, std, clip.shape[1])[1]
    return _motion_saliency(clip.detach(), grid, std, mode, normalize)


def check_published(clips: int, times: int) -> None:
    """Raise ConfigError where maps of so many clips and time steps cannot be normalised as ``published``."""
    if clips not in (1, times):
        raise ConfigError(
            f"compat published: motion maps need a batch of 1 or of {times} (the temporal tokens), "
            f"got {clips}; change data.batch_size or set compat: intended"
        )


@torch.library.custom_op("vjepa_fast::motion_saliency", mutates_args=())
def _motion_saliency(clip: Tensor, grid: Sequence[int], std: Sequence[float], mode: str, normalize: str) -> Tensor:
    if clip.shape[2] == 1:
        return torch.zeros_like(_out(clip, grid))
    return _backend.call("motion_saliency", clip, grid, std, mode, normalize)


@_motion_saliency.register_fake
def _out(clip: Tensor, grid: Sequence[int], *_: object) -> Tensor:
    return clip.new_empty((clip.shape[0], *grid), dtype=torch.promote_types(clip.dtype, torch.float32))


@_backend.register("motion_saliency", "eager")
def _eager(clip: Tensor, grid: Sequence[int], std: Sequence[float], mode: str, normalize: str) -> Tensor:
    dtype = torch.promote_types(clip.dtype, torch.float32)
    weight_C = torch.tensor(_channel_weights(clip, std), dtype=dtype, device=clip.device)
    if mode == "trilinear":
        map_BTHW = _trilinear(clip, grid, weight_C)
    else:
        change_BFYX = _repeat_first(_change(clip, weight_C))
        map_BTHW = F.adaptive_avg_pool3d(change_BFYX[:, None], (grid[0], grid[1], grid[2]))[:, 0]
    peak_B = map_BTHW.amax(dim=(1, 2, 3)).clamp_min(_FLOOR)
    return map_BTHW / (peak_B[:, None, None] if normalize == "published" else peak_B[:, None, None, None])


def _channel_weights(clip: Tensor, std: Sequence[float]) -> tuple[float, ...]:
    """Factor of each channel's absolute difference in the mean over channels."""
    return tuple(1.0 / len(std) / (255.0 * s if clip.dtype == torch.uint8 else 1.0) for s in std)


def _change(clip: Tensor, weight_C: Tensor) -> Tensor:
    """``[B,F-1,Y,X]``, weighted mean over channels of the absolute frame differences."""

    def change_of(c: int) -> Tensor:
        frames_BFYX = clip[:, c].to(weight_C.dtype)
        return (frames_BFYX[:, 1:] - frames_BFYX[:, :-1]).abs_().mul_(weight_C[c])

    total = change_of(0)
    for c in range(1, clip.shape[1]):  # one channel at a time: a third of the memory
        total.add_(change_of(c))
    return total


def _repeat_first(change: Tensor) -> Tensor:
    return torch.cat([change[:, :1], change], dim=1)


def _taps(size: int, out: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two source positions of each output position and the weight of the second (half-pixel centres)."""
    source = ((torch.arange(out, device=device, dtype=torch.float32) + 0.5) * (size / out) - 0.5).clamp_min_(0.0)
    low = source.floor().long().clamp_max_(size - 1)
    return torch.stack([low, (low + 1).clamp_max_(size - 1)], dim=1), (source - low).to(dtype)


def _trilinear(clip: Tensor, grid: Sequence[int], weight_C: Tensor) -> Tensor:
    """Same as F.interpolate(mode="trilinear", align_corners=False), on the pixels that it would read only."""
    frames, height, width = clip.shape[2:]
    dtype, device = weight_C.dtype, clip.device
    (t_index, t_frac), (y_index, y_frac), (x_index, x_frac) = (
        _taps(size, out, device, dtype) for size, out in zip((frames, height, width), grid)
    )
    small = clip.index_select(3, y_index.flatten()).index_select(4, x_index.flatten())
    change = _repeat_first(_change(small, weight_C)).index_select(1, t_index.flatten())
    change = change.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # [B,T,2,H,2,W,2]
    change = torch.lerp(change[..., 0], change[..., 1], x_frac)
    change = torch.lerp(change[..., 0, :], change[..., 1, :], y_frac[:, None])
    return torch.lerp(change[:, :, 0], change[:, :, 1], t_frac[:, None, None])


@_backend.register("motion_saliency", "cpp", objections("cpp"))
def _cpp(clip: Tensor, grid: Sequence[int], std: Sequence[float], mode: str, normalize: str) -> Tensor:
    out, weights = _out(clip, grid), channel_table(_channel_weights(clip, std), clip.device)
    torch.ops.vjepa_fast_cpp.motion_saliency(clip, weights, mode == "area", normalize == "published", _FLOOR, out)
    return out


@_backend.register("motion_saliency", "triton", objections("triton"))
def _kernel(clip: Tensor, grid: Sequence[int], std: Sequence[float], mode: str, normalize: str) -> Tensor:
    raw, out, weights = _out(clip, grid), _out(clip, grid), channel_table(_channel_weights(clip, std), clip.device)
    _triton.launch("saliency", f"{mode}_change", clip, clip, weights, raw)
    _triton.launch("saliency", "divide_by_peak", clip, raw, out, normalize == "published", _FLOOR)
    return out
