"""The published results of arXiv:2605.17165 as data: top-1 in percent of a frozen encoder, by run and data set.

A run is ``<regime>_4gpu_<method>``; a regime is what was pretrained on: ``mixed`` (UCF-101, SSv2 and ImageNet-100) or
``ucf101``. Every variant was trained with seed 239. In the mixed regime the paper compares with the baseline of seed
42; the same baseline with seed 239 is published too, on ImageNet-100 and SSv2 only.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from vjepa_fast.errors import DataError
from vjepa_fast.files import parse_json

DATA = Path(__file__).parent / "data"
BASELINES = {"mixed": "mixed_4gpu_baseline_seed42", "ucf101": "ucf101_4gpu_baseline"}  # what the paper compares with
SAME_SEED = {"mixed": "mixed_4gpu_baseline"}  # the baseline with the seed of the variants, where it is another run


@dataclass(frozen=True)
class Figure:
    """One published accuracy: ``top1`` in percent, sizes of the probe's parts, the probe's settings where known."""

    run: str
    dataset: str
    top1: float
    n_train: int
    n_val: int
    probe: dict | None

    @property
    def epochs(self) -> int | None:
        """Epochs of the probe; None: not published."""
        return self.probe.get("epochs") if self.probe else None

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return {"run": self.run, "dataset": self.dataset, "top1": self.top1, "n_val": self.n_val, "epochs": self.epochs}


@dataclass(frozen=True)
class Delta:
    """``figure.top1 - base.top1`` in percentage points."""

    method: str
    figure: Figure
    base: Figure

    @property
    def dataset(self) -> str:
        """The data set that both were measured on."""
        return self.figure.dataset

    @property
    def value(self) -> float:
        """Rounded to the two decimals of the published figures, so that no binary fraction shows."""
        return round(self.figure.top1 - self.base.top1, 2)

    @property
    def arithmetic(self) -> str:
        """Such as ``30.78 - 24.86 = +5.92``."""
        return f"{self.figure.top1:.2f} - {self.base.top1:.2f} = {self.value:+.2f}"

    @property
    def epochs(self) -> list[int | None]:
        """Probe epochs of the method and of the baseline."""
        return [self.figure.epochs, self.base.epochs]

    @property
    def sampling95(self) -> float:
        """Half width, in points, of the 95 % interval from the finite test part alone (1.96 sqrt(sum p(1-p)/n)).

        Unpaired, because outcomes by clip are not published; the seed is not in it.
        """
        variance = sum(f.top1 / 100 * (1 - f.top1 / 100) / f.n_val for f in (self.figure, self.base))
        return round(100 * 1.96 * math.sqrt(variance), 2)

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return {
            "method": self.method,
            "dataset": self.dataset,
            "delta": self.value,
            "arithmetic": self.arithmetic,
            "sampling95": self.sampling95,
            "probe_epochs": self.epochs,
        }


@dataclass(frozen=True)
class Published:
    """All published figures: ``figures[run, dataset]``, where they come from, and the notes that came with them."""

    source: str
    notes: dict
    figures: dict[tuple[str, str], Figure]

    @cached_property
    def runs(self) -> tuple[str, ...]:
        """Names of the published runs."""
        return tuple(dict.fromkeys(run for run, _ in self.figures))

    def has(self, run: str, dataset: str) -> bool:
        """Whether there is a figure of the run on the data set."""
        return (run, dataset) in self.figures

    def figure(self, run: str, dataset: str) -> Figure:
        """The figure of a run on a data set; DataError where none was published, with what was."""
        try:
            return self.figures[run, dataset]
        except KeyError:
            known = [d for r, d in self.figures if r == run] or [r for r, d in self.figures if d == dataset]
            raise DataError(
                f"{run} on {dataset}: no published figure; published beside it: {', '.join(known) or 'nothing'}"
            ) from None

    def top1(self, run: str, dataset: str) -> float:
        """Top-1 accuracy in percent; DataError where none was published."""
        return self.figure(run, dataset).top1

    def methods(self, regime: str, pattern: str = "*", datasets: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Methods of a regime, baselines left out, whose name matches ``pattern`` (of a shell, or several with commas
        between) and that have a figure on each of ``datasets``. DataError for an unknown regime.
        """
        baselines = {_baseline(regime), SAME_SEED.get(regime)}
        prefix = f"{regime}_4gpu_"
        patterns = [p.strip() for p in pattern.split(",")]
        return tuple(
            name
            for run in self.runs
            if run.startswith(prefix) and run not in baselines
            for name in [run.removeprefix(prefix)]
            if any(fnmatchcase(name, p) for p in patterns) and all(self.has(run, d) for d in datasets)
        )

    def delta(self, regime: str, method: str, dataset: str, baseline: str | None = None) -> Delta:
        """The method against ``baseline`` (a run's name; default: the one the paper compares with). DataError where a
        figure of either was not published.
        """
        base = self.figure(baseline or _baseline(regime), dataset)
        return Delta(method, self.figure(f"{regime}_4gpu_{method}", dataset), base)

    def spread(self, dataset: str) -> tuple[float, str] | None:
        """What the two published seeds of the mixed baseline differ by, in percentage points, and the arithmetic (such
        as ``24.86 - 21.26 = 3.60``): a range of two runs, no interval. None where only one was measured.
        """
        runs = (BASELINES["mixed"], SAME_SEED["mixed"])
        if not all(self.has(run, dataset) for run in runs):
            return None
        low, high = sorted(self.top1(run, dataset) for run in runs)
        points = round(high - low, 2)
        return points, f"{high:.2f} - {low:.2f} = {points:.2f}"


def _baseline(regime: str) -> str:
    if regime not in BASELINES:
        raise DataError(f"{regime!r} is no published pretraining regime; expected one of {', '.join(BASELINES)}")
    return BASELINES[regime]


def load_published(path: str | os.PathLike | None = None) -> Published:
    """Read and check the published results (default: those in the package). DataError names what is wrong."""
    path = Path(path or DATA / "published_results.json")
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        figures = {
            (run, dataset): Figure(run, dataset, float(f["top1"]), int(f["n_train"]), int(f["n_val"]), f["probe"])
            for run, by_dataset in content["runs"].items()
            for dataset, f in by_dataset.items()
        }
        found = Published(content["source"], content["notes"], figures)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a file of published results ({type(error).__name__}: {error})") from None
    for (run, dataset), f in figures.items():
        if not 0 <= f.top1 <= 100 or f.n_val < 1:  # NaN fails the first comparison
            raise DataError(f"{path}: {run} on {dataset}: top1 {f.top1} of {f.n_val} samples is no accuracy in percent")
    return found
