"""Which decoder reads a run's own files the fastest, for ``data.decoder: auto`` where there is a choice."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from vjepa_fast.config.schema import Config
from vjepa_fast.data.decoders import DECODERS
from vjepa_fast.data.decoders.api import AUTO
from vjepa_fast.data.loader import Batch, ClipLoader
from vjepa_fast.data.media import one_line
from vjepa_fast.errors import UserError

_SECONDS = 1.0  # for all decoders together, after the first batch of each
_CLIPS = 8  # of a batch
_BATCHES = 3  # at least
_CLOSE = 5.0  # grey levels in the mean by which a clip may differ from PyAV's
_GAIN = 1.1  # by which another decoder has to be faster


@dataclass
class Fastest:
    """What was measured.

    Attributes:
        name: the decoder to use. clips_per_s: of each that gives PyAV's frames. refused: why others do not count.
    """

    name: str = AUTO
    clips_per_s: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def note(self, section: str) -> str:
        """One line for the user."""
        said = [f"{name} {rate:.0f} clips/s" for name, rate in self.clips_per_s.items()]
        said += [f"{name} is out: {reason}" for name, reason in self.refused.items()]
        damage = "" if self.name == AUTO else "; it sees less damage than pyav, which vjepa-fast data check uses"
        return f"{section}.decoder: auto is {self.name} ({', '.join(said)}){damage}"


def usable() -> list[str]:
    """Names of the decoders that can be used here."""
    return [name for name, kind in DECODERS.items() if not kind.objections()]


def fastest(cfg: Config, *, rank: int = 0, world: int = 1, img: bool = False) -> Fastest:
    """Read batches of the run with each usable decoder for a part of a second; PyAV if that cannot be done.

    A decoder counts if its first batch shows what PyAV's does, and is taken if it is faster by a tenth.

    Args:
        cfg, rank, world, img: as of `ClipLoader`.
    """
    result, right = Fastest(), None
    names = [AUTO, *(name for name in usable() if name != AUTO)]
    for name in names:
        try:
            with _quiet():
                first, rate = _measure(cfg, name, rank, world, img, _SECONDS / len(names))
        except Exception as error:  # whatever a library does, the run goes on without it
            if name == AUTO:  # the run will say what is wrong
                return Fastest()
            known = isinstance(error, UserError)
            result.refused[name] = str(error) if known else f"{type(error).__name__}: {one_line(error)}"
            continue
        right = right or first
        if (off := _difference(right, first)) > _CLOSE:
            result.refused[name] = f"{off:.1f} grey levels off"
        else:
            result.clips_per_s[name] = rate
    best = max(result.clips_per_s, key=lambda name: result.clips_per_s[name])
    if result.clips_per_s[best] > _GAIN * result.clips_per_s[AUTO]:
        result.name = best
    return result


def _measure(cfg: Config, name: str, rank: int, world: int, img: bool, seconds: float) -> tuple[Batch, float]:
    """The first batch, and clips per second of those after it."""
    section = cfg.img_data if img else cfg.data
    assert section is not None
    section = replace(section, decoder=name, batch_size=min(_CLIPS, section.batch_size), cache_mb=0)
    cfg = replace(cfg, img_data=section) if img else replace(cfg, data=section)
    with ClipLoader(cfg, rank=rank, world=world, img=img) as loader:
        first, batches, begin = next(loader), 0, time.perf_counter()
        while batches < _BATCHES or time.perf_counter() - begin < seconds:
            next(loader)
            batches += 1
        return first, batches * section.batch_size / (time.perf_counter() - begin)


def _difference(right: Batch, other: Batch) -> float:
    """The largest mean difference of a clip, in grey levels."""
    pairs = [(c, d) for g, h in zip(right.groups, other.groups) for c, d in zip(g.clip, h.clip)]
    if [g.paths for g in right.groups] != [g.paths for g in other.groups]:
        return 255.0
    return max(float((c.cpu().to(torch.int16) - d.cpu().to(torch.int16)).abs().float().mean()) for c, d in pairs)


@contextmanager
def _quiet() -> Iterator[None]:
    """What is said of files is said again by the run."""
    log = logging.getLogger("vjepa_fast.data")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
