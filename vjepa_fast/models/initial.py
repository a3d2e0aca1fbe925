"""The weights that a new run starts from: which networks of a file fit those of the run, and why others do not.

Heads, positions and their interpolation are in no shape, so a file that fits every tensor may still compute something
else: what a file was made with is read (`reading.py`, or the configuration in it) and compared with the run's models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vjepa_fast import config as configs
from vjepa_fast.errors import CheckpointError
from vjepa_fast.models.build import encoder_arguments
from vjepa_fast.models.interop import encoder_tensors, misfit
from vjepa_fast.models.predictor import Predictor
from vjepa_fast.models.reading import Evidence, likely_architecture, read_encoder, sincos_grid
from vjepa_fast.models.vit import SIZES, VisionTransformer, build_encoder
from vjepa_fast.models.weights import State, encoder_state, mask_tokens, open_weights, own_config, predictor_state

_TRACELESS = "every tensor fits, and yet it computes something else"
_PREDICTOR_HEADS = {384: 12}  # of the released predictors, by width


@dataclass(frozen=True)
class Part:
    """One network of a run: ``state`` is loaded into it (taken) or None (new, or ``refused``); ``reason`` says why."""

    name: str
    state: State | None
    reason: str
    refused: bool = False

    def __str__(self) -> str:
        verdict = "taken" if self.state is not None else "refused, starts new" if self.refused else "new"
        return f"{self.name}: {verdict}: {self.reason}"


@dataclass(frozen=True)
class Found:
    """What there is to start from: the parts ``encoder``, ``predictor`` and ``target_encoder``, in this order, and the
    content of the file.
    """

    file: Path
    content: dict[str, Any]
    parts: list[Part]


def find_parts(
    path: str | Path, encoder: VisionTransformer, predictor: Predictor | None, wanted: str = "auto"
) -> Found:
    """Look which networks of a file fit those of a run; loads nothing, and models may be on the meta device.

    Args:
        path: as of `load_encoder`.
        encoder: of the run.
        predictor: of the run; None: it has none.
        wanted: of the predictor: ``auto`` (where it fits), ``new`` (not looked at) or ``required``.

    Raises:
        CheckpointError: no such file; its encoder does not fit; or a predictor that is required is not there or does
            not fit. The message names file, tensors, both shapes, the likely architecture and the settings of a recipe
            that takes it.
    """
    file, content, hf_config = open_weights(path)
    parts = [
        Part(name, *_encoder(file, content, hf_config, encoder, name))  # of the target first: files of one encoder
        for name in ("target_encoder", "encoder")
    ]
    parts.insert(1, _predictor(file, content, hf_config, predictor, wanted))
    return Found(file, content, parts[::-1])


def _encoder(
    file: Path, content: Mapping[str, Any], hf_config: Mapping[str, Any] | None, encoder: VisionTransformer, name: str
) -> tuple[State, str]:
    """(tensors, whence) of one encoder of the run."""
    held, (state, hf_names) = _held(content, name, file)
    evidence = Evidence(hf_names, hf_config, mask_tokens(content))
    theirs, text = _described(file, content, state, evidence, encoder)
    likely = likely_architecture(state, file)
    fitted = _resized(encoder_tensors(state, encoder.use_rope), encoder, "pos_embed")
    problem, ours = misfit(encoder, fitted), _settings(encoder)
    other = "" if theirs is None else _differences(_settings(theirs), ours)
    if problem or other:
        advice = f"; a recipe that takes it has {other}" if other else ""
        raise CheckpointError(f"{file}: {held}: {problem or _TRACELESS}; {likely}{advice}")
    only = "" if held == name else f", which holds no {name}"
    return fitted, f"{held} of {file}{only} ({text})"


def _held(content: Mapping[str, Any], name: str, file: Path) -> tuple[str, tuple[State, bool]]:
    """The encoder of this name in a file, or the other one where it holds but one; with its name there."""
    other = "encoder" if name == "target_encoder" else "target_encoder"
    try:
        return name, encoder_state(content, name, file)
    except CheckpointError as error:
        try:
            return other, encoder_state(content, other, file)
        except CheckpointError:
            raise error from None


def _described(
    file: Path, content: Mapping[str, Any], state: State, evidence: Evidence, encoder: VisionTransformer
) -> tuple[VisionTransformer | None, str]:
    """An encoder on the meta device as the file was made with, or None where nothing says how, and words on it."""
    held = own_config(content)
    if held is not None:
        arguments = encoder_arguments(configs.from_dict(held, source=str(file)))
        return build_encoder(**arguments, device="meta"), f"step {content.get('step', '?')} of a run of this package"
    ours: dict[str, Any] = {}
    proj = state.get("patch_embed.proj.weight")
    size = encoder.embed_dim, len({m[1] for key in state if (m := re.match(r"blocks\.(\d+)\.", key))})
    released = any((s.embed_dim, s.depth) == size for s in SIZES.values())
    if proj is not None and proj.shape[0] == encoder.embed_dim and not released:
        ours["num_heads"] = encoder.num_heads  # nothing else knows it
    try:
        reading = read_encoder(state, ours, evidence, file)
    except CheckpointError:
        if proj is None or proj.ndim != 5:
            raise
        if proj.shape[0] != encoder.embed_dim:
            return None, ""
        # it fits two readings: the recipe says which
        ours |= {"num_heads": encoder.num_heads, "use_rope": encoder.use_rope}
        if encoder.use_rope:
            ours |= {"rope_variant": encoder.rope_variant, "interpolate_rope": encoder.rope_base is not None}
        else:
            ours |= {"img_size": encoder.img_size, "num_frames": encoder.num_frames}
        reading = read_encoder(state, ours, evidence, file)
    return build_encoder(**reading.arguments, device="meta"), reading.text


def _resized(state: State, model: VisionTransformer | Predictor, name: str) -> State:
    """Positions of sines and cosines for another grid are those of the run's: they are computed, not learnt."""
    embed, own = state.get(name), getattr(model, name, None)
    if embed is None or own is None or embed.shape == own.shape:
        return state
    grid, _ = sincos_grid(embed, {"embed_dim": model.embed_dim}, {})
    return state if grid is None else {**state, name: own.detach()}


