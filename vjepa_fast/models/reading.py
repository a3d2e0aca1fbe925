"""What the encoder in a file is, by its tensors: architecture, positions and the grid it was made for.

Who writes which names, in public code:

- V-JEPA (arXiv:2404.08471): one ``norm``, and a ``pos_embed`` of fixed sines and cosines that is added.
- V-JEPA 2 (arXiv:2506.09985): one ``norm``, rotary positions with frequencies in halves, never interpolated. The
  released files (ViT-L, H and g) may carry a ``pos_embed`` that is not used; the code of today writes none.
- V-JEPA 2.1 and the study (arXiv:2605.17165): ``norms_block``, an embedding per modality, rotary positions in pairs,
  interpolated.

Heads, RoPE variant and interpolation leave no trace in shapes. Where they do not follow from the above the reading
asks for them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.errors import CheckpointError
from vjepa_fast.models import rope
from vjepa_fast.models.vit import SIZES

# Heads of the released models by width; FAIR's vit_giant and vit_gigantic, of which no weights are public, have 16.
HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 22, 1664: 26}
# Grids (T, side) of the released V-JEPA files: 16 frames at 224 and at 384 pixels.
_VJEPA_GRIDS = {(1024, 24): {(8, 14)}, (1280, 32): {(8, 14), (8, 24)}}
_VJEPA2 = {(1024, 24), (1280, 32), (1408, 40)}
_SIZE_KEYS = ("embed_dim", "depth", "num_heads", "mlp_ratio")
_COMPUTED = {  # values of a config.json that this encoder computes
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "in_chans": 3,
}


@dataclass(frozen=True)
class Evidence:
    """What else of a file says something: ``hf_names``, its ``config.json``, the predictor's number of mask tokens."""

    hf_names: bool = False
    hf_config: Mapping[str, Any] | None = None
    mask_tokens: int | None = None


@dataclass(frozen=True)
class Reading:
    """Arguments of ``build_encoder``; which of the clip's sizes are known; and one line that says all this."""

    arguments: dict[str, Any]
    crop_size: int | None
    num_frames: int | None
    text: str


def read_encoder(state: Mapping[str, Tensor], given: Mapping[str, Any], evidence: Evidence, path: Path) -> Reading:
    """Read an encoder's architecture off its state dict under FAIR's names.

    Args:
        state: names without wrappers' prefixes.
        given: arguments of ``build_encoder`` that the caller gave: they win, and answer what the file leaves open.
        evidence: what else is known of the file.
        path: for messages.

    Raises:
        CheckpointError: not an encoder of this kind, or one that fits two readings: names the argument to give.
    """
    found = _shapes(state, path)
    config = _checked_config(evidence, given, path)
    if config:
        found["num_heads"] = config["num_attention_heads"]
    named = any(
        (s.embed_dim, s.depth) == (found["embed_dim"], found["depth"]) and found["mlp_ratio"] in (s.mlp_ratio, 4.0)
        for s in SIZES.values()
    )
    grid, uniform = sincos_grid(state.get("pos_embed"), found, given)
    positions, why = _positions(state, given, evidence, found, grid, named, path)
    found |= positions
    if uniform is not None:
        found["uniform_power"] = uniform
    size: dict[str, Any] = {}
    if config:
        size = {"img_size": config.get("crop_size"), "num_frames": config.get("frames_per_clip")}
    elif grid is not None:
        size = {"img_size": grid[1] * found["patch_size"], "num_frames": grid[0] * found["tubelet_size"]}
    elif not found.get("use_rope", True) and not {"img_size", "num_frames"} <= given.keys():
        raise CheckpointError(
            f"{path}: pos_embed {list(state['pos_embed'].shape)} is not made of sines and cosines, so the grid of its "
            "tokens is not known; give img_size= and num_frames="
        )
    size = {key: value for key, value in size.items() if value}
    if "name" in given:
        found = {key: value for key, value in found.items() if key not in _SIZE_KEYS}
    if {"wide_silu", "mlp_ratio"} & given.keys():
        for key in ("wide_silu", "mlp_ratio"):
            found.pop(key, None)
    found |= size
    arguments = {**found, **given}
    heads = ""
    if "name" not in arguments and "num_heads" not in arguments:
        width = arguments["embed_dim"]
        if width not in HEADS:
            raise CheckpointError(
                f"{path}: the number of heads is not in the file, and no released model has width {width}; give "
                f"num_heads= (or a recipe: config=, --config)"
            )
        arguments["num_heads"], heads = HEADS[width], " by its width"
    settings = {key: arguments.get(key) for key in ("img_size", "num_frames")}
    arguments.setdefault("img_size", 14 * arguments["patch_size"])  # rotary positions need no size: any will do
    arguments.setdefault("num_frames", 8 * arguments["tubelet_size"])
    crop = settings["img_size"]
    return Reading(
        arguments,
        crop if crop is None or isinstance(crop, int) else crop[0],
        settings["num_frames"],
        f"{why}: {_described(arguments, heads)}" + (f"; given: {', '.join(sorted(given))}" if given else ""),
    )


