"""The methods of training by name (``method``): which step a run makes. All else of a run is the same."""

from __future__ import annotations

from vjepa_fast.trainer.levjepa import LevjepaStep
from vjepa_fast.trainer.step import TrainStep

METHODS: dict[str, type[TrainStep] | type[LevjepaStep]] = {"vjepa": TrainStep, "levjepa": LevjepaStep}
