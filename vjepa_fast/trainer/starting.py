"""Where a new run starts from: the weights that ``init.path`` names, in place of fresh ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vjepa_fast.config.schema import Config
from vjepa_fast.errors import CheckpointError, UserError
from vjepa_fast.models import initial
from vjepa_fast.models.interop import misfit
from vjepa_fast.models.parts import load_whole
from vjepa_fast.models.predictor import Predictor
from vjepa_fast.models.vit import VisionTransformer
from vjepa_fast.models.weights import trained
from vjepa_fast.trainer import levjepa, optim
from vjepa_fast.trainer.building import build_models
from vjepa_fast.trainer.step import TrainStep

if TYPE_CHECKING:
    from vjepa_fast.trainer.levjepa import LevjepaStep


def take(cfg: Config, step: TrainStep | LevjepaStep, saved: Mapping[str, Any] | None) -> list[str]:
    """Load what ``cfg.init`` and ``cfg.target`` name into the models of a run that begins; one line for each part.

    Nothing is loaded where any of it is refused, nor into a run that goes on from ``saved``.

    Raises:
        CheckpointError: see `models.initial.find_parts`; or the optimiser's state is asked for and does not fit.
    """
    lines = _weights(cfg, step, saved)
    if saved is None and cfg.target.path is not None:
        assert isinstance(step, TrainStep)
        part = _frozen(cfg.target.path, step.target_encoder)
        load_whole(step.target_encoder, part.state or {})
        lines = [line for line in lines if not line.startswith("init: target_encoder")]
        lines.append(f"target, frozen: {part.reason}")
    if lines and isinstance(step, TrainStep) and step.low is not None:
        step.low.refresh()
    return lines


def _weights(cfg: Config, step: TrainStep | LevjepaStep, saved: Mapping[str, Any] | None) -> list[str]:
    path = cfg.init.path
    if path is None:
        return []
    if saved is not None:
        if saved["config"].get("init", {}).get("path") == path:
            return []
        return [f"init: {path} is not read, the run goes on from its own checkpoint; --no-resume starts over from it"]
    found = initial.find_parts(path, step.encoder, _predictor(step), _wanted(cfg))
    moments = _moments(cfg, found)
    for part in found.parts:
        module = getattr(step, part.name, None)
        if part.state is not None and not (part.name == "target_encoder" and module is step.encoder):
            assert isinstance(module, nn.Module)
            load_whole(module, part.state)
    lines = [str(part) for part in _as_the_run_has_them(step, found.parts)] + _heads(step, found.content)
    if moments is not None:
        optim.load_moments(step.optimizer, moments, found.file)
        step.params = optim.parameters(step.optimizer)
        lines.append(f"optimizer: taken: the moments of AdamW in {found.file}")
    return [f"init: {line}" for line in lines]


def _frozen(path: str, encoder: nn.Module) -> initial.Part:
    """The encoder that was trained in a file, for the target of a run."""
    assert isinstance(encoder, VisionTransformer)
    found = initial.find_parts(path, encoder, None, "new")
    name = trained(found.content)
    return next(part for part in found.parts if part.name == name)


def describe(cfg: Config) -> list[str]:
    """What `take` would say of ``cfg.init``, from shapes alone; one line on why where it would refuse it."""
    if cfg.init.path is None and cfg.target.path is None:
        return []
    key, lines = "target.path", []
    try:
        predictor: nn.Module | None = None
        with torch.device("meta"):
            if cfg.method == "levjepa":
                encoder, _ = levjepa.build_models(cfg)
            else:
                encoder, predictor, _ = build_models(cfg)
        if cfg.target.path is not None:
            lines.append(f"target, frozen: {_frozen(cfg.target.path, encoder).reason}")
        key = "init.path"
        if cfg.init.path is not None:
            found = initial.find_parts(cfg.init.path, encoder, predictor, _wanted(cfg))
            _moments(cfg, found)
            lines += [f"init: {part}" for part in found.parts if part.name != "target_encoder" or not lines]
    except UserError as error:
        return [f"train would refuse {key}: {error}"]
    return lines


def _wanted(cfg: Config) -> str:
    return "required" if cfg.init.optimizer and cfg.method == "vjepa" else cfg.init.predictor


def _predictor(step: TrainStep | LevjepaStep) -> Predictor | None:
    return step.predictor if isinstance(step, TrainStep) else None


def _moments(cfg: Config, found: initial.Found) -> Mapping[str, Any] | None:
    """The optimiser's state of the file, where it is asked for."""
    if not cfg.init.optimizer:
        return None
    state = found.content.get("opt")
    if not isinstance(state, Mapping) or "state" not in state:
        raise CheckpointError(
            f"{found.file}: opt: holds no optimiser state; set init.optimizer=false for weights alone"
        )
    return state


def _as_the_run_has_them(step: TrainStep | LevjepaStep, parts: list[initial.Part]) -> list[initial.Part]:
    if step.target_encoder is not step.encoder:
        return parts
    return [
        *parts[:2],
        initial.Part("target_encoder", parts[0].state, "it is the encoder, as target.mode: online says"),
    ]


def _heads(step: TrainStep | LevjepaStep, content: Mapping[str, Any]) -> list[str]:
    """Learnable parts of the loss, taken where all of them fit; no line where the run has none."""
    heads: nn.Module = step.plan if isinstance(step, TrainStep) else step.projector
    if not heads.state_dict():
        return []
    state = content.get("heads")
    if isinstance(state, dict) and state and not misfit(heads, state):
        heads.load_state_dict(state)
        return ["heads of the loss: taken: they fit"]
    return ["heads of the loss: new: the file holds none that fit"]
