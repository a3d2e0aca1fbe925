"""Files with weights: which ones are read, and the tensors of one encoder in them under FAIR's names.

Files are read with ``weights_only=True`` or as safetensors only: a checkpoint never runs code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.errors import CheckpointError
from vjepa_fast.files import parse_json
from vjepa_fast.models import limits
from vjepa_fast.models.digests import verify

State = dict[str, Tensor]

_NAMES = {"target_encoder": ("target_encoder", "ema_encoder"), "encoder": ("encoder",)}  # 2.1: ema_encoder
_ROLES = tuple(name for names in _NAMES.values() for name in names)
_NESTS = ("state_dict", "model_state_dict", "model", "module")  # Lightning, plain loops, DeepSpeed
# What DDP, FSDP, torch.compile, activation checkpointing, Lightning and FAIR's MultiSeqWrapper put before names.
_LEADING = re.compile(r"^(?:(?:_orig_mod|module|backbone|model|net|_forward_module|_fsdp_wrapped_module)\.)+")
_ANYWHERE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PREDICTOR = re.compile(r"^(?:vjepa2\.)?predictor\.")
_HF = re.compile(r"^(?:vjepa2\.)?(?:encoder\.)?(?=embeddings\.patch_embeddings\.|layer\.\d+\.|layernorm\.)")


def open_weights(path: str | os.PathLike[str]) -> tuple[Path, dict[str, Any], dict[str, Any] | None]:
    """(file, its content, the Hugging Face ``config.json`` beside it or None) of a checkpoint or folder.

    Args:
        path: a ``.pt`` or ``.safetensors`` file, a run folder (its newest checkpoint is taken) or a folder that
            Hugging Face's ``save_pretrained`` wrote, with one file of weights or several.

    Raises:
        CheckpointError: nothing there, or a damaged file.
    """
    path = Path(path)
    if not path.is_dir():
        beside = path.suffix in (".safetensors", ".bin")
        return path, read_checkpoint(path), _hf_config(path.parent) if beside else None
    config = _hf_config(path)
    if config is None:
        path = newest_checkpoint(path)
        return path, read_checkpoint(path), None
    parts = _parts(path)
    content: dict[str, Any] = {}
    for part in parts:
        content |= read_checkpoint(part)
    return parts[0] if len(parts) == 1 else path, content, config


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dictionary in a checkpoint file, tensors on the CPU and mapped from disk where the format allows it.

    Raises:
        CheckpointError: no such file, or a damaged one, or one that holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file; give a .pt or .safetensors file or a run folder")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        if start[8:] == b"{":  # the length of a header in JSON, then the header
            from safetensors.torch import load_file

            return load_file(path)
        if start[:2] == b"PK":
            limits.check_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=start[:2] == b"PK")
        limits.check_content(content, path)
    except CheckpointError:
        raise
    except MemoryError:
        raise CheckpointError(f"{path}: takes more memory than there is") from None
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
        raise CheckpointError(
            f"{folder}: no checkpoints/step-*.pt in this folder; train first or name a .pt or .safetensors file "
            "(a Hugging Face folder has a config.json)"
        )
    return max(found)[1]


def encoder_state(content: Mapping[str, Any], which: str, path: Path) -> tuple[State, bool]:
    """The tensors of one encoder under FAIR's names, and whether they had Hugging Face's.

    Found are checkpoints with an entry per network, one state dict alone, and one under ``state_dict`` or ``model``; in
    the latter two several networks may be told apart by the first part of the names (``encoder.``, ``predictor.``).
    A state dict of one encoder counts as the ``target_encoder``.

    Raises:
        CheckpointError: no such encoder, names that contradict each other, or tensors that are not what was written
            (`models.digests`; the configuration is checked too).
        ValueError: ``which`` is neither ``target_encoder`` nor ``encoder``.
    """
    if which not in _NAMES:
        raise ValueError(f"load_encoder: which: expected 'target_encoder' or 'encoder', got {which!r}")
    for name in _NAMES[which]:
        if _tensors(content.get(name)):
            verify(content, path, (name, "config") if "config" in content else (name,))
            return _bare(content[name], path), False
    if not any(_tensors(content.get(name)) for name in _ROLES):
        nested = next((content[name] for name in _NESTS if isinstance(content.get(name), Mapping)), None)
        if nested is not None and any(name in nested for name in _ROLES):
            return encoder_state(nested, which, path)
        flat = content if nested is None else nested
        if _tensors(flat) and (found := _only(_bare(flat, path), which, path)):
            return found
    held = ", ".join(str(key) for key in list(content)[:8]) or "nothing"
    if _tensors(content):
        held = f"one state dict of {len(content)} tensors"
    remedy = "try which='encoder' or another file" if which != "encoder" else "try which='target_encoder', the default"
    raise CheckpointError(f"{path}: holds no {which!r} weights (it holds: {held}); {remedy}")


def predictor_state(content: Mapping[str, Any], path: Path) -> State | None:
    """The tensors of the predictor of a file under FAIR's names; None where it holds none.

    Raises:
        CheckpointError: names that contradict each other, or part of a Hugging Face predictor missing.
    """
    if _tensors(content.get("predictor")):
        return _bare(content["predictor"], path)
    if any(_tensors(content.get(name)) for name in _ROLES):
        return None
    nested = next((content[name] for name in _NESTS if isinstance(content.get(name), Mapping)), None)
    if nested is not None and _tensors(nested.get("predictor")):
        return _bare(nested["predictor"], path)
    flat = content if nested is None else nested
    if not _tensors(flat):
        return None
    state = _bare(flat, path)
    part = {key.split("predictor.", 1)[1]: value for key, value in state.items() if _PREDICTOR.match(key)}
    if "embeddings.mask_tokens" in part:
        return _predictor_from_hf(part, path)
    return _bare(part, path) or None


def own_config(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration that our trainer writes into a checkpoint; None of another file, whatever its ``config`` is."""
    found = content.get("config")
    return found if isinstance(found, dict) and {"data", "model"} <= found.keys() else None


