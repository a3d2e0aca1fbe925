"""The training objectives: 14 terms, composed by ``build_objectives`` into one module (docs/objectives.md)."""
from .api import Objective, TermContext, objective, registry
from .plan import ObjectiveOutput, ObjectivePlan, build_objectives
from .state import LatentState

__all__ = [
    "LatentState",
    "Objective",
    "ObjectiveOutput",
    "ObjectivePlan",
    "TermContext",
    "build_objectives",
    "objective",
    "registry",
]
