"""One training step: target, context, predictor, objectives, AdamW, EMA (V-JEPA, arXiv:2404.08471 section 3; V-JEPA 2,
arXiv:2506.09985 section 2; the study, arXiv:2605.17165).

Shapes: B clips, F frames, N tokens of the grid (T,H,W), Ke and Kp kept context and predicted tokens, D = levels * E.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vjepa_fast import masks, models, objectives, ops
from vjepa_fast.config.schema import Config
from vjepa_fast.errors import ConfigError
from vjepa_fast.layers.block import choose_attention, use_attention, use_epilogues
from vjepa_fast.layers.packed import Packed, Stream
from vjepa_fast.metrics import collapse as monitors
from vjepa_fast.metrics import flops
from vjepa_fast.metrics.profile import phase, whole_step
from vjepa_fast.models import interop
from vjepa_fast.models.vit import VisionTransformer
from vjepa_fast.ops import _capture
from vjepa_fast.trainer import capacity, captured, nonfinite, optim, precision, regional, scaling, sharding
from vjepa_fast.trainer.building import build_models, build_samplers, reaches_target
from vjepa_fast.trainer.distributed import Distributed, Gradients
from vjepa_fast.trainer.graphs import Graphs
from vjepa_fast.trainer.prefetch import Staged, to_device
from vjepa_fast.trainer.schedules import Schedules

if TYPE_CHECKING:
    from vjepa_fast.data.loader import Batch, ClipGroup

IMAGE_GROUPS = 8  # mask draws of images are keyed apart from those of the videos of the same step


@dataclass
class StepOutput:
    """What one step gives to the log. Tensors are 0-d, detached and still on the device: nothing was waited for."""

    loss: Tensor
    terms: dict[str, Tensor]
    weights: dict[str, float]
    grad_norm: Tensor
    lr: float
    weight_decay: float
    momentum: float
    clips: int
    paths: list[str]
    stop: bool = False  # some process was asked to stop
    work: flops.Work = flops.Work()  # of this process
    monitors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    spike: Tensor | None = None  # `Spikes.last`; None where steps are not skipped for their loss


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: the device does not exist here.
    """
    if name in ("auto", "cuda"):
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank)
        if name == "auto":
            return torch.device("cpu")
        raise ConfigError("runtime.device: cuda was asked for and torch finds no CUDA device here; use cpu or auto")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"runtime.device: {name!r} cannot be used ({str(error).splitlines()[0]})") from None
    return device


