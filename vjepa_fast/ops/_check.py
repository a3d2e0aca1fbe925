"""Argument errors of the ops: a ``ValueError`` that names the argument, what is expected and what came."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from vjepa_fast.config.checks import not_multiple


def debugging() -> bool:
    """VJEPA_FAST_DEBUG=1: look at the values of indices too, even where that waits for the device."""
    return os.environ.get("VJEPA_FAST_DEBUG", "0") not in ("", "0")


def shape_of(x: object) -> str:
    if isinstance(x, torch.Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
    return repr(x)


def require(ok: bool, op: str, argument: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{op}: {argument}: expected {expected}, got {shape_of(got)}")


def clip(op: str, x: torch.Tensor, tubelet: int = 1, patch: int = 1) -> tuple[int, int, int]:
    """Checks a clip [B,C,F,H,W] and returns its token grid (T, H, W)."""
    require(isinstance(x, torch.Tensor) and x.dim() == 5, op, "clip", "a tensor [B,C,F,H,W]", x)
    require(x.dtype == torch.uint8 or x.is_floating_point(), op, "clip", "uint8 or a floating dtype", x)
    require(isinstance(tubelet, int) and tubelet > 0, op, "tubelet", "a positive int", tubelet)
    require(isinstance(patch, int) and patch > 0, op, "patch", "a positive int", patch)
    f, height, width = x.shape[2:]
    for size, of, key, of_key in (
        (f, tubelet, "frames", "tubelet"),
        (height, patch, "height", "patch"),
        (width, patch, "width", "patch"),
    ):
        text = not_multiple(size, of, key, of_key)
        if text is not None:
            raise ValueError(f"{op}: clip: {text}; got {shape_of(x)}")
    return f // tubelet, height // patch, width // patch


def grid(op: str, value: Sequence[int]) -> tuple[int, int, int]:
    ok = isinstance(value, (tuple, list)) and len(value) == 3 and all(int(v) == v and v > 0 for v in value)
    require(ok, op, "grid", "three positive ints (T, H, W)", value)
    return int(value[0]), int(value[1]), int(value[2])


def indices(op: str, argument: str, idx: torch.Tensor, batch: int | None = None) -> None:
    ok = isinstance(idx, torch.Tensor) and idx.dim() == 2 and idx.dtype == torch.int64
    require(ok, op, argument, "an int64 tensor [B,K]", idx)
    require(batch is None or idx.shape[0] == batch, op, argument, f"a batch of {batch}", idx)


def in_range(op: str, argument: str, idx: torch.Tensor, n: int, least: int = 0) -> None:
    """Token indices lie in [least, n). Looked at on the CPU; elsewhere it would wait, so only while ``debugging``."""
    if idx.numel() and (idx.device.type == "cpu" or debugging()):
        low, high = torch.aminmax(idx)
        ok = bool(low >= least) and bool(high < n)
        require(ok, op, argument, f"token indices in [{least}, {n})", [int(low), int(high)])


def distinct(op: str, argument: str, idx: torch.Tensor) -> None:
    """No row of ``idx`` names a token twice. Looked at only while ``debugging``."""
    if idx.numel() and debugging():
        ordered = idx.sort(-1).values
        repeated = ordered[..., 1:][ordered[..., 1:] == ordered[..., :-1]]
        require(not len(repeated), op, argument, "distinct token indices in each row", repeated.unique().tolist())


def channel_stats(
    op: str, mean: Sequence[float], std: Sequence[float], channels: int
) -> tuple[list[float], list[float]]:
    for name, value in (("mean", mean), ("std", std)):
        require(len(value) == channels, op, name, f"{channels} values, one per channel", value)
    require(all(s > 0 for s in std), op, "std", "positive values", std)
    return [float(m) for m in mean], [float(s) for s in std]
