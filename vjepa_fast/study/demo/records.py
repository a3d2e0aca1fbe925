"""What a report is made of: runs, suites, pictures, and the committed result of a long run.

The committed file (``benchmarks/results/synthetic_small.json``; installed packages have a copy in
``vjepa_fast/study/demo/data/``) is JSON::

    {"format": 1, "recipe": "synthetic_small", "command": "...", "device": "...", "minutes": 55.0, "commit": "...",
     "versions": {"torch": "...", ...}, "note": "...",
     "rows": [{"suite": "motion8", "probe": "linear", "encoder": "target_encoder", "seed": 0, "n": 800, "chance": 0.125,
               "pretrained": 0.43, "pretrained_ci95": [0.40, 0.46], "random": 0.30, "random_ci95": [0.27, 0.33],
               "difference": 0.13, "difference_ci95": [0.09, 0.17]}, ...],
     "curves": [{"seed": 0, "step": [...], "loss": [...]}, ...]}

Accuracies are fractions; ``difference`` is paired by test sample. ``benchmarks/synthetic_small.py`` writes it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vjepa_fast.errors import DataError

ROW_KEYS = (
    "suite", "probe", "seed", "n", "pretrained", "pretrained_ci95", "random", "random_ci95", "difference",
    "difference_ci95",
)  # fmt: skip


@dataclass(frozen=True)
class RunRecord:
    """One pretraining run: its metric rows (``metrics.jsonl``) and its settings as printable text."""

    name: str
    objective: str
    regime: str  # single | mixed
    metrics: list[dict] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SuiteRecord:
    """One data set of the evaluation: what its label means, the sizes of its parts, chance accuracy."""

    name: str
    what: str
    train: int
    val: int
    test: int
    classes: int
    chance: float


@dataclass(frozen=True)
class MaskPicture:
    """Masks over one real clip: ``frames`` uint8 ``[T, h, w, 3]``, one per token time; predicted tokens bool ``[T, H,
    W]``.
    """

    title: str
    frames: np.ndarray
    plain: np.ndarray
    guided: np.ndarray
    saliency: np.ndarray | None = None  # float [T, H, W] in [0, 1]


@dataclass(frozen=True)
class PcaPicture:
    """PCA maps of patch features beside the frames: ``maps[label]`` uint8 ``[T, H, W, 3]``."""

    title: str
    frames: np.ndarray
    maps: dict[str, np.ndarray]


def committed_path() -> Path | None:
    """The committed result file, in the package or in the repository around it; None where there is none."""
    here = Path(__file__).resolve().parent
    for path in (
        here.parents[2] / "benchmarks" / "results" / "synthetic_small.json",
        here / "data" / "synthetic_small.json",
    ):
        if path.is_file():
            return path
    return None


def load_committed(path: str | os.PathLike | None = None) -> dict | None:
    """Read and check the committed result; None where there is none, DataError where it has another form."""
    found_at = committed_path() if path is None else Path(path)
    if found_at is None:
        return None
    try:
        found = json.loads(found_at.read_text())
        missing = sorted({key for row in found["rows"] for key in ROW_KEYS if key not in row})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{found_at}: not a result file of a long run ({error})") from None
    if found.get("format") != 1 or missing or not found["rows"]:
        raise DataError(
            f"{found_at}: not a result file of format 1 with rows that have {', '.join(missing or ROW_KEYS)}"
        )
    return found
