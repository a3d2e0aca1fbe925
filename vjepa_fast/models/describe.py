"""What an encoder is, as data that can stand beside its weights, and read again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vjepa_fast.errors import CheckpointError
from vjepa_fast.files import parse_json
from vjepa_fast.layers.block import Block
from vjepa_fast.models.vit import SIZES, VisionTransformer

KEY = "vjepa_fast"  # in the metadata of a safetensors file
HF_TYPE = "vjepa21"  # model_type of a config.json
TIMM = "vjepa_fast_"  # architecture of a config.json of timm begins so
SETTINGS = ("crop_size", "num_frames", "frame_step", "fps", "duration")


def architecture(encoder: VisionTransformer) -> dict[str, Any]:
    """Arguments of ``build_encoder`` that make this encoder, all that matter for what it computes; plain values."""
    block = encoder.blocks[0]
    assert isinstance(block, Block)
    hidden = block.mlp.fc1.out_features
    height, width = encoder.img_size
    return {
        "embed_dim": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "num_heads": encoder.num_heads,
        "mlp_ratio": encoder.mlp_ratio,
        "img_size": height if height == width else [height, width],
        "patch_size": encoder.patch_size,
        "num_frames": encoder.num_frames,
        "tubelet_size": encoder.tubelet_size,
        "levels": encoder.levels,
        "use_rope": encoder.use_rope,
        "interpolate_rope": encoder.rope_base is not None,
        "rope_variant": encoder.rope_variant,
        "use_silu": hasattr(block.mlp, "fc3"),
        "wide_silu": hidden != int(encoder.embed_dim * encoder.mlp_ratio),
        "uniform_power": encoder.uniform_power,
        "modality_embedding": encoder.modality_embedding,
        "img_temporal_dim_size": encoder.img_temporal_dim_size,
        "cls_token": encoder.cls_token is not None,
        "block_causal": encoder.block_causal,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
    }


def settings(encoder: VisionTransformer) -> dict[str, Any]:
    """How clips were made in training, as far as it is known (`SETTINGS`)."""
    known = getattr(encoder, "clip_settings", {})
    return {key: known.get(key) for key in SETTINGS}


def metadata(encoder: VisionTransformer) -> dict[str, str]:
    """Metadata of a safetensors file, from which ``load_encoder`` needs no further argument."""
    return {KEY: json.dumps({"architecture": architecture(encoder), "clip_settings": settings(encoder)})}


def description(file: Path, hf_config: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(architecture, clip settings) that stand beside the weights in ``file``: what this package has exported, or timm
    has written of one of its models.

    Args:
        file: of weights, or a folder of several.
        hf_config: the ``config.json`` beside it.

    Raises:
        CheckpointError: a description that cannot be used.
    """
    if hf_config is not None and str(hf_config.get("architecture")).startswith(TIMM):
        return _of_timm(file, str(hf_config["architecture"]), hf_config.get("model_args"))
    if hf_config is not None and hf_config.get("model_type") == HF_TYPE:
        found, where = {"architecture": hf_config, "clip_settings": hf_config.get("clip_settings")}, "config.json"
    else:
        text, where = _metadata(file).get(KEY), f"metadata {KEY!r}"
        if text is None:
            return None
        try:
            found = parse_json(text)
        except ValueError:
            found = None
    try:
        arguments, clip = found["architecture"], found["clip_settings"] or {}  # pyright: ignore[reportOptionalSubscript]
        chosen = {key: arguments[key] for key in _ARGUMENTS}
        if isinstance(chosen["img_size"], list):
            chosen["img_size"] = tuple(chosen["img_size"])
        return chosen, {key: clip.get(key) for key in SETTINGS}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: {where} does not describe an encoder ({type(error).__name__}: {error}); export it again"
        ) from error


_ARGUMENTS = (
    *("embed_dim", "depth", "num_heads", "mlp_ratio", "img_size", "patch_size", "num_frames", "tubelet_size"),
    *("levels", "use_rope", "interpolate_rope", "rope_variant", "use_silu", "wide_silu", "uniform_power"),
    *("modality_embedding", "img_temporal_dim_size", "cls_token", "block_causal", "mean", "std"),
)


def _of_timm(file: Path, name: str, given: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of ``timm.models.save_for_hf``: the model's name and what ``timm.create_model`` was given."""
    size, given = name.removeprefix(TIMM).removesuffix("_patch16_224"), {} if given is None else given
    if size not in SIZES or not isinstance(given, dict):
        raise CheckpointError(f"{file}: config.json: there is no encoder {name!r} with arguments {given!r}")
    chosen = {key: value for key, value in given.items() if key in _ARGUMENTS}
    if unknown := [key for key in given if key not in (*_ARGUMENTS, *_OF_TIMM)]:
        raise CheckpointError(
            f"{file}: config.json: {name} has no argument {unknown[0]!r}; `load_encoder` cannot build it"
        )
    if chosen.get("img_temporal_dim_size") == 0:  # as `TimmEncoder` has it
        chosen["img_temporal_dim_size"] = None
    img_size = chosen.get("img_size")
    if isinstance(img_size, list):
        chosen["img_size"] = tuple(img_size)
    side = img_size[0] if isinstance(img_size, list) else img_size
    known = {"crop_size": side, "num_frames": chosen.get("num_frames")}
    return {"name": size, **chosen}, {key: known.get(key) for key in SETTINGS}


_OF_TIMM = (
    "num_classes",
    "global_pool",
    "drop_rate",
    "in_chans",
    "init",
    "use_activation_checkpointing",
)  # no matter here


def _metadata(file: Path) -> dict[str, str]:
    if file.suffix != ".safetensors" or not file.is_file():
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError):  # the reader of the tensors says it better
        return {}
