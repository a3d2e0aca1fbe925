"""What all probes share: the registry, the call, the result, and the checks of the parts that they read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch

from vjepa_fast.errors import DataError
from vjepa_fast.evaluation.extract.features import Features
from vjepa_fast.evaluation.extract.tokens import Tokens
from vjepa_fast.evaluation.intervals import wilson
from vjepa_fast.evaluation.tasks import Task, check_labels, check_within
from vjepa_fast.registry import Registry

NEEDS = ("features", "tokens")
Samples = TypeVar("Samples", Features, Tokens)


@dataclass(frozen=True)
class ProbeResult:
    """Test accuracy in [0, 1] with its Wilson interval ``ci95 = (low, high)`` over ``n`` test samples.

    ``chosen``: hyperparameters, with the validation accuracy that chose them. ``correct``: bool ``[n]``, in the order
    of the test samples.
    """

    accuracy: float
    ci95: tuple[float, float]
    n: int
    chosen: dict
    correct: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class ProbeOptions:
    """Options of all probes; each reads what concerns it.

    ``classes``: how many there must be (None: the highest label + 1). ``epochs`` and ``batch_size``: of probes that
    train by steps; None: the probe's own number. ``on_progress(done, all)``: called after every epoch.
    """

    seed: int = 0
    classes: int | None = None
    task: Task | None = None
    epochs: int | None = None
    batch_size: int | None = None
    device: str | torch.device = "cpu"
    on_progress: Callable[[int, int], None] | None = None

    @property
    def training(self) -> dict[str, Any]:
        """Arguments of a probe that trains by steps, but for ``epochs``."""
        given = {} if self.batch_size is None else {"batch_size": self.batch_size}
        return {**given, **{k: getattr(self, k) for k in ("classes", "seed", "device", "on_progress")}}


class Probe(ABC):
    """A way to read what a frozen encoder knows.

    ``needs``: "features" (pooled, `Features`) or "tokens" (`Tokens`): what the parts are. ``standardises``: whether it
    standardises features itself, so that a shift and a scale of them change nothing.
    """

    needs: ClassVar[str] = "features"
    standardises: ClassVar[bool] = False

    @classmethod
    def needs_of(cls, task: Task | None) -> str:
        """What the parts are on ``task``: ``needs``, unless a probe reads different things on different tasks."""
        return cls.needs

    @abstractmethod
    def __call__(self, train: Any, val: Any, test: Any, options: ProbeOptions) -> ProbeResult:
        """Fit on ``train``, choose on ``val`` (None: hold a part of ``train`` out), and read ``test`` once at the end.

        Deterministic for a seed on a CPU.

        Raises:
            DataError: empty parts, unequal widths, one class, label gaps, labels that ``train`` does not have, features
                that are not finite; see `checked_parts`.
        """


def _check(name: str, entry: type[Probe]) -> None:
    if not (isinstance(entry, type) and issubclass(entry, Probe)):
        raise TypeError(f"probe {name!r} must be a subclass of Probe, got {entry!r}")
    if entry.needs not in NEEDS:
        raise TypeError(f"probe {name!r}: needs is {entry.needs!r}; expected {' or '.join(NEEDS)}")


PROBES: Registry[type[Probe]] = Registry("probe", package=__package__, check=_check)


def result_of(predicted: np.ndarray, labels: np.ndarray, chosen: dict) -> ProbeResult:
    """The ProbeResult of predictions int ``[n]`` against labels int ``[n]``."""
    correct = np.asarray(predicted) == np.asarray(labels)
    hits, n = int(correct.sum()), int(correct.size)
    return ProbeResult(hits / n, wilson(hits, n), n, chosen, correct)


def split_validation(train: Samples, fraction: float = 0.2, seed: int = 0) -> tuple[Samples, Samples]:
    """Take ``fraction`` of each class (at least one sample, where it has two) off ``train``: (rest, validation).

    DataError where no class has two samples.
    """
    rng = np.random.default_rng(seed)
    held = np.zeros(len(train), dtype=bool)
    for label in np.unique(train.y):
        members = rng.permutation(np.flatnonzero(train.y == label))
        if len(members) > 1:
            held[members[: max(1, round(fraction * len(members)))]] = True
    if not held.any():
        raise DataError(f"{train.name}: too few samples to hold out a validation part; give one with --val")
    return train.take(~held), train.take(held)


def check_parts(parts: dict[str, Samples], classes: int | None = None) -> int:
    """The number of classes of parts by role ("train", ...).

    Raises:
        DataError: an empty part, unequal widths, one class only, label gaps, labels out of range, or features that are
            not finite (tokens are looked at when they are read).
    """
    train = parts["train"]
    for role, part in parts.items():
        if len(part) == 0:
            raise DataError(f"{part.name}: no samples to probe (the {role} part is empty)")
        if part.dim != train.dim:
            raise DataError(
                f"{part.name}: width {part.dim}, but {train.name} has {train.dim}; take all from one encoder"
            )
    classes = check_labels(train.y, train.name, classes=classes)
    if classes < 2:
        raise DataError(f"{train.name}: a probe needs at least two classes in the training part")
    for part in parts.values():
        check_within(part.y, part.name, classes)
        if isinstance(part, Features):
            part.check_finite()
    return classes


def checked_parts(
    train: Samples, val: Samples | None, test: Samples, *, classes: int | None = None, seed: int = 0
) -> tuple[Samples, Samples, Samples, int]:
    """(train, validation, test, number of classes); without ``val`` a fifth of each training class is held out.

    Raises:
        DataError: as `check_parts`, and where ``val`` and ``test`` are the same samples.
    """
    classes = check_parts({"train": train, **({} if val is None else {"validation": val}), "test": test}, classes)
    if val is None:
        train, val = split_validation(train, seed=seed)
    elif val.same_samples(test):
        raise DataError(f"{val.name}: validation and test part are the same samples; the choice would see the test")
    return train, val, test, classes
