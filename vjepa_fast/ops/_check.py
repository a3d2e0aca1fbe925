"""Argument errors of the ops: a ``ValueError`` that names the argument, what is expected and what came."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch

from vjepa_fast.config.checks import not_multiple


def debugging() -> bool:
    """VJEPA_FAST_DEBUG=1: look at the values of indices too, even where that waits for the device."""
    return os.environ.get("VJEPA_FAST_DEBUG", "0") not in ("", "0")


def positive(x: object) -> bool:
    """Whether ``x`` is an int over 0."""
    return isinstance(x, int) and x > 0


def _has_dims(x: object, dims: int) -> bool:
    return isinstance(x, torch.Tensor) and x.dim() == dims


def _shape_of(x: object) -> str:
    if isinstance(x, torch.Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
    return repr(x)


def require(ok: bool, op: str, argument: str, expected: str, got: object) -> None:
    """Raise ``ValueError("op: argument: expected ..., got ...")`` unless ``ok``; a tensor shows dtype and shape."""
    if not ok:
        raise ValueError(f"{op}: {argument}: expected {expected}, got {_shape_of(got)}")


def names(dtypes: Iterable[torch.dtype]) -> str:
    """The dtypes for a message: ``float32, bfloat16``."""
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def clip(op: str, x: torch.Tensor, tubelet: int = 1, patch: int = 1) -> tuple[int, int, int]:
    """Checks a clip [B,C,F,H,W] and returns its token grid (T, H, W)."""
    require(_has_dims(x, 5), op, "clip", "a tensor [B,C,F,H,W]", x)
    require(x.dtype == torch.uint8 or x.is_floating_point(), op, "clip", "uint8 or a floating dtype", x)
    require(positive(tubelet), op, "tubelet", "a positive int", tubelet)
    require(positive(patch), op, "patch", "a positive int", patch)
    f, height, width = x.shape[2:]
    for size, of, key, of_key in (
        (f, tubelet, "frames", "tubelet"),
        (height, patch, "height", "patch"),
        (width, patch, "width", "patch"),
    ):
        text = not_multiple(size, of, key, of_key)
        if text is not None:
            raise ValueError(f"{op}: clip: {text}; got {_shape_of(x)}")
    return f // tubelet, height // patch, width // patch


def grid(op: str, value: Sequence[int]) -> tuple[int, int, int]:
    """(T, H, W) as ints."""
    ok = len(value) == 3 and all(int(v) == v and v > 0 for v in value)
    require(ok, op, "grid", "three positive ints (T, H, W)", value)
    return int(value[0]), int(value[1]), int(value[2])


def indices(op: str, argument: str, idx: torch.Tensor, batch: int | None = None) -> None:
    """``idx`` is an int64 tensor [B,K], of ``batch`` rows if that is given."""
    require(_has_dims(idx, 2) and idx.dtype == torch.int64, op, argument, "an int64 tensor [B,K]", idx)
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
    """Mean and standard deviation per channel as lists, as an op's schema has them."""
    for name, value in (("mean", mean), ("std", std)):
        require(len(value) == channels, op, name, f"{channels} values, one per channel", value)
    require(all(s > 0 for s in std), op, "std", "positive values", std)
    return [float(m) for m in mean], [float(s) for s in std]
