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

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vjepa_fast.errors import DataError
from vjepa_fast.files import parse_json

ROW_KEYS = (
    "suite",
    "probe",
    "seed",
    "n",
    "pretrained",
    "pretrained_ci95",
    "random",
    "random_ci95",
    "difference",
    "difference_ci95",
)


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
class ClipPicture:
    """One real clip: ``frames`` uint8 ``[T, h, w, 3]``, one per token time; predicted tokens of a plain and of a
    motion-guided mask bool ``[T, H, W]``; the motion map float ``[T, H, W]`` in [0, 1]; and PCA maps of its patch
    features by encoder, uint8 ``[T, h, w, 3]`` on a finer grid.
    """

    title: str
    frames: np.ndarray
    plain: np.ndarray
    guided: np.ndarray
    saliency: np.ndarray
    maps: dict[str, np.ndarray]


def load_committed(path: str | os.PathLike | None = None) -> dict | None:
    """Read and check the committed result (default: in the repository around the package, or the package's copy).

    None where there is none, DataError where it has another form.
    """
    here = Path(__file__).resolve().parent
    places = [here.parents[2] / "benchmarks" / "results", here / "data"]
    found_at = [Path(path)] if path is not None else [p for d in places if (p := d / "synthetic_small.json").is_file()]
    if not found_at:
        return None
    try:
        found = parse_json(found_at[0].read_text())
        missing = sorted({key for row in found["rows"] for key in ROW_KEYS if key not in row})
        if found.get("format") == 1 and found["rows"] and not missing:
            return found
        problem = f"of format 1 with rows that have {', '.join(missing or ROW_KEYS)}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"of a long run ({error})"
    raise DataError(f"{found_at[0]}: not a result file {problem}")
