"""Weights in files: ours and FAIR's. Tensor names in files are FAIR's (``module.backbone.blocks.0.attn.qkv.weight``).

Files are read with ``weights_only=True`` only: a checkpoint never runs code.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vjepa_fast.errors import CheckpointError
from vjepa_fast.models.build import encoder_from_config
from vjepa_fast.models.vit import VisionTransformer, build_encoder

if TYPE_CHECKING:
    from vjepa_fast.config.schema import Config

_PREFIX = re.compile(r"^(?:_orig_mod\.|module\.|backbone\.)+")


def to_fair(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A module's state dict with the names of FAIR checkpoints: every key prefixed ``module.backbone.``."""
    return {f"module.backbone.{key}": value for key, value in from_fair(state).items()}


def from_fair(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of ``to_fair``: wrapper prefixes (``module.``, ``backbone.``, ``_orig_mod.``) taken off."""
    return {_PREFIX.sub("", key): value for key, value in state.items()}


def read_checkpoint(path: str | Path) -> dict:
    """The dictionary in a checkpoint file, tensors on the CPU and mapped from disk where the format allows it.

    Raises:
        CheckpointError: no such file, or a damaged one, or one that holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file; give a .pt file or a run folder")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except MemoryError:
        raise
    except Exception as error:  # torch raises many kinds: unpickling, zip, EOF, key and runtime errors
        raise CheckpointError(f"{path}: {_why_unreadable(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not the dictionary of a checkpoint")
    return content


def newest_checkpoint(folder: str | Path) -> Path:
    """The checkpoint of the highest step in a run folder (``checkpoints/step-*.pt``)."""
    folder = Path(folder)
    found = [(int(m[1]), p) for p in folder.glob("checkpoints/*.pt") if (m := re.fullmatch(r"step-(\d+)\.pt", p.name))]
    if not found:
        raise CheckpointError(f"{folder}: no checkpoints/step-*.pt in this folder; train first or name a .pt file")
    return max(found)[1]


def load_weights(module: nn.Module, state: dict[str, torch.Tensor], source: str | Path) -> None:
    """Load a state dict (FAIR prefixes allowed) strictly.

    Raises:
        CheckpointError: one line that names missing, unexpected and misshapen tensors; nothing is loaded.
    """
    state, own = from_fair(state), module.state_dict()
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"not expected {key}" for key in state if key not in own]
    problems += [
        f"{key} is {list(state[key].shape)} in the file, {list(own[key].shape)} in the model"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{source}: checkpoint of another architecture: {'; '.join(problems[:3])}{more}")
    module.load_state_dict(state)


def load_encoder(
    path: str | Path,
    which: str = "target_encoder",
    device: torch.device | str = "cpu",
    *,
    config: Config | str | Path | None = None,
    **arch: Any,
) -> VisionTransformer:
    """A trained encoder, frozen for use: eval mode, no gradients.

    Args:
        path: a checkpoint of this package, a run folder (its newest checkpoint is taken), or a FAIR ``.pt``.
        which: ``target_encoder`` (the moving average) or ``encoder``.
        device: where the weights go.
        config: for files that hold no configuration: a ``Config`` or the path or name of a recipe.
        **arch: or the arguments of ``build_encoder`` (``name=`` or ``model_name=``, ``img_size=``, ...).

    Returns:
        The encoder, with ``clip_settings`` (crop_size, num_frames, tubelet_size, patch_size, frame_step, fps, duration,
        mean, std: how clips were made in training; the unknown is None) and ``checkpoint_hash`` (SHA-256 of weights).

    Raises:
        CheckpointError: missing or damaged file, no such encoder in it, or another architecture.
    """
    path = Path(path)
    path = newest_checkpoint(path) if path.is_dir() else path
    content = read_checkpoint(path)
    state = _adapt(_pick(content, which, path))
    if config is None and not arch:
        config = content.get("config")
        if config is None:
            raise CheckpointError(f"{path}: holds no configuration; pass config= or name=, img_size=, num_frames=, ...")
    if config is not None:
        config = _as_config(config, path)
        encoder, settings = encoder_from_config(config, "cpu"), clip_settings(config)
    else:
        arch = {("name" if key == "model_name" else key): value for key, value in arch.items()}
        encoder = build_encoder(**arch, device="cpu")
        settings = {
            "crop_size": encoder.img_size[0],
            "num_frames": encoder.num_frames,
            "frame_step": None,
            "fps": None,
            "duration": None,
            "mean": encoder.mean,
            "std": encoder.std,
        }
    if encoder.use_rope:
        state.pop("pos_embed", None)  # V-JEPA 2 files carry an unused one
    load_weights(encoder, state, path)
    encoder.clip_settings = {**settings, "tubelet_size": encoder.tubelet_size, "patch_size": encoder.patch_size}
    encoder.checkpoint_hash = hash_weights(encoder)
    return encoder.to(device).eval().requires_grad_(False)


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


def _why_unreadable(error: Exception) -> str:
    """One line from torch's several."""
    text = str(error)
    if code := re.search(r"GLOBAL ([\w.]+)", text):
        return f"holds more than tensors and plain values ({code[1]}): not loaded, since it could run code"
    if unpickler := re.search(r"WeightsUnpickler error: (.*)", text):
        text = unpickler[1]
    text = text.strip().split("\n")[0].split(". ")[0]
    text = text if " " in text else type(error).__name__
    return f"cannot be read (damaged, or not a weights file): {text}"


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _pick(content: dict, which: str, path: Path) -> dict:
    if which not in ("target_encoder", "encoder"):
        raise ValueError(f"load_encoder: which: expected 'target_encoder' or 'encoder', got {which!r}")
    names = ("target_encoder", "ema_encoder") if which == "target_encoder" else ("encoder",)
    for name in names:  # the published 2.1 weights call the average ema_encoder
        state = content.get(name)
        if isinstance(state, dict) and state and all(isinstance(v, torch.Tensor) for v in state.values()):
            return from_fair(state)
    held = ", ".join(str(key) for key in list(content)[:8]) or "nothing"
    raise CheckpointError(f"{path}: holds no {which!r} weights (it holds: {held}); try which='encoder' or another file")


def _adapt(state: dict) -> dict:
    """V-JEPA 2 has one final ``norm`` where 2.1 has one per level: with ``levels=1`` they are the same thing."""
    if "norms_block.0.weight" not in state:
        return {re.sub(r"^norm\.", "norms_block.0.", key): value for key, value in state.items()}
    return dict(state)


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
