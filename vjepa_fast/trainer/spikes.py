"""Loss spikes: ``optimization.spike_std`` skips steps whose loss is far above those before them.

The rule is the "loss regulation" of the published V-JEPA 2.1 trainer, but for one thing: there each process decides by
its own loss and its own list, so that their weights part; here all decide by the mean over the processes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vjepa_fast.config.schema import OptimizationConfig
from vjepa_fast.trainer.signals import weights_change


def dtype_on(device: torch.device | str) -> torch.dtype:
    """Of losses on a device: float64, float32 where it has no other."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


class Spikes:
    """The losses of the last steps and what they say of the next one, in device memory: nobody waits for it, and a CUDA
    graph can hold it, since all of it stays at its addresses.

    A step is a spike where its loss is above ``mean + spike_std * std`` (over the population) of the losses kept, its
    epoch is above ``spike_after_epoch``, and more than half of ``spike_window`` losses are kept. The losses of other
    steps are kept, the newest ``spike_window`` of them; one that is not finite is neither a spike nor kept.

    Args:
        cfg: ``spike_std`` is a number.
        device: of the losses.

    Attributes:
        losses: [window] of `dtype_on`, a ring.
        count: int64 [], losses kept so far in all; the next has its place at ``count % window``.
        total: int64 [], spikes so far in all.
        last: [3] of the losses' dtype: 1 where the last step was a spike, else 0; its bound (NaN without losses);
            ``total`` with it.
    """

    def __init__(self, cfg: OptimizationConfig, device: torch.device | str = "cpu"):
        assert cfg.spike_std is not None
        self.std, self.window, self.after = cfg.spike_std, cfg.spike_window, cfg.spike_after_epoch
        self.losses = torch.zeros(self.window, dtype=dtype_on(device), device=device)
        self.last = torch.zeros(3, dtype=dtype_on(device), device=device)
        self.count, self.total = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self.slots = torch.arange(self.window, device=device)
        self.late, self.is_late = torch.zeros((), dtype=torch.bool, device=device), False  # the epoch is above `after`

    def begin(self, epoch: int) -> None:
        """Before a step of this epoch, from 0: a graph reads from the device whether there can be a spike."""
        if self.is_late != (epoch > self.after):
            self.is_late = epoch > self.after
            self.late.fill_(self.is_late)

    @torch.no_grad()
    def decide(self, loss: Tensor, norm: Tensor | None) -> Tensor:
        """Whether the step may change weights as far as its loss [] goes: bool [] on the device. Keeps the loss.

        ``norm``: of the gradients []; where it is not finite the step is no spike either, and its loss is not kept.
        """
        weights_change()  # a step whose loss is kept is not given up
        loss = loss.to(self.losses.dtype)
        sound = torch.isfinite(loss) if norm is None else torch.isfinite(loss) & torch.isfinite(norm)
        number = self.count.clamp(max=self.window)
        mean = self.losses.sum() / number
        apart = torch.where(self.slots < number, self.losses - mean, 0.0)
        bound = mean + self.std * (apart.square().sum() / number).sqrt()
        spiked = self.late & sound & (number > int(0.5 * self.window)) & (loss > bound)
        keep = sound & ~spiked
        self.losses.copy_(torch.where(keep & (self.slots == self.count % self.window), loss, self.losses))
        self.count.add_(keep)
        self.total.add_(spiked)
        self.last.copy_(torch.stack([x.to(loss.dtype) for x in (spiked, bound, self.total)]))
        return ~spiked

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return {"losses": self.losses, "count": self.count, "total": self.total}

    def load_state_dict(self, state: Mapping[str, Tensor] | None) -> None:
        """Take over what `state_dict` returned, of another window its newest losses; None: nothing is known."""
        if state is None:
            state = {"losses": torch.zeros(1), "count": torch.tensor(0), "total": torch.tensor(0)}
        losses, count = state["losses"].cpu(), int(state["count"])
        if len(losses) != self.window:
            newest = range(count - min(count, len(losses), self.window), count)
            found = losses[[n % len(losses) for n in newest]]
            losses, count = torch.zeros(self.window, dtype=found.dtype), len(found)
            losses[:count] = found
        self.losses.copy_(losses)
        self.count.fill_(count)
        self.total.fill_(int(state["total"]))


def first_over(seen: Tensor, limit: int) -> int | None:
    """The first row of [n, 3], `Spikes.last` of each step, that is of more spikes in all than ``limit``."""
    over = ((seen[:, 0] > 0) & (seen[:, 2] > limit)).nonzero()
    return int(over[0]) if len(over) else None


def text(step: int, loss: float, seen: Tensor) -> str:
    """What is wrong with a step whose ``seen`` [3] is the row that `first_over` found."""
    _, bound, total = seen.tolist()
    return (
        f"step {step}: loss {loss:.4g} is above its bound {bound:.4g} (optimization.spike_std), and "
        f"{total:.0f} steps were skipped so, more than optimization.max_spikes"
    )
