"""torch.compile by region: one Block is compiled for all of its kind, whatever the lengths of the masks."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil

import torch

from vjepa_fast.config.fields import require
from vjepa_fast.config.schema import Config, RuntimeConfig
from vjepa_fast.layers import attention
from vjepa_fast.models.predictor import Predictor
from vjepa_fast.models.vit import VisionTransformer

_log = logging.getLogger("vjepa_fast")


def resolve(cfg: Config, device: torch.device) -> str:
    """What ``runtime.compile`` means here: ``whole``, ``blocks``, ``target`` or ``off``.

    ``auto`` is ``blocks`` on CUDA where that can work, and ``off`` elsewhere; on CUDA the reason against it is logged.

    Raises:
        ConfigError: no such choice.
    """
    choice = cfg.runtime.compile
    require(RuntimeConfig, "runtime", compile=choice)
    if isinstance(choice, bool):
        return "whole" if choice else "off"
    if choice != "auto":
        return choice
    if device.type != "cuda":
        return "off"
    if reasons := objections(cfg):
        _log.warning("runtime.compile: auto leaves it off: %s", "; ".join(reasons))
        return "off"
    return "blocks"


def objections(cfg: Config) -> list[str]:
    """Why blocks should not be compiled for CUDA on this machine; empty if they should."""
    reasons = []
    if cfg.runtime.parallel == "fsdp":
        reasons.append("runtime.parallel: fsdp has not been tried with it")
    if importlib.util.find_spec("triton") is None:
        reasons.append("the package triton is not installed")
    if not (os.environ.get("CC") or any(shutil.which(name) for name in ("cc", "gcc", "clang"))):
        reasons.append("no C compiler (gcc) is found, which Triton needs")
    backend = attention.find(cfg.runtime.attention)
    if backend is not None and not backend.graph:
        reasons.append(f"runtime.attention: {backend.name} makes its tables outside of the compiled graph")
    return reasons


def compile_models(
    how: str,
    encoder: VisionTransformer,
    predictor: Predictor,
    target: VisionTransformer,
    *,
    steady: bool,
    backend: str = "inductor",
) -> None:
    """Compile in place (nothing happens before the first call; parameter names and state dicts stay).

    Blocks share one code object and their weights are inputs of the graph, so the first block of a kind (target,
    encoder, predictor) is compiled and the others find it. Lengths of masks are symbolic from the start.

    Args:
        how: of `resolve`.
        encoder: sees the context tokens.
        predictor: fills in the others.
        target: the module of the target's forward; it may be ``encoder``.
        steady: the target sees clips of one shape only, so its graph need not be symbolic.
        backend: of torch.compile.
    """
    own_target = target is not encoder
    if how == "whole":
        for module in (encoder, predictor, *([target] if own_target else [])):
            module.compile(dynamic=True, backend=backend)
    if how == "blocks":
        for block in (*encoder.blocks, *predictor.predictor_blocks):
            block.compile(dynamic=True, backend=backend)
    if how == "target" or (how == "blocks" and own_target):
        for block in target.blocks:
            block.compile(dynamic=not (steady and own_target), backend=backend)
