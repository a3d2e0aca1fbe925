"""Encoders from files: ours, FAIR's and Hugging Face's. Tensors in ours have FAIR's names (``module.backbone...``)."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vjepa_fast.errors import CheckpointError
from vjepa_fast.models.build import encoder_arguments
from vjepa_fast.models.describe import description
from vjepa_fast.models.parts import load_whole
from vjepa_fast.models.reading import Evidence, Reading, likely_architecture, read_encoder
from vjepa_fast.models.vit import VisionTransformer, build_encoder
from vjepa_fast.models.weights import (
    encoder_state,
    mask_tokens,
    newest_checkpoint,
    open_weights,
    own_config,
    read_checkpoint,
    trained,
)

if TYPE_CHECKING:
    from vjepa_fast.config.schema import Config

__all__ = [
    "clip_settings",
    "encoder_hash",
    "from_fair",
    "hash_weights",
    "load_encoder",
    "load_weights",
    "newest_checkpoint",
    "open_weights",
    "read_checkpoint",
    "to_fair",
]
_log = logging.getLogger("vjepa_fast")
_PREFIX = re.compile(r"^(?:_orig_mod\.|module\.|backbone\.)+")


def to_fair(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A module's state dict with the names of FAIR checkpoints: every key prefixed ``module.backbone.``."""
    return {f"module.backbone.{key}": value for key, value in from_fair(state).items()}


def encoder_to_fair(encoder: VisionTransformer) -> dict[str, torch.Tensor]:
    """An encoder's state dict under FAIR's names: with one ``norm`` where V-JEPA 2's code builds such an encoder."""
    state = encoder.state_dict()
    if encoder.levels == 1 and not encoder.modality_embedding and encoder.use_rope and encoder.rope_variant == "v2":
        state = {re.sub(r"^norms_block\.0\.", "norm.", key): value for key, value in state.items()}
    return to_fair(state)


