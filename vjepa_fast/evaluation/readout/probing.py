"""Pooling, level and transform for a probe, chosen on its validation part by the probe itself.

A probe is scored by its accuracy on the validation part after a fit on the training part, within which it chooses what
it has to choose (penalty, k). The test part is no argument here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vjepa_fast.errors import ConfigError
from vjepa_fast.evaluation.choices import check_choice
from vjepa_fast.evaluation.extract.features import CLS, LEVELS, POOLINGS
from vjepa_fast.evaluation.probes import PROBES, ProbeOptions
from vjepa_fast.evaluation.probes.probe import split_validation
from vjepa_fast.evaluation.readout.choice import Bank, Key
from vjepa_fast.evaluation.readout.transform import Transform

KINDS = ("none", "centre", "standard")


@dataclass(frozen=True)
class Reading:
    """What features a probe gets; ``table``: (name, validation accuracy) of all candidates, best first."""

    key: Key
    transform: str = "none"
    table: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        """``level/pooling/transform``."""
        return "/".join((*self.key, self.transform))

    @classmethod
    def from_name(cls, name: str) -> Reading:
        """The reading of a `name`; ConfigError where it is none."""
        parts = name.split("/")
        if len(parts) != 3:
            raise ConfigError(
                f"readout {name!r}: a probe's is level/pooling/transform, such as last/tdiff/standard, or auto"
            )
        for what, value, known in zip(("level", "pooling", "transform"), parts, (LEVELS, (*POOLINGS, CLS), KINDS)):
            check_choice(f"{what} of a readout", value, known)
        return cls((parts[0], parts[1]), parts[2])

    def to_dict(self) -> dict[str, Any]:
        """For a row's ``chosen``."""
        table = [{"name": name, "accuracy": accuracy} for name, accuracy in self.table]
        return {"readout": self.name, **({"candidates": table} if table else {})}


def choose_reading(probe: str, train: Bank, val: Bank | None, options: ProbeOptions) -> Reading:
    """The features by which the probe ``probe`` is best on the validation part; ties go to the first, the simpler.

    ``val`` None: a fifth of each class of ``train`` is held out, the same for all candidates. DataError as the probe.
    """
    entry = PROBES[probe]
    quiet, scored = replace(options, on_progress=None), []
    for transform in KINDS[:1] if entry.standardises else KINDS:
        for key, features in train.items():
            fitted, held = (features, val[key]) if val is not None else split_validation(features, seed=options.seed)
            change = Transform.fit(transform, fitted)
            accuracy = entry()(change(fitted), None, change(held), quiet).accuracy
            scored.append((Reading(key, transform), accuracy))
    scored.sort(key=lambda pair: -pair[1])  # stable
    return replace(scored[0][0], table=tuple((reading.name, accuracy) for reading, accuracy in scored))