class TrainStep:
    """Holds the models, objectives and optimiser of a run; a call makes one optimiser step.

    Args:
        cfg: the run's configuration.
        device: where.
        dtype: float32, or bfloat16 or float16 by autocast; float16 with a scaled loss (`scaling.Scaler`).
        world: the processes that train together.

    Attributes: ``encoder``, ``predictor``, ``target_encoder`` (under ``target.mode: online`` the encoder itself, or
    with ``compat: published`` a copy frozen at initialisation, as those runs saved it), ``plan`` (objectives and their
    heads), ``optimizer``, ``schedules``. Initial weights depend on ``cfg.seed`` alone.
    """

    def __init__(
        self,
        cfg: Config,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        world: Distributed | None = None,
    ):
        self.cfg, self.device, self.dtype = cfg, torch.device(device), dtype
        self.world = world or Distributed()
        self.schedules = Schedules.from_config(cfg)
        self.online = cfg.target.mode == "online"
        torch.manual_seed(cfg.seed)
        encoder, predictor, plan = build_models(cfg)
        self.encoder, self.predictor = encoder.to(self.device), predictor.to(self.device)
        if cfg.runtime.fp8:
            precision.enable_fp8(self.device, dtype, encoder, predictor)
        use_attention(cfg.runtime.attention, self.device, dtype, encoder, predictor)
        self.sharded = sharding.wanted(cfg, self.world)
        use_epilogues(False if self.sharded else cfg.runtime.epilogues, self.device, dtype, encoder, predictor)
        self.quantum = capacity.quantum(cfg, self.device, dtype, encoder, predictor)
        if self.online and cfg.compat != "published":
            self.target_encoder = self.encoder
        else:
            self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.plan = plan.to(self.device)
        if self.sharded:
            encoders = ((m, m.blocks) for m in (self.encoder, self.target_encoder))
            cut = self.predictor, self.predictor.predictor_blocks
            sharding.shard(self.world, self.device, dtype, *encoders, cut)
        choice = cfg.model.mask_token_index or ("zero" if cfg.compat == "published" else "mask")
        self.shared_token = choice == "zero"
        self.wants_context, self.wants_target = "z_context" in self.plan.needs, "h" in self.plan.needs
        self.target_grad = reaches_target(cfg, self.plan)
        modules = {"encoder": self.encoder, "predictor": self.predictor, "heads": self.plan}
        self.optimizer = optim.build_optimizer(modules, cfg.optimization, self.device)
        self.params = optim.parameters(self.optimizer)
        self.scaler = scaling.Scaler() if dtype == torch.float16 else None
        self.guard = nonfinite.Guard(cfg.optimization, self.world, self.device)
        # at a spike the published average follows the encoder that did not move
        self.follow = self.guard.spikes.last[0] if self.guard.spikes and cfg.compat == "published" else None
        self.sampler, self.img_sampler = build_samplers(cfg)
        self.dims = flops.Dims.of(self.encoder, self.predictor)
        self._build_target(cfg)

    def _build_target(self, cfg: Config) -> None:
        """What the target forward calls, and how: a copy of the weights in the computing dtype, compiled, captured."""
        lower = not self.online and self.dtype != torch.float32 and not self.sharded
        self.low = models.LowCopy(self.target_encoder, self.dtype) if lower else None
        averaged = cfg.target.mode == "ema"
        self.average = optim.Average(self.encoder, self.target_encoder, self.low) if averaged else None
        target = self.encoder if self.online else self.low.copy if self.low else self.target_encoder
        assert isinstance(target, VisionTransformer)
        self.target = target
        tokens = math.prod(self.encoder.built_grid)
        if not self.target_grad:  # what is measured for it has no backward
            choose_attention(self.device, self.dtype, cfg.data.batch_size, tokens, self.target)
        self.steady = cfg.img_data is None and len(set(cfg.data.dataset_fpcs)) == 1  # all batches have one shape
        how = regional.resolve(cfg, self.device)
        regional.compile_models(how, self.encoder, self.predictor, self.target, steady=self.steady)
        choice = captured.choose(cfg, self.device, quantum=self.quantum, target_grad=self.target_grad, plan=self.plan)
        self.capture(captured.build(self, cfg, choice), target=choice.how == "target")

    def capture(self, graphs: captured.Whole | captured.Part | None, *, target: bool = False) -> None:
        """Make steps through these graphs from now on, or with ``target`` through one of the target's forward alone."""
        self.captured = graphs
        self.target_graphs: Graphs[Tensor] | None = None
        if target:
            forced = self.cfg.runtime.cuda_graphs == "target"
            self.target_clips: dict[Hashable, Tensor] = {}
            self.target_graphs = Graphs("the target's forward", self.device, forced=forced, shared=False)
        if self.sharded:
            self.gradients = sharding.ShardedGradients(self.params, self.world)
            return
        static = self.steady and self.cfg.optimization.accumulate == 1
        in_place = isinstance(graphs, captured.Part)
        self.gradients = Gradients(self.params, self.world, in_place=in_place, static=static)

    @whole_step
    def __call__(
        self,
        batches: Batch | Staged | Sequence[Batch | Staged],
        index: int,
        *,
        stop: bool = False,
        monitor: bool = False,
    ) -> StepOutput:
        """One optimiser step over one or more micro-batches, whose losses are averaged.

        Args:
            batches: what the loaders returned for this step, or what `stage` made of it.
            index: 0-based optimiser step; schedules, anneals and masks depend on it.
            stop: this process was asked to stop; the output says whether any was.
            monitor: also compute the collapse monitors.
        """
        micro = list(batches) if isinstance(batches, Sequence) else [batches]
        lr, wd = self.schedules.lr(index), self.schedules.weight_decay(index)
        optim.set_schedule(self.optimizer, lr, wd)
        if self.guard.spikes is not None:
            self.guard.spikes.begin(self.schedules.epoch(index))
        momentum, weights = self.schedules.momentum(index), [self.plan.weights(self.at(b, index)) for b in micro]
        made = None
        if isinstance(self.captured, captured.Whole) and not monitor and len(micro) == 1:
            micro = [batch := self._staged(micro[0], index)]
            if (row := self.captured(batch, list(weights[0].values()), index)) is not None:
                made = _Made([row[:-1]], row[-1], self.work(batch, index))
        if made is None:
            made = self._backward_with_room(micro, index, weights, monitor)
            stop = self.gradients.finish(stop)
            self._update(made, momentum)
        rows = made.rows
        groups = [g for b in micro for g in b.groups]
        loss, *terms = (rows[0] if len(rows) == 1 else torch.stack(rows).float().mean(0)).unbind()
        return StepOutput(
            loss=loss,
            terms=dict(zip(self.plan.terms, terms)),
            weights={name: weight for of_batch in weights for name, weight in of_batch.items()},
            grad_norm=made.norm,
            lr=lr,
            weight_decay=wd,
            momentum=momentum,
            clips=sum(len(g.paths) for g in groups) * self.world.world,
            paths=[p for g in groups for p in g.paths],
            stop=stop,
            work=made.work,
            monitors=made.monitors,
            spike=None if self.guard.spikes is None else self.guard.spikes.last.clone(),
        )

    def _update(self, made: _Made, momentum: float) -> None:
        """Change the weights by the gradients; not where float16 overflowed, or the step is skipped."""
        with phase("optimiser"):
            made.norm = optim.gradient_norm(self.params)
        cfg, on_device, factor = self.cfg.optimization, self.captured is not None, None
        go = self.guard.go(made.rows, made.norm if self.scaler is None else None)
        if self.scaler is not None:
            skipped, follows = go is not None and not go, self.cfg.compat == "published"
            if not skipped:
                made.norm, factor = self.scaler.down(made.norm)
            elif self.guard.spikes is not None:
                made.norm = self.scaler.aside(made.norm)
                follows = self.follow is not None and bool(self.follow)
            else:
                return
            if factor is None:
                if self.average and follows:
                    self.average.follow(momentum)
                return
        given: dict[str, Any] = {"on_device": on_device, "factor": factor, "go": go, "follow": self.follow}
        optim.update(self.optimizer, self.average, momentum, made.norm, cfg.clip_grad, **given)

    def _backward_with_room(
        self, micro: Sequence[Batch | Staged], index: int, weights: Sequence[Mapping[str, float]], monitor: bool
    ) -> _Made:
        """`_backward`, again without graphs where memory ran out beside them."""
        try:
            return self._backward(micro, index, weights, monitor)
        except torch.OutOfMemoryError:
            if self.captured is None or not self.captured.graphs.make_room():
                raise
        return self._backward(micro, index, weights, monitor)

    def _backward(
        self, micro: Sequence[Batch | Staged], index: int, weights: Sequence[Mapping[str, float]], monitor: bool
    ) -> _Made:
        """The gradients of all batches."""
        self.gradients.begin()
        made = _Made([])
        for number, batch in enumerate(micro):
            last, numbers = number == len(micro) - 1, list(weights[number].values())
            if isinstance(self.captured, captured.Part) and not monitor:
                batch = self._staged(batch, index)
                if (row := self.captured(batch, numbers, index, len(micro))) is not None:
                    made.work += self.work(batch, index)
                    made.rows.append(row)
                    continue
            given = None
            if self.captured is not None:  # as a graph reads them
                given = _capture.constant(torch.tensor(numbers, dtype=torch.float64, device="cpu"), self.device)
            out, state = self.losses(batch, index, given)
            made.work += self._count(state)
            if monitor and last:
                if not state.has("h"):
                    state.h = [self._target(state.clips[0], 0)]
                made.monitors = monitors.of_state(state, self.encoder.levels)
            del state  # features that the backward pass does not ask for are free from here on
            with phase("backward"):
                total = out.total if self.scaler is None else self.scaler.up(out.total)
                self.gradients.backward(total / len(micro), last=last)
            made.rows.append(captured.row(out.total, out.terms))
        return made

    def losses(
        self, batch: Batch | Staged, index: int, weights: Tensor | None = None, drawn: dict[str, Tensor] | None = None
    ) -> tuple[objectives.ObjectiveOutput, objectives.LatentState]:
        """Losses of a batch and the state behind them; ``weights``, ``drawn``: see `ObjectivePlan.forward`."""
        state = self.forward(batch, index)
        if drawn is not None:  # of a graph, which would keep these numbers
            state.drawn, state.step, state.epoch = drawn, captured.FROZEN, captured.FROZEN
        with phase("losses"):
            return self.plan(state, weights), state

    def _count(self, state: flops.Masked) -> flops.Work:
        return flops.of_state(
            self.dims, state, predict_context=self.wants_context, target_grad=self.target_grad, target=self.wants_target
        )

    def work(self, batch: Staged, index: int) -> flops.Work:
        """The work behind a batch whose state is in a graph, from the lengths that the host knows."""
        state = self.at(batch, index)
        sides = zip(*([flops.Lengths.of(x) for x in m.arrived().tolist()] for m in batch.masks))
        enc, pred = ([[x] for x in side] for side in sides)
        grids = [self.encoder.grid(g.clip.shape) for g in batch.groups]
        return self._count(flops.Counted(grids, enc, pred, state.modality))

    def _staged(self, batch: Batch | Staged, index: int) -> Staged:
        return batch if isinstance(batch, Staged) else self.stage(batch, index)

    def stage(self, batch: Batch, index: int) -> Staged:
        """The clips on the device and the masks of step ``index`` drawn from them; nothing is waited for."""
        with phase("copy"):
            groups = [replace(g, clip=to_device(g.clip, self.device)) for g in batch.groups]
        with phase("masks"):
            drawn = [self._sampler(g).draw(g.clip, **self._keys(g, n, index)) for n, g in enumerate(groups)]
        return Staged(groups, batch.step, drawn)

    def _sampler(self, group: ClipGroup) -> masks.MaskStrategy:
        return self.img_sampler if group.modality == "image" else self.sampler

    def _keys(self, group: ClipGroup, number: int, index: int) -> dict[str, int]:
        """What the masks of the group are a function of."""
        key = number + IMAGE_GROUPS if group.modality == "image" else number
        return {"step": index, "first_sample": group.first_sample, "group": key}

    def forward(self, batch: Batch | Staged, index: int) -> objectives.LatentState:
        """Everything before the objectives: the state of one micro-batch, with gradients where they belong.

        ``h`` and ``z_context`` are left out, and not computed, where no term of the plan needs them.
        Where CUDA graphs are in use, ``h`` is overwritten by the next call with clips of the same shape.
        """
        state = self.at(batch, index)
        fields = ["grids", "clips", "z", "z_pred", "masks_enc", "masks_pred"]
        fields += ["h"] * self.wants_target + ["z_context"] * self.wants_context
        for name in fields:
            setattr(state, name, [])
        for number, group in enumerate(batch.groups):
            with phase("copy"):  # uint8: the patch embedding normalises what it reads
                clip = to_device(group.clip, self.device)
            if isinstance(batch, Staged):
                drawn = batch.masks[number]
            else:
                with phase("masks"):
                    drawn = self._sampler(group).draw(clip, **self._keys(group, number, index))
            if self.wants_target:
                state.h.append(self._target(clip, number))
            with phase("masks"):  # lengths arrived while the device was busy; the target needs none of them
                enc, pred = drawn.wait(self.quantum)
            enc, pred = [m.to(self.device) for m in enc], [m.to(self.device) for m in pred]
            z, z_pred, z_context = self._context(clip, enc, pred, group.modality)
            state.grids.append(self.encoder.grid(clip.shape))
            state.clips.append(clip)
            state.z.append(z)
            state.z_pred.append(z_pred)
            if self.wants_context:
                state.z_context.append(z_context)
            state.masks_enc.append(enc)
            state.masks_pred.append(pred)
        return state

    def at(self, batch: Batch | Staged, index: int) -> objectives.LatentState:
        """The state of a batch without features: where in the run it is, its modality, how its target comes."""
        s, aug = self.schedules, self.cfg.data_aug
        return objectives.LatentState(
            step=index,
            total_steps=s.total_steps,
            epoch=s.epoch(index),
            epochs=s.epochs,
            modality="image" if all(g.modality == "image" for g in batch.groups) else "video",
            h_normalized=self.target_grad,
            mean=aug.mean,
            std=aug.std,
        )

    def _target(self, clip: Tensor, slot: int) -> Tensor:
        """``h`` [B,N,D], normalised per level only where it carries gradient: else the losses do as they read it."""
        with phase("target"):
            if self.target_graphs is not None:
                return self._target_replayed(self.target_graphs, clip, slot)
            h_BND = self._target_forward(clip)
            return ops.target_norm(h_BND, self.encoder.levels) if self.target_grad else h_BND

    def _target_replayed(self, graphs: Graphs[Tensor], clip: Tensor, slot: int) -> Tensor:
        key = slot, tuple(clip.shape), clip.dtype
        if key not in self.target_clips:
            self.target_clips[key] = torch.empty_like(clip, memory_format=torch.contiguous_format)
        static = self.target_clips[key]
        found = graphs.find(key, lambda: self._target_forward(static))
        if found is None:
            return self._target_forward(clip)
        static.copy_(clip, non_blocking=True)
        found.replay()
        return found.result

    def _target_forward(self, clip: Tensor) -> Tensor:
        # no cache: autocast keeps casted weights, and those of a no_grad pass would carry no gradient later
        with torch.set_grad_enabled(self.target_grad), self.autocast(cache=False):
            return self.target(clip)

    def _context(
        self, clip: Tensor, enc: list[Tensor | Packed], pred: list[Tensor | Packed], modality: str
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per mask context ``z`` [B,Ke,D], ``z_pred`` [B,Kp,D], ``z_context`` [B,Ke,D]; or those of a stream of all."""
        with phase("context"), self.autocast():
            z = self.encoder(clip, masks=enc)
        with phase("predictor"), self.autocast():
            masks = enc[0].masks if isinstance(enc[0], Stream) else len(enc)
            tokens = [0 if self.shared_token else j for j in range(masks)]
            z_pred, z_context = self.predictor(
                z, enc, pred, tokens, modality, grid=self.encoder.grid(clip.shape), context=self.wants_context
            )
        return z, z_pred, z_context

    def autocast(self, cache: bool = True) -> AbstractContextManager[object]:
        """The precision in which models run; ``cache``: keep casted weights until it ends."""
        return precision.autocast(self.device, self.dtype, cache)

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint's ``encoder predictor target_encoder heads opt scaler``, under the FAIR names, and ``spikes``
        where the run skips those.

        Of weights that are cut over the processes all must call it, and the first gets them whole.
        """
        state = {
            "encoder": interop.encoder_to_fair(self.encoder),
            "predictor": interop.to_fair(self.predictor.state_dict()),
            "target_encoder": interop.encoder_to_fair(self.target_encoder),
            "heads": dict(self.plan.state_dict()),
            "opt": self.optimizer.state_dict(),
            "scaler": scaling.FRESH if self.scaler is None else self.scaler.state_dict(),
        }
        if self.guard.spikes is not None:
            state["spikes"] = self.guard.spikes.state_dict()
        return sharding.whole(state, keep=self.world.main) if self.sharded else state

    def load_state_dict(self, state: Mapping[str, Any], path: object = "checkpoint") -> None:
        """Take over the entries of `state_dict`; ``scaler`` and ``spikes`` may be missing.

        Raises:
            CheckpointError: they belong to another architecture or to other objectives.
        """
        for name in ("encoder", "predictor", "target_encoder"):
            interop.load_weights(getattr(self, name), state[name], f"{path}: {name}")
        if self.low is not None:
            self.low.refresh()
        interop.load_weights(self.plan, state["heads"], f"{path}: objectives")
        optim.load_state(self.optimizer, state["opt"], path)
        self.params = optim.parameters(self.optimizer)
        if self.scaler is not None:
            self.scaler.load_state_dict(state.get("scaler"))
        if self.guard.spikes is not None:
            self.guard.spikes.load_state_dict(state.get("spikes"))
        if self.captured is not None:  # the moments are other tensors now
            self.captured.graphs.clear()


@dataclass
class _Made:
    """What is there when the gradients are: [loss, *terms] of each batch; ``norm`` is that of the gradients."""

    rows: list[Tensor]
    norm: Tensor = field(default_factory=lambda: torch.zeros(()))
    work: flops.Work = flops.Work()
    monitors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
