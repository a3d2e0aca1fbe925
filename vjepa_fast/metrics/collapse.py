"""Signs of representation collapse, cheap enough to look at during training.

Rows are tokens, features of one level, of all levels or of a half of them. Shapes: B batch, N tokens, K kept tokens,
D = levels * E.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch

from vjepa_fast.layers import channels
from vjepa_fast.layers.packed import Packed, Stream
from vjepa_fast.metrics import geometry
from vjepa_fast.ops import target_norm

MAX_ROWS = 1024
PART_ROWS = 256  # per level and half: the decomposition costs rows^3, for each of them
# Targets are normalised, so their standard deviation over tokens is near 1 where every token has something of its own.
# In benchmarks/results/collapse_remedy.json the run that collapsed ended at 0.18 with RankMe 7.6, those with a remedy
# at 0.66 to 1.00 with RankMe 31.8 to 36.2.
RANK_LIMIT, STD_LIMIT = 5.0, 0.3
REMEDY = "raise target.ema towards 1, lower optimization.lr or add objectives.sigreg"


def _rows(x_BND: torch.Tensor, width: int) -> torch.Tensor:
    """At most ``MAX_ROWS`` evenly spaced tokens, last ``width`` channels, float32 ``[n, width]``."""
    x = x_BND.detach().flatten(0, 1)
    stride = -(-x.shape[0] // MAX_ROWS)
    return x[::stride, -width:].float()


def _some(x_BND: torch.Tensor) -> torch.Tensor:
    """At most ``PART_ROWS`` tokens ``[n, D]`` at a stride that shares no factor with their number, so that it does not
    fall on the same columns of every grid.
    """
    x = x_BND.detach().flatten(0, 1)
    stride = -(-x.shape[0] // PART_ROWS)
    while stride > 1 and math.gcd(stride, x.shape[0]) > 1:
        stride += 1
    return x[::stride].float()


@torch.no_grad()
def collapse(
    h_BND: torch.Tensor, z_BKD: torch.Tensor, levels: int, *, normalized: bool = True
) -> dict[str, torch.Tensor]:
    """0-d float32 tensors on the inputs' device. ``h`` is normalised per level here where it is not yet.

    ``rankme``: effective rank (arXiv:2210.02885) of the last level of the target ``h``. ``feature_std``: mean over
    channels of the standard deviation over tokens of the last level of the student ``z``. ``target_var``: mean over the
    channels of all levels of the variance over tokens of ``h``; 0 when every token has the same target.

    ``NAME/level0`` (and on), ``NAME/appearance`` and ``NAME/dynamics`` (halves of the concatenated levels, as FWM's
    depth split): ``rankme``, ``alpha_req`` (NaN where no power law can be fitted) and ``mean_cosine`` of ``h``,
    ``feature_std`` of ``z``, each over at most ``PART_ROWS`` tokens.
    """
    width = h_BND.shape[-1] // levels
    every, z = _rows(h_BND, h_BND.shape[-1]), _rows(z_BKD, width)
    some = _some(h_BND)
    if not normalized:
        every, some = target_norm(every, levels), target_norm(some, levels)
    h = every[:, -width:]
    return {
        "rankme": torch.as_tensor(geometry.rankme(h)).float(),
        "feature_std": torch.as_tensor(geometry.feature_std(z)).float(),
        "target_var": every.var(dim=0, unbiased=False).mean(),
        **_by_part(some, _some(z_BKD), levels),
    }


class Seen(Protocol):
    """The first entries are looked at: target ``h`` [B,N,D], student ``z``, and the mask that kept its tokens."""

    h: list[torch.Tensor]
    z: list[list[torch.Tensor]]
    masks_enc: list[list[torch.Tensor | Packed]]
    h_normalized: bool


def of_state(state: Seen, levels: int) -> dict[str, torch.Tensor]:
    """`collapse` of the first clips of a step under their first mask."""
    z, mask = state.z[0][0], state.masks_enc[0][0]
    if isinstance(mask, Stream):
        z = z[:, : sum(mask.lengths[: mask.batch])]  # of the first mask
    return collapse(state.h[0], z, levels, normalized=state.h_normalized)


def _by_part(h: torch.Tensor, z: torch.Tensor, levels: int) -> dict[str, torch.Tensor]:
    parts, students = ({k: v for k, v in channels.subspaces(x, levels).items() if k != ("all", "all")} for x in (h, z))
    names = [f"level{level}" if subspace == "all" else subspace for level, subspace in parts]
    found = geometry.spectra(list(parts.values()))
    found = {key: dict(zip(names, values.unbind())) for key, values in found.items()}
    if h.shape[0] > 1:
        found["mean_cosine"] = {name: geometry.mean_cosine(x) for name, x in zip(names, parts.values())}
    found["feature_std"] = {name: geometry.feature_std(x) for name, x in zip(names, students.values())}
    return {f"{key}/{name}": value for key, values in found.items() for name, value in values.items()}


class CollapseWatch:
    """Says once when features begin to collapse, and again only after they had recovered."""

    def __init__(self) -> None:
        self.below: set[str] = set()

    def __call__(self, monitors: Mapping[str, float | None]) -> list[str]:
        """One line where RankMe or the target's standard deviation in a row's ``monitors`` is under its limit and
        neither was before; else none. Figures that a row lacks stay as they were.
        """
        variance = monitors.get("target_var")
        found = {
            f"RankMe of the target's last level is under {RANK_LIMIT:g}": (monitors.get("rankme"), RANK_LIMIT),
            f"the target's standard deviation is under {STD_LIMIT:g}": (variance and variance**0.5, STD_LIMIT),
        }
        known = {what: value for what, (value, _) in found.items() if value is not None}
        below = {what for what, (value, limit) in found.items() if value is not None and value < limit}
        new = [f"{what} ({known[what]:.2g})" for what in found if what in below - self.below]
        starts = bool(new) and not self.below
        self.below = below | (self.below - set(known))
        return [f"collapsing: {' and '.join(new)}; {REMEDY} (docs/training.md)"] if starts else []
