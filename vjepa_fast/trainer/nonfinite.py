"""Steps whose loss or gradients are not finite: ``optimization.on_nonfinite`` stops the run or skips the step. `Guard`
decides for them, and for loss spikes (`spikes`), before each update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vjepa_fast.config.schema import OptimizationConfig
from vjepa_fast.errors import TrainingError
from vjepa_fast.trainer.distributed import Distributed
from vjepa_fast.trainer.spikes import Spikes


class Guard:
    """Decides before each update whether weights may change.

    Under ``on_nonfinite: skip`` they may not where loss or gradients are not finite. Under ``stop`` the run ends when
    that is read; on a CPU, where looking costs nothing, no step from the failed one on changes weights until then.
    With ``spike_std`` they may not where the loss is a spike.

    Args:
        cfg: what is looked at.
        world: the processes; each has losses of its own, gradients are the same in all.
        device: of the losses.

    Attributes:
        failed: a step was not finite, and weights are those before it.
        spikes: what is known of losses; None without ``spike_std``.
    """

    def __init__(self, cfg: OptimizationConfig, world: Distributed, device: torch.device | str = "cpu"):
        self.cfg, self.world = cfg, world
        self.spikes = None if cfg.spike_std is None else Spikes(cfg, device)
        self._sound: Tensor | None = None  # bool [], of all steps so far
        self.looks = True  # on a CPU

    @property
    def failed(self) -> bool:
        """As above; reads it."""
        return self._sound is not None and not bool(self._sound)

    def go(self, losses: Sequence[Tensor], norm: Tensor | None) -> Tensor | None:
        """As `on_device`, and on a CPU under ``stop`` whether all steps so far were finite; None where nobody looks."""
        sound, decided = self._looked(losses, norm), self.on_device(losses, norm)
        return decided if sound is None else sound if decided is None else sound & decided

    def on_device(self, losses: Sequence[Tensor], norm: Tensor | None) -> Tensor | None:
        """Whether a step may change weights: bool [] on the device, the same in all processes, and nobody waits for it.

        None is returned, and nothing computed, unless steps can be skipped.

        Args:
            losses: of the step's batches, each [] or [n] with the loss first.
            norm: of the gradients []; None: it is looked at elsewhere.
        """
        skips = self.cfg.on_nonfinite == "skip"
        if not skips and self.spikes is None:
            return None
        loss = self.world.mean(torch.stack([x.detach().reshape(-1)[0].float() for x in losses]).mean())
        go = None if self.spikes is None else self.spikes.decide(loss, norm)
        if not skips:
            return go
        finite = torch.isfinite(loss) if norm is None else torch.isfinite(loss) & torch.isfinite(norm)
        return finite if go is None else finite & go

    def _looked(self, losses: Sequence[Tensor], norm: Tensor | None) -> Tensor | None:
        if self.cfg.on_nonfinite == "skip":
            return None
        seen = [] if norm is None else [norm]  # the same in all processes; a loss is not
        if self.world.world == 1:
            seen += [x.detach().reshape(-1)[0] for x in losses]
        if not self.looks or not seen or any(x.device.type != "cpu" for x in seen):
            return None
        sound = torch.isfinite(torch.stack([x.detach().float() for x in seen])).all()
        self._sound = sound if self._sound is None else self._sound & sound
        return self._sound


class NonFiniteError(TrainingError):
    """A loss, term or gradient norm that is not finite.

    Attributes:
        step: optimiser steps made, this one included.
        values: those that are not finite, by name.
        here: values of this process are among them; where they are of none, of the first.
        last: no later step changed weights, as far as rows tell.
    """

    def __init__(self, text: str, step: int, values: Mapping[str, str], *, here: bool = True, last: bool = False):
        super().__init__(text)
        self.step, self.values, self.here, self.last = step, dict(values), here, last

    def __reduce__(self) -> tuple[object, ...]:
        return TrainingError, (str(self),)


class Skips:
    """Counts skipped steps, on the host, when rows are read.

    Args:
        limit: steps in a row after which the run stops.

    Attributes:
        before: skipped in a row up to the last row that was written.
    """

    def __init__(self, limit: int, before: int = 0):
        self.limit, self.before = limit, before

    @staticmethod
    def of(values: Tensor) -> Tensor:
        """Which rows ``[loss, *terms, grad_norm]`` of [n, 2 + terms] are of skipped steps: bool [n]."""
        return ~(torch.isfinite(values[:, 0]) & torch.isfinite(values[:, -1]))

    def too_many(self, skipped: Tensor) -> int | None:
        """The first row with which more than ``limit`` steps in a row were skipped."""
        count = self.before
        for row, is_skipped in enumerate(skipped.tolist()):
            count = count + 1 if is_skipped else 0
            if count > self.limit:
                return row
        return None

    def after(self, skipped: Tensor) -> int:
        """``before`` once the row of these steps is written."""
        count = self.before
        for is_skipped in skipped.tolist():
            count = count + 1 if is_skipped else 0
        return count
