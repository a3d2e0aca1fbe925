"""The step as a CUDA graph: what of `TrainStep` can be captured, under which key, and what a replay needs of the host.

Where a step has one batch, on one process, all of it is one graph: target, context, predictor, losses, backward,
clipping, AdamW and the moving average (`Whole`). With accumulation, several processes or another optimiser, forward and
backward of each batch are one, and the rest runs apart (`Part`). A graph belongs to the shapes of its inputs and the
capacities of their masks; numbers that change from step to step (weights of terms, learning rate, decay, momentum) are
read from the device, so none of them is part of it.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from vjepa_fast.config.schema import Config
from vjepa_fast.errors import ConfigError
from vjepa_fast.layers import attention
from vjepa_fast.layers.packed import capacities
from vjepa_fast.masks.drawn import DrawnMasks
from vjepa_fast.metrics.profile import phase
from vjepa_fast.objectives.plan import ObjectivePlan
from vjepa_fast.ops import _check
from vjepa_fast.ops.block_masks import BlockMasks
from vjepa_fast.trainer import optim
from vjepa_fast.trainer.graphs import Captured, Graphs
from vjepa_fast.trainer.prefetch import Staged

if TYPE_CHECKING:
    from vjepa_fast.trainer.step import TrainStep

_log = logging.getLogger("vjepa_fast")
BUCKETS = 64  # most groups of parameters (see `optim.Bucket`) that a captured step has numbers for


class _Frozen:
    """In the place of step and epoch while a step is captured: a graph would keep the number of that step."""

    def _refuse(self, *_: object) -> Any:
        raise RuntimeError("a term's value() computes with the step or epoch; weight() and draw() may")

    __float__ = __int__ = __index__ = __bool__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __neg__ = _refuse


FROZEN: Any = _Frozen()


class Choice(NamedTuple):
    """What ``runtime.cuda_graphs`` comes to: ``step``, ``target`` or ``off``; under ``auto`` why it is not more."""

    how: str
    reasons: list[str]


def choose(cfg: Config, device: torch.device, *, quantum: int | None, target_grad: bool, plan: ObjectivePlan) -> Choice:
    """What can be captured on this device, as far as ``runtime.cuda_graphs`` asks for it.

    Args:
        cfg: the run's configuration.
        device: where it trains.
        quantum: of `capacity.quantum`.
        target_grad: the target takes part in the backward pass.
        plan: the objectives.

    Raises:
        ConfigError: ``true`` or ``target`` and it cannot be captured; names all reasons.
    """
    choice = cfg.runtime.cuda_graphs
    if choice is False:
        return Choice("off", [])
    common: list[str] = []
    if device.type != "cuda":
        common.append(f"it needs CUDA, the run is on {device.type}")
    backend = attention.find(cfg.runtime.attention)
    if _check.debugging():
        common.append("VJEPA_FAST_DEBUG=1 looks at values")
    if cfg.runtime.parallel == "fsdp":
        common.append("runtime.parallel: fsdp gathers weights anew at each use")
    step = list(common)
    if quantum == 0:
        step.append("the lengths of masks are exact, so new at every step (runtime.capacity_quantum)")
    if cfg.runtime.dtype == "float16":
        step.append("runtime.dtype: float16 looks at the gradients on the host")
    step += [f"objectives.{name}: {term.uncapturable}" for name, term in plan.terms.items() if term.uncapturable]
    target = list(common)
    if target_grad:
        target.append("the target takes part in the backward pass")
    if backend is not None and not backend.capture:
        target.append(f"runtime.attention: {backend.name} makes something on the host for a call")
        step.append(target[-1])
    if choice in (True, "target"):
        asked, reasons = ("step", step) if choice is True else ("target", target)
        if reasons:
            raise ConfigError(f"runtime.cuda_graphs: {str(choice).lower()}, but {'; '.join(reasons)}")
        return Choice(asked, [])
    if not step:
        return Choice("step", [])
    return Choice("off" if target else "target", step)


def build(step: TrainStep, cfg: Config, choice: Choice) -> Whole | Part | None:
    """The captured form of a step whose `Choice` is ``step``, else None; what ``auto`` leaves out on CUDA is logged."""
    if choice.reasons and step.device.type == "cuda":
        left = "to the target's forward" if choice.how == "target" else "off"
        _log.warning("runtime.cuda_graphs: auto leaves it %s: %s", left, "; ".join(choice.reasons))
    if choice.how != "step":
        return None
    forced = cfg.runtime.cuda_graphs is True
    single = cfg.optimization.accumulate == 1 and step.world.world == 1 and cfg.img_data is None
    whole = single and isinstance(step.optimizer, optim.AdamW)
    return Whole(step, forced=forced) if whole else Part(step, forced=forced)


class Values(NamedTuple):
    """What a graph leaves on the device: loss and unweighted terms, of a whole step the gradients' norm last.

    ``used``: the parameters that get a gradient, in order. ``buckets``: sizes of the optimiser's groups of them.
    """

    row: Tensor
    used: tuple[nn.Parameter, ...]
    buckets: tuple[int, ...] = ()


@dataclass
class Inputs:
    """What graphs of one batch shape read: at the same addresses for good, filled before each replay."""

    batch: Staged
    drawn: dict[str, Tensor]
    numbers: Tensor  # float64: weights of the terms, and from an even place on `ops.Rule.changing` of each bucket

    @classmethod
    def like(cls, batch: Staged, drawn: dict[str, Tensor], numbers: int, device: torch.device) -> Inputs:
        """Room for these, with nothing in it yet."""
        groups = [replace(g, clip=torch.empty_like(g.clip)) for g in batch.groups]
        masks = [DrawnMasks(_blank(m.masks), m.packed, m.arrived()) for m in batch.masks]
        room = {name: torch.empty_like(x) for name, x in drawn.items()}
        return cls(Staged(groups, batch.step, masks), room, torch.zeros(numbers, dtype=torch.float64, device=device))

    def fill(self, batch: Staged, drawn: dict[str, Tensor], numbers: Sequence[float]) -> None:
        """Copy these in, on the current stream."""
        ours, theirs = [*_tensors(self.batch), *self.drawn.values()], [*_tensors(batch), *drawn.values()]
        host = torch.tensor(numbers, dtype=torch.float64, pin_memory=self.numbers.is_cuda)
        for mine, other in zip((*ours, self.numbers[: len(numbers)]), (*theirs, host), strict=True):
            mine.copy_(other, non_blocking=True)

    def lengths_of(self, batch: Staged) -> Staged:
        """The batch of this, with the lengths that the host knows of another."""
        pairs = zip(self.batch.masks, batch.masks)
        masks = [DrawnMasks(mine.masks, mine.packed, other.arrived()) for mine, other in pairs]
        return replace(self.batch, masks=masks)


def _blank(masks: BlockMasks) -> BlockMasks:
    return BlockMasks(*(torch.empty_like(x) for x in _fields(masks)))


def _fields(masks: BlockMasks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return masks.enc, masks.pred, masks.enc_len, masks.pred_len


def _tensors(batch: Staged) -> list[Tensor]:
    return [*(g.clip for g in batch.groups), *(x for m in batch.masks for x in _fields(m.masks))]


class _Steps:
    """What both forms share: keys, inputs and numbers."""

    what = "the step"

    def __init__(self, step: TrainStep, *, forced: bool = False):
        self.step = step
        self.graphs: Graphs[Values] = Graphs(self.what, step.device, forced=forced)
        self.inputs: dict[Hashable, Inputs] = {}
        self.terms = len(step.plan.terms)
        self.rows = (
            -(-self.terms // 2) * 2
        )  # where the optimiser's numbers begin: at multiples of 16 bytes, as elsewhere

    def _inputs(self, batch: Staged, drawn: dict[str, Tensor]) -> Inputs:
        shapes = tuple((tuple(x.shape), x.dtype) for x in (*_tensors(batch), *drawn.values()))
        if shapes not in self.inputs:
            self.inputs[shapes] = Inputs.like(batch, drawn, self.rows + 4 * BUCKETS, self.step.device)
        return self.inputs[shapes]

    def _given_up(self) -> bool:
        """Whether no graph is used any more; the memory of their inputs is free then."""
        if self.graphs.off:
            self.inputs.clear()
        return self.graphs.off

    def _key(self, batch: Staged) -> Hashable:
        """What the launches for a batch depend on. Waits for the lengths of its masks, which were copied long ago."""
        quantum = self.step.quantum
        return tuple(
            (tuple(g.clip.shape), g.clip.dtype, g.modality, *capacities(m.masks, m.arrived(), quantum))
            for g, m in zip(batch.groups, batch.masks)
        )


class Whole(_Steps):
    """Whole steps of one batch as graphs."""

    def __call__(self, batch: Staged, weights: Sequence[float], index: int) -> Tensor | None:
        """[loss, *terms, norm] of step ``index``, made; or None, and nothing is done: it is to be run as it is."""
        if self._given_up():
            return None
        step, key = self.step, self._key(batch)
        assert isinstance(step.optimizer, optim.AdamW)
        drawn = step.plan.draw(step.at(batch, index), step.device)
        inputs = self._inputs(batch, drawn)
        numbers: list[float] = [*weights, *[0.0] * (self.rows - self.terms)]
        if key in self.graphs.seen and key not in self.graphs.captured:
            inputs.fill(batch, drawn, numbers)
        found = self.graphs.find(key, lambda: self._work(inputs.lengths_of(batch), inputs, index))
        for p in step.params:
            p.grad = None  # what a capture leaves there is the graph's
        if found is None:
            return None
        buckets = step.optimizer.buckets(found.result.used)
        if tuple(len(b.params) for b in buckets) != found.result.buckets:  # counts have parted since the capture
            self.graphs.forget(key)
            return None
        momentum = step.schedules.momentum(index)
        numbers += [x for b in buckets for x in b.rule(momentum).changing]
        step.optimizer.count(buckets)
        with phase("copy"):
            inputs.fill(batch, drawn, numbers)
        with phase("graph"):
            found.replay()
        return found.result.row.clone()

    def _work(self, batch: Staged, inputs: Inputs, index: int) -> Values:
        step, rows = self.step, self.rows
        assert isinstance(step.optimizer, optim.AdamW)
        for p in step.params:
            p.grad = None
        out, _ = step.losses(batch, index, inputs.numbers[: self.terms], inputs.drawn)
        out.total.backward()
        used = tuple(p for p in step.params if p.grad is not None)
        norm = optim.gradient_norm(step.params)
        buckets = step.optimizer.buckets(used)
        if len(buckets) > BUCKETS or not all(step.optimizer.state.get(p) for p in used):
            raise RuntimeError("parameters get their first gradient in it")
        numbers = inputs.numbers[rows : rows + 4 * len(buckets)].view(-1, 4)
        scale = optim.clip_scale(norm, step.cfg.optimization.clip_grad)
        go = step.guard.on_device([out.total], norm)
        given: dict[str, Any] = {"numbers": numbers, "go": go, "follow": step.follow}
        step.optimizer.work(buckets, average=step.average, momentum=0.0, scale=scale, **given)
        return Values(row(out.total, out.terms, norm), used, tuple(len(b.params) for b in buckets))


class Part(_Steps):
    """Forward and backward of a batch as a graph, which adds to the gradients that `Gradients` keeps in one place."""

    what = "forward and backward"

    def __call__(self, batch: Staged, weights: Sequence[float], index: int, share: int) -> Tensor | None:
        """[loss, *terms] of one of ``share`` batches of the step, its gradients added; or None, and nothing is done."""
        if self._given_up():
            return None
        step, key = self.step, (share, self._key(batch))
        drawn = step.plan.draw(step.at(batch, index), step.device)
        inputs = self._inputs(batch, drawn)
        if key in self.graphs.seen:
            with phase("copy"):
                inputs.fill(batch, drawn, list(weights))
        found: Captured[Values] | None
        with step.gradients.apart():
            found = self.graphs.find(key, lambda: self._work(inputs.lengths_of(batch), inputs, index, share))
        if found is None:
            return None
        with phase("graph"):
            found.replay()
        step.gradients.used.update(found.result.used)
        return found.result.row.clone()

    def _work(self, batch: Staged, inputs: Inputs, index: int, share: int) -> Values:
        step = self.step
        out, _ = step.losses(batch, index, inputs.numbers[: self.terms], inputs.drawn)
        (out.total / share).backward()
        return Values(row(out.total, out.terms), tuple(p for p in step.params if p in step.gradients.used))


def row(total: Tensor, terms: dict[str, Tensor], *more: Tensor) -> Tensor:
    """[loss, *terms, *more] of the loss's dtype, detached."""
    return torch.stack([x.detach().to(total.dtype).reshape(()) for x in (total, *terms.values(), *more)])
