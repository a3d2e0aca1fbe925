"""What the controls read on a suite: rows of accuracies, by the readout of the study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vjepa_fast.evaluation import ClipSet
    from vjepa_fast.models.vit import VisionTransformer

NOVEL = ("fewshot", "fewmotion")  # suites whose parts have classes of their own


def kind_of(name: str) -> str:
    """ "fewshot" where episodes of novel classes are read, "probe" where a probe is."""
    return "fewshot" if name in NOVEL else "probe"


@dataclass(frozen=True)
class Reading:
    """One control on one suite: what was read with which readout."""

    encoder: str
    readout: dict
    rows: list[dict]


def read_encoder(
    encoder: str, model: VisionTransformer, suite: str, clips: Mapping[str, ClipSet], seed: int
) -> Reading:
    """A frozen encoder on the parts of ``clips``."""
    raise NotImplementedError


def read_pixels(suite: str, clips: Mapping[str, ClipSet], seed: int) -> Reading:
    """The clips themselves."""
    raise NotImplementedError