def likely_architecture(state: Mapping[str, Tensor], path: Path) -> str:
    """What a state dict seems to hold, in words, for the message of a misfit."""
    try:
        found = _shapes(state, path)
    except CheckpointError as error:
        return str(error).removeprefix(f"{path}: ")
    return f"likely {_size(found)}, {_layout(found)}"


def _shapes(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """What the shapes say."""
    proj = state.get("patch_embed.proj.weight")
    if proj is None:
        shown = ", ".join(f"{key} {list(value.shape)}" for key, value in list(state.items())[:2])
        raise CheckpointError(
            f"{path}: no patch_embed.proj.weight [width, 3, tubelet, patch, patch] among its {len(state)} tensors "
            f"({shown}, ...): likely not a V-JEPA encoder"
        )
    if proj.ndim != 5 or proj.shape[1] != 3 or proj.shape[3] != proj.shape[4]:
        likely = "; likely an image ViT (timm, MAE, DINO, I-JEPA)" if proj.ndim == 4 else ""
        raise CheckpointError(
            f"{path}: patch_embed.proj.weight is {list(proj.shape)} in the file, [width, 3, tubelet, patch, patch] in "
            f"a V-JEPA encoder{likely}"
        )
    width, _, tubelet, patch, _ = proj.shape
    foreign = [key for key in ("cls_token", "mask_token", "reg_token", "register_tokens") if key in state]
    if foreign:
        raise CheckpointError(
            f"{path}: {foreign[0]} {list(state[foreign[0]].shape)} is not part of a V-JEPA encoder; likely another "
            "video transformer"
        )
    blocks = {int(match[1]) for key in state if (match := re.match(r"blocks\.(\d+)\.", key))}
    if not blocks:
        raise CheckpointError(f"{path}: no blocks.0.*: likely not a V-JEPA encoder")
    gated = "blocks.0.mlp.fc3.weight" in state
    first = state.get("blocks.0.mlp.fc1.weight")
    hidden = 4 * width if first is None else first.shape[0]
    ratio = next(
        (s.mlp_ratio for s in SIZES.values() if s.embed_dim == width and int(width * s.mlp_ratio) == hidden),
        hidden / width,
    )
    if int(width * ratio) != hidden:  # what the division rounds off
        ratio = (hidden + 0.5) / width
    levels = len({match[1] for key in state if (match := re.match(r"norms_block\.(\d+)\.", key))})
    return {
        "embed_dim": width,
        "depth": max(blocks) + 1,
        "mlp_ratio": ratio,
        "patch_size": patch,
        "tubelet_size": tubelet,
        "levels": levels or 1,
        "use_silu": gated,
        "wide_silu": False,  # mlp_ratio is that of the matrices themselves
        "modality_embedding": "video_mod_embed" in state or "img_mod_embed" in state,
        "img_temporal_dim_size": 1 if "patch_embed_img.proj.weight" in state else None,
    }


def _checked_config(evidence: Evidence, given: Mapping[str, Any], path: Path) -> Mapping[str, Any] | None:
    """The Hugging Face configuration of an encoder with Hugging Face's names, refused where we compute otherwise."""
    config = evidence.hf_config
    if not evidence.hf_names or config is None:
        return None
    if config.get("model_type") != "vjepa2" or "num_attention_heads" not in config:
        raise CheckpointError(
            f"{path}: its config.json is of model_type {config.get('model_type')!r}; 'vjepa2' with num_attention_heads "
            "is read here"
        )
    for key, value in _COMPUTED.items():
        if config.get(key, value) != value:
            raise CheckpointError(f"{path}: config.json: {key}: {config[key]!r}; {value!r} is supported")
    other = [key for key, value in config.items() if "rope" in key and key != "use_rope" and value]
    if other and not {"rope_variant", "interpolate_rope"} <= given.keys():
        raise CheckpointError(
            f"{path}: config.json: {other[0]}: {config[other[0]]!r} changes the rotary positions in a way that is not "
            "known here; give rope_variant= and interpolate_rope="
        )
    return config


def _positions(
    state: Mapping[str, Tensor],
    given: Mapping[str, Any],
    evidence: Evidence,
    found: Mapping[str, Any],
    grid: tuple[int, int] | None,
    named: bool,
    path: Path,
) -> tuple[dict[str, Any], str]:
    """Arguments about positions, and what the file is called."""
    wanted = given.get("use_rope")
    if wanted is None and {"rope_variant", "interpolate_rope"} & given.keys():
        wanted = True
    by_level, embed = "norms_block.0.weight" in state, state.get("pos_embed")
    if wanted is None:
        wanted = embed is None or not bool(embed.any()) or not _added(evidence, found, grid, named, by_level, path)
    unused = " (its pos_embed is not used)" if embed is not None else ""
    if not wanted:
        return {"use_rope": False}, "positions as levels" if by_level else "V-JEPA"
    if by_level:
        return _by_level(given, found, path), f"V-JEPA 2.1{unused}"
    if not (named or evidence.hf_names or "rope_variant" in given):
        raise CheckpointError(
            f"{path}: fits two readings: V-JEPA 2 (frequencies in halves, not interpolated) of a size that FAIR's code "
            f"has no name for ({_size(found)}), or rotary positions of another kind; give rope_variant='v2' for the "
            "first, else rope_variant= and interpolate_rope="
        )
    return {"rope_variant": "v2", "interpolate_rope": False}, f"V-JEPA 2{unused}"


def _by_level(given: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Rotary positions of a file with one norm per level."""
    if not found["modality_embedding"] and "interpolate_rope" not in given:
        raise CheckpointError(
            f"{path}: fits two readings: norms_block without an embedding per modality, which FAIR's V-JEPA 2.1 code "
            "writes with and without interpolated positions; give interpolate_rope=True or False (the released models "
            "have True)"
        )
    return {"rope_variant": "v2.1", "interpolate_rope": True}


def _added(
    evidence: Evidence, found: Mapping[str, Any], grid: tuple[int, int] | None, named: bool, by_level: bool, path: Path
) -> bool:
    """Whether a ``pos_embed`` is added to the tokens."""
    if grid is None or by_level:  # learnt, or by code of ours: no model with rotary positions has carried one
        return True
    size = (found["embed_dim"], found["depth"])
    if named and (size not in _VJEPA2 or grid in _VJEPA_GRIDS.get(size, ())):
        return True  # V-JEPA alone writes it at this size
    tokens = evidence.mask_tokens
    if named and (size not in _VJEPA_GRIDS or (grid[1] == 16 and (tokens is None or tokens > 2))):
        return False  # the released V-JEPA 2 files, whose predictors have 10 mask tokens
    raise CheckpointError(
        f"{path}: fits two readings: pos_embed holds sines and cosines of a grid of {grid[0]} x {grid[1]} x {grid[1]}, "
        "which V-JEPA adds to the tokens and V-JEPA 2 carries unused; give use_rope=False for V-JEPA, use_rope=True "
        "with rope_variant='v2' for V-JEPA 2"
    )


def sincos_grid(
    embed: Tensor | None, found: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[tuple[int, int] | None, bool | None]:
    """((T, side), ``uniform_power``) of a ``pos_embed`` of sines and cosines; None, None of another."""
    if embed is None or embed.ndim != 3 or embed.shape[2] != found["embed_dim"]:
        return None, None
    tokens, width = embed.shape[1:]
    ids = torch.linspace(0, tokens - 1, min(tokens, 64), dtype=torch.float64).long()
    rows = embed[0, ids].float()
    for side in range(1, int(tokens**0.5) + 1):
        if tokens % side**2:
            continue
        positions = torch.stack((ids // side**2, ids // side % side, ids % side), 1).double()
        for uniform in (True, False):
            wanted = rope.sincos_rows(width, positions, uniform)
            if wanted.shape == rows.shape and torch.allclose(wanted, rows, rtol=0, atol=0.02):  # bfloat16 too
                return (tokens // side**2, side), uniform
    return None, None


def _described(arguments: Mapping[str, Any], heads: str) -> str:
    """An encoder in words."""
    a = arguments
    size = str(a["name"]) if "name" in a else f"{_size(a)}, {a['num_heads']} heads{heads}"
    if a.get("use_rope", True):
        halves = "halves" if a["rope_variant"] == "v2" else "pairs"
        positions = f"RoPE in {halves}, {'' if a['interpolate_rope'] else 'not '}interpolated"
    else:
        positions = f"pos_embed added, made for {a['num_frames']} frames of {a['img_size']} px"
    return f"{size}, {_layout(a)}, {positions}"


def _size(a: Mapping[str, Any]) -> str:
    name = next((n for n, s in SIZES.items() if (s.embed_dim, s.depth) == (a["embed_dim"], a["depth"])), None)
    return f"{f'{name}, ' if name else ''}width {a['embed_dim']}, {a['depth']} blocks"


def _layout(a: Mapping[str, Any]) -> str:
    patch = f"{a['tubelet_size']}x{a['patch_size']}x{a['patch_size']}"
    return f"patches {patch}, {a['levels']} level{'s' if a['levels'] > 1 else ''}"
