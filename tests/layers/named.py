"""A backend that is recognised by its results, for tests."""

from vjepa_fast.layers.attention import Backend
from vjepa_fast.layers.attention.sdpa import SDPA


class Named(Backend):
    """Counts its calls; its result, a multiple of the right one, is recognised."""

    def __init__(self, name, reasons=(), factor=1.0):
        self.name, self.reasons, self.factor, self.calls = name, list(reasons), factor, 0

    def objections(self, call):
        return self.reasons

    def __call__(self, q, k, v, segments):
        self.calls += 1
        return self.factor * SDPA(q, k, v, segments)
