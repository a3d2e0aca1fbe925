"""The batches that a step is measured on: with mask shapes that are new at every step, or repeated."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

from vjepa_fast.bench.providers import Provider, Work

TRIES = 20  # steps passed over, one after another, while looking for masks of new shapes


@dataclass(frozen=True)
class Ready:
    """A batch as `Provider.prepare` made it for step ``index``; ``known``: masks of its shapes came before."""

    index: int
    prepared: Any
    work: Work
    known: bool


class Batches:
    """Batches as `cases.SHAPES` says, a function of the configuration alone: the same for every provider.

    Args:
        provider: what prepares them.
        shapes: "new": a step whose masks have the shapes of an earlier one is passed over, unless there are none other.
            "repeated": the first ``cycle`` of these again and again.
        cycle: their number.
    """

    def __init__(self, provider: Provider, shapes: str, cycle: int):
        self.provider, self.index = provider, 0
        self.seen: set[tuple] = set()
        self.cycle = None
        if shapes == "repeated":
            self.cycle = itertools.cycle([self._new() for _ in range(cycle)])
            self.index = 0
            self.seen.clear()

    def take(self, count: int) -> list[Ready]:
        """The next ``count``."""
        return [self._new() if self.cycle is None else self._again(next(self.cycle)) for _ in range(count)]

    def _again(self, ready: Ready) -> Ready:
        known = ready.work.shapes in self.seen
        self.seen.add(ready.work.shapes)
        return replace(ready, known=known)

    def _new(self) -> Ready:
        last = self.index + TRIES
        while True:
            prepared = self.provider.prepare(self.index)
            work = self.provider.work(prepared)
            ready = Ready(self.index, prepared, work, work.shapes in self.seen)
            self.index += 1
            if not ready.known or ready.index == last:
                self.seen.add(work.shapes)
                return ready
