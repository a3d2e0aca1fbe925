"""The training objectives: 15 terms, composed by ``build_objectives`` into one module (docs/objectives.md)."""

from vjepa_fast.objectives.api import OBJECTIVES, Objective, TermContext, objective
from vjepa_fast.objectives.plan import ObjectiveOutput, ObjectivePlan, build_objectives
from vjepa_fast.objectives.state import LatentState

__all__ = [
    "OBJECTIVES",
    "LatentState",
    "Objective",
    "ObjectiveOutput",
    "ObjectivePlan",
    "TermContext",
    "build_objectives",
    "objective",
]