def _settings(encoder: VisionTransformer) -> dict[str, Any]:
    """The settings of a recipe by which an encoder computes what it does."""
    found = {
        "model.embed_dim": encoder.embed_dim,
        "model.depth": len(encoder.blocks),
        "model.num_heads": encoder.num_heads,
        "data.patch_size": encoder.patch_size,
        "data.tubelet_size": encoder.tubelet_size,
        "model.levels": encoder.levels,
        "model.use_rope": encoder.use_rope,
        "model.modality_embedding": encoder.modality_embedding,
        "model.img_temporal_dim_size": encoder.img_temporal_dim_size,
        "model.use_silu": "blocks.0.mlp.fc3.weight" in encoder.state_dict(),
        "method": "vjepa" if encoder.cls_token is None else "levjepa",
    }
    if encoder.cls_token is not None:
        found["levjepa.attention"] = "block_causal" if encoder.block_causal else "full"
    if encoder.use_rope:
        return found | {
            "model.rope_variant": encoder.rope_variant,
            "model.interpolate_rope": encoder.rope_base is not None,
        }
    return found | {"model.uniform_power": encoder.uniform_power}


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """What a recipe has to say to be like the file, as ``key=value, ...``."""
    other = {key: value for key, value in theirs.items() if key not in ours or ours[key] != value}
    keys = ("model.embed_dim", "model.depth", "model.num_heads")
    size = tuple(theirs.get(key) for key in keys)
    name = next((n for n, s in SIZES.items() if (s.embed_dim, s.depth, s.num_heads) == size), None)
    if name is not None and other.keys() & set(keys):
        other = {"model.model_name": name} | {key: value for key, value in other.items() if key not in keys}
    return ", ".join(f"{key}={_yaml(value)}" for key, value in other.items())


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _predictor(
    file: Path,
    content: Mapping[str, Any],
    hf_config: Mapping[str, Any] | None,
    predictor: Predictor | None,
    wanted: str,
) -> Part:
    if predictor is None:
        return Part("predictor", None, "this method has none")
    if wanted == "new":
        return Part("predictor", None, "as init.predictor says")
    state = predictor_state(content, file)
    if state is None:
        if wanted == "required":
            raise CheckpointError(f"{file}: holds no predictor; set init.predictor=auto to begin with a new one")
        return Part("predictor", None, f"{file} holds none")
    if predictor.use_rope:
        state.pop("predictor_pos_embed", None)
    state = _resized(state, predictor, "predictor_pos_embed")
    problem = misfit(predictor, state)
    other = _differences(_predictor_read(state, content, hf_config), _predictor_settings(predictor))
    if "num_mask_tokens" in other and own_config(content) is None:
        other += ", model.mask_token_index=zero"  # the published code trains the first token alone
    if not problem and not other:
        return Part("predictor", state, f"predictor of {file}")
    reason = f"{problem or _TRACELESS}; {_predictor_words(state)}"
    reason += f"; a recipe that takes it has {other}" if other else ""
    if wanted == "required":
        raise CheckpointError(f"{file}: predictor: {reason}; or set init.predictor=auto to begin with a new one")
    return Part("predictor", None, f"{file}: {reason}", refused=True)


def _predictor_settings(predictor: Predictor) -> dict[str, Any]:
    return {
        "model.pred_embed_dim": predictor.embed_dim,
        "model.pred_depth": len(predictor.predictor_blocks),
        "model.pred_num_heads": predictor.num_heads,
        "model.num_mask_tokens": predictor.num_mask_tokens,
        "model.predict_all": predictor.return_all_tokens,
    }


def _predictor_read(state: State, content: Mapping[str, Any], hf_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings of the predictor of a file, as far as they are known."""
    tokens = [value for key, value in state.items() if re.fullmatch(r"mask_tokens\.\d+", key)]
    width = state["predictor_norm.weight"].shape[0] if "predictor_norm.weight" in state else None
    blocks = {m[1] for key in state if (m := re.match(r"predictor_blocks\.(\d+)\.", key))}
    held = own_config(content)
    if held is not None:
        heads = configs.from_dict(held).model.pred_num_heads
    elif hf_config is not None:
        heads = hf_config.get("pred_num_attention_heads")
    else:
        heads = _PREDICTOR_HEADS.get(width or 0)
    found = {
        "model.pred_embed_dim": width,
        "model.pred_depth": len(blocks),
        "model.pred_num_heads": heads,
        "model.num_mask_tokens": len(tokens),
        "model.predict_all": "predictor_proj_context.weight" in state,
    }
    return {key: value for key, value in found.items() if value is not None}


def _predictor_words(state: State) -> str:
    read = _predictor_read(state, {}, None)
    out = state.get("predictor_proj.weight", torch.empty(0)).shape[0]
    return (
        f"likely width {read.get('model.pred_embed_dim')}, {read['model.pred_depth']} blocks, "
        f"{read['model.num_mask_tokens']} mask tokens, {out} channels out"
    )