def trained(content: Mapping[str, Any]) -> str:
    """Under which name a file has the encoder that was trained: ``encoder`` in a run whose target was frozen, else
    ``target_encoder``, its moving average.
    """
    target = (own_config(content) or {}).get("target")
    frozen = isinstance(target, Mapping) and target.get("mode") == "frozen"
    return "encoder" if frozen else "target_encoder"


def mask_tokens(content: Mapping[str, Any]) -> int | None:
    """How many mask tokens the predictor of a checkpoint has; None without a predictor."""
    predictor = content.get("predictor")
    if not isinstance(predictor, Mapping):
        return None
    return sum(re.search(r"(?:^|\.)mask_tokens\.\d+$", key) is not None for key in predictor) or None


def _only(state: State, which: str, path: Path) -> tuple[State, bool] | None:
    """The encoder in a single state dict whose wrappers are off; None where it holds none of this name."""
    if any(_HF.match(key) for key in state):
        return (_from_hf(state, path), True) if which == "target_encoder" else None
    for name in _NAMES[which]:
        part = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        others = any(key.startswith(tuple(f"{role}." for role in _ROLES if role != name)) for key in state)
        if part and (which == "target_encoder" or others):
            return _bare(part, path), False
    if which == "encoder" or any(key.startswith(("target_encoder.", "ema_encoder.")) for key in state):
        return None
    part = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
    return _bare(part or state, path), False


def _bare(state: Mapping[str, Tensor], path: Path) -> State:
    """Names without what wrappers put before them."""
    bare: State = {}
    for key, value in state.items():
        if key.endswith("_flat_param"):
            raise CheckpointError(f"{path}: {key}: parameters as FSDP flattens them; save the full state dict instead")
        name = _LEADING.sub("", _ANYWHERE.sub("", key))
        if name in bare:
            raise CheckpointError(f"{path}: {key}: two tensors have the name {name} without their prefixes")
        bare[name] = value
    return bare


def _from_hf(state: State, path: Path) -> State:
    """The encoder of Hugging Face's ``VJEPA2Model``: queries, keys and values packed, everything else renamed."""
    named = {key[match.end() :]: value for key, value in state.items() if (match := _HF.match(key))}
    found = _blocks_from_hf(named, "encoder", path)
    found = {key.replace("embeddings.patch_embeddings.", "patch_embed."): value for key, value in found.items()}
    return {re.sub(r"^layernorm\.", "norm.", key): value for key, value in found.items()}


def _predictor_from_hf(state: State, path: Path) -> State:
    """The predictor of Hugging Face's ``VJEPA2Model``, whose mask tokens are one tensor [n,1,1,E]."""
    found: State = {}
    for key, value in _blocks_from_hf(state, "predictor", path).items():
        if key == "embeddings.mask_tokens":
            found |= {f"mask_tokens.{i}": token for i, token in enumerate(value)}
            continue
        name = key.replace("embeddings.predictor_embeddings.", "predictor_embed.")
        found[re.sub(r"^(blocks|norm|proj)\.", r"predictor_\1.", name.replace("layernorm.", "norm."))] = value
    return found


def _blocks_from_hf(state: State, network: str, path: Path) -> State:
    """The blocks of a network under FAIR's names, queries, keys and values packed; other names stay."""
    found: State = {}
    packed: dict[str, State] = {}
    for key, value in state.items():
        name = re.sub(r"^layer\.", "blocks.", key).replace("attention.proj.", "attn.proj.")
        if qkv := re.fullmatch(r"(blocks\.\d+)\.attention\.(query|key|value)\.(weight|bias)", name):
            packed.setdefault(f"{qkv[1]}.attn.qkv.{qkv[3]}", {})[qkv[2]] = value
        else:
            found[name] = value
    for name, parts in packed.items():
        if lacking := [part for part in ("query", "key", "value") if part not in parts]:
            old = name.replace("blocks.", f"{network}.layer.").replace("attn.qkv", f"attention.{lacking[0]}")
            raise CheckpointError(f"{path}: missing {old}; likely a damaged VJEPA2Model")
        found[name] = torch.cat([parts["query"], parts["key"], parts["value"]])
    return found


def _tensors(state: object) -> bool:
    return isinstance(state, Mapping) and bool(state) and all(isinstance(v, Tensor) for v in state.values())


def _hf_config(folder: Path) -> dict[str, Any] | None:
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        config = parse_json(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from error
    return config if isinstance(config, dict) else None


def _parts(folder: Path) -> list[Path]:
    """The files of weights of a Hugging Face folder."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            try:
                names = sorted(set(parse_json((folder / index).read_bytes())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise CheckpointError(f"{folder / index}: not an index of weights ({error})") from error
            for name in names:
                if not isinstance(name, str) or os.path.basename(name) != name:
                    raise CheckpointError(f"{folder / index}: {str(name)[:80]!r} is no file beside it")
            return [folder / name for name in names]
    for names in ("model.safetensors", "pytorch_model.bin"):
        if (folder / names).is_file():
            return [folder / names]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise CheckpointError(f"{folder}: config.json, but no model.safetensors beside it; name the file of weights")
    return found


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
