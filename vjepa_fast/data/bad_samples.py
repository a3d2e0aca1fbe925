"""Samples that could not be read: counted, listed, and too many of them stop the run."""

from __future__ import annotations

import logging

import numpy as np

from vjepa_fast.data.manifests.manifest import Manifest
from vjepa_fast.errors import DataError

_ENOUGH = 200  # different samples tried after which their share of bad ones is taken for the data set's
_log = logging.getLogger("vjepa_fast.data")


class BadSamples:
    """The unreadable samples of a run; raises when there are too many.

    Args:
        manifests: the data sets.
        max_fraction: unreadable share that is accepted (``data.max_bad_fraction``).
        limit: what sets it, for messages.

    Attributes:
        samples: (path, reason) of each unreadable file, in the order met.
        tried: number of different samples tried.
    """

    def __init__(self, manifests: list[Manifest], max_fraction: float, limit: str = "data.max_bad_fraction"):
        self.max_fraction = max_fraction
        self.limit = limit
        self.samples: list[tuple[str, str]] = []
        self.tried = 0
        self._total = sum(map(len, manifests))
        self._seen = [np.zeros(len(m), bool) for m in manifests]

    @property
    def count(self) -> int:
        """Number of unreadable samples."""
        return len(self.samples)

    def add(self, dataset: int, index: int, path: str, reason: str | None) -> None:
        """Note that a sample was tried; ``reason`` is None for one that could be read.

        Raises:
            DataError: more than ``max_fraction`` of all samples, or of those tried when enough were, are unreadable.
        """
        if self._seen[dataset][index]:
            return
        self._seen[dataset][index] = True
        self.tried += 1
        if reason is None:
            return
        reason = reason.removeprefix(f"{path}: ")
        self.samples.append((path, reason))
        _log.warning("skipped unreadable sample %s: %s", path, reason)
        if self.count > self.max_fraction * (self.tried if self.tried >= _ENOUGH else self._total):
            raise DataError(
                f"{self.count} of {self.tried} samples tried, of {self._total} in all, cannot be read: "
                f"over {self.limit} {self.max_fraction:g}; the last: {path}: {reason}; "
                "repair or remove them (vjepa-fast data check MANIFEST lists all)"
            )