def from_fair(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of ``to_fair``: wrapper prefixes (``module.``, ``backbone.``, ``_orig_mod.``) taken off."""
    return {_PREFIX.sub("", key): value for key, value in state.items()}


def load_weights(module: nn.Module, state: dict[str, torch.Tensor], source: str | Path, likely: str = "") -> None:
    """Load a state dict (FAIR prefixes allowed) strictly. ``likely``: words on what it seems to hold, for the message.

    Raises:
        CheckpointError: one line that names missing, unexpected and misshapen tensors; nothing is loaded.
    """
    state = from_fair(state)
    if "norms_block.0.weight" in module.state_dict():
        state = _adapt(state)
    if problems := misfit(module, state):
        raise CheckpointError(f"{source}: checkpoint of another architecture: {problems}{likely}")
    load_whole(module, state)


def misfit(module: nn.Module, state: dict[str, torch.Tensor]) -> str:
    """The first three tensors of a state dict (bare names) that do not fit a module, with both shapes; empty if all
    fit.
    """
    own = module.state_dict()
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"not expected {key}" for key in state if key not in own]
    problems += [
        f"{key} is {list(state[key].shape)} in the file, {list(own[key].shape)} in the model"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems += [
        f"{key} is {state[key].dtype} in the file, {own[key].dtype} in the model"
        for key in own
        if key in state and state[key].is_floating_point() != own[key].is_floating_point()
    ]
    problems += [
        f"{key} has no values that can be read ({value.layout}, {value.device})"
        for key, value in state.items()
        if value.layout != torch.strided or value.is_meta
    ]
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more


def encoder_tensors(state: dict[str, torch.Tensor], use_rope: bool) -> dict[str, torch.Tensor]:
    """What an encoder of ours loads of the tensors of a file: its names for the norms, no ``pos_embed`` beside RoPE."""
    state = _adapt(state)
    if use_rope:
        state.pop("pos_embed", None)  # V-JEPA 2 files carry an unused one
    return state


def load_encoder(
    path: str | Path,
    which: str | None = None,
    device: torch.device | str = "cpu",
    *,
    config: Config | str | Path | None = None,
    **arch: Any,
) -> VisionTransformer:
    """A trained encoder, frozen for use: eval mode, no gradients.

    A checkpoint of this package holds its configuration, what ``vjepa-fast export`` wrote (safetensors, Hugging Face)
    its architecture. Of any other file architecture and positions are read off the
    tensors and reported in one line (logger ``vjepa_fast``); see docs/models.md for what is read and how.

    Args:
        path: a checkpoint of this package, a run folder (its newest checkpoint is taken), a file of FAIR (V-JEPA,
            V-JEPA 2, 2.1), a folder or file of Hugging Face's ``VJEPA2Model``, or a state dict (``.pt``,
            ``.safetensors``), whatever DDP, FSDP, torch.compile or Lightning put before its names.
        which: ``target_encoder`` (the moving average, and the encoder of files that hold one) or ``encoder``; None is
            the former, but of a run with ``target.mode: frozen`` the latter.
        device: where the weights go.
        config: a ``Config`` or the path or name of a recipe, in place of what the file holds or seems to be.
        **arch: arguments of ``build_encoder`` (``name=`` or ``model_name=``, ``num_heads=``, ...). They win over the
            configuration and over what is read.

    Returns:
        The encoder, with ``clip_settings`` (crop_size, num_frames, tubelet_size, patch_size, frame_step, fps, duration,
        mean, std: how clips were made in training; the unknown is None) and ``checkpoint_hash`` (SHA-256 of weights).

    Raises:
        CheckpointError: missing or damaged file, no such encoder in it, another architecture, or a file that fits two
            readings: the message names the argument that decides. Nothing is loaded in part.
    """
    file, content, hf_config = open_weights(path)
    which = which or trained(content)
    state, hf_names = encoder_state(content, which, file)
    arch = {("name" if key == "model_name" else key): value for key, value in arch.items()}
    held = own_config(content) if config is None else config
    exported = description(file, hf_config) if held is None else None
    text = ""
    if exported is not None:
        encoder, settings = _exported(*exported, arch, file)
    elif held is None:
        reading = read_encoder(state, arch, Evidence(hf_names, hf_config, mask_tokens(content)), file)
        text = reading.text
        encoder = build_encoder(**reading.arguments, device="cpu")
        settings = _settings_read(reading, encoder)
    else:
        held = _as_config(held, file)
        arguments = encoder_arguments(held)
        if "name" in arch:
            arguments |= {"embed_dim": None, "depth": None, "num_heads": None}
        encoder = build_encoder(**{**arguments, **arch}, device="cpu")
        settings = {**clip_settings(held), "mean": encoder.mean, "std": encoder.std}
        settings |= {"crop_size": encoder.img_size[0], "num_frames": encoder.num_frames}
    state = encoder_tensors(state, encoder.use_rope)
    load_weights(encoder, state, file, f"; {likely_architecture(state, file)}")
    if text:
        _log.info("%s: %s", file, text)
    encoder.clip_settings = {**settings, "tubelet_size": encoder.tubelet_size, "patch_size": encoder.patch_size}
    encoder.checkpoint_hash, encoder.loaded_as = hash_weights(encoder), which
    return encoder.to(device).eval().requires_grad_(False)


def _exported(
    architecture: dict[str, Any], settings: dict[str, Any], arch: dict[str, Any], path: Path
) -> tuple[VisionTransformer, dict[str, Any]]:
    """The encoder, without weights, and ``clip_settings`` of a file that this package has exported."""
    try:
        encoder = build_encoder(**{**architecture, **arch}, device="cpu")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: describes an encoder that cannot be built: {error}") from error
    settings = {**settings, "mean": encoder.mean, "std": encoder.std}
    for key, given in (("crop_size", "img_size"), ("num_frames", "num_frames")):
        if given in arch:
            settings[key] = encoder.img_size[0] if key == "crop_size" else encoder.num_frames
    return encoder, settings


def _settings_read(reading: Reading, encoder: VisionTransformer) -> dict[str, Any]:
    """``clip_settings`` of a file without a configuration."""
    return {
        "crop_size": reading.crop_size,
        "num_frames": reading.num_frames,
        "frame_step": None,
        "fps": None,
        "duration": None,
        "mean": encoder.mean,
        "std": encoder.std,
    }


def hash_weights(module: nn.Module) -> str:
    """SHA-256 (hex) over names, shapes, dtypes and bytes of a module's state dict."""
    return _hashed(module, "", "{name} {shape} {dtype}\n")


def encoder_hash(encoder: nn.Module) -> str:
    """SHA-256 (hex) over the layout, the weights and the ``checkpoint_hash``, if any, of an encoder.

    Feature caches on disk are bound to it: its value must not change.
    """
    return _hashed(encoder, f"{encoder}{getattr(encoder, 'checkpoint_hash', '')}", "{name} {dtype} {shape}")


def _hashed(module: nn.Module, start: str, line: str) -> str:
    """Hash of ``start``, then of a ``line`` and the bytes for every tensor of the state dict."""
    digest = hashlib.sha256(start.encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(line.format(name=name, shape=tuple(value.shape), dtype=value.dtype).encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _adapt(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """V-JEPA 2 has one final ``norm`` where 2.1 has one per level: with ``levels=1`` they are the same thing."""
    if "norms_block.0.weight" in state:
        return state
    return {re.sub(r"^norm\.", "norms_block.0.", key): value for key, value in state.items()}


def _as_config(config: Config | dict[str, Any] | str | Path, path: Path) -> Config:
    from vjepa_fast import config as configs

    if isinstance(config, dict):
        return configs.from_dict(config, source=str(path))
    return configs.load(config) if isinstance(config, str | Path) else config


def clip_settings(cfg: Config) -> dict[str, Any]:
    """How a run of this configuration makes its clips: the keys of ``encoder.clip_settings``, but for the patches."""
    step = cfg.data.frame_sample_rate
    if step is None and cfg.data.fps is None and cfg.data.duration is None:
        step = 1
    return {
        "crop_size": cfg.data.crop_size,
        "num_frames": max(cfg.data.dataset_fpcs),
        "frame_step": step,
        "fps": cfg.data.fps,
        "duration": cfg.data.duration,
        "mean": tuple(cfg.data_aug.mean),
        "std": tuple(cfg.data_aug.std),
    }
