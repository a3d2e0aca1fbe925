"""What the published trainers ask of a checkpoint to resume from it: entries, names, and the order of the moments.

Names and order are those of FAIR's V-JEPA 2 and 2.1 code (``named_parameters`` of models of one block).
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vjepa_fast.trainer import TrainStep

from .conftest import batch, config

BLOCK = "norm1.weight norm1.bias attn.qkv.weight attn.qkv.bias attn.proj.weight attn.proj.bias norm2.weight norm2.bias "
BLOCK += "mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias"


def pair(*names):
    return [f"{name}.{part}" for name in names for part in ("weight", "bias")]


def blocks(prefix, depth):
    return [f"{prefix}.{i}.{name}" for i in range(depth) for name in BLOCK.split()]


V2 = {
    "encoder": [*pair("patch_embed.proj"), *blocks("blocks", 4), *pair("norm")],
    "predictor": [
        *pair("predictor_embed"), *[f"mask_tokens.{i}" for i in range(2)], *blocks("predictor_blocks", 2),
        *pair("predictor_norm", "predictor_proj"),
    ],
}  # fmt: skip
V21 = {
    "encoder": [
        "img_mod_embed", "video_mod_embed", *pair("patch_embed.proj", "patch_embed_img.proj"), *blocks("blocks", 4),
        *pair(*(f"norms_block.{i}" for i in range(4))),
    ],
    "predictor": [
        "video_mod_embed", "img_mod_embed", *pair("predictor_embed.0", "predictor_embed.2"),
        *[f"mask_tokens.{i}" for i in range(2)], *blocks("predictor_blocks", 2),
        *pair("predictor_norm", "predictor_proj", "predictor_proj_context"),
    ],
}  # fmt: skip
MODEL = dict(levels=1, modality_embedding=False, img_temporal_dim_size=None, rope_variant="v2", interpolate_rope=False)
OLD = {"objectives": {"pred": {}}, "model": {**MODEL, "predict_all": False}}
NEW = {"objectives": {"pred": {}, "context": {"coeff": 0.5, "warmup": [0, 0]}}}


@pytest.mark.parametrize(("sections", "names"), [(OLD, V2), (NEW, V21)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_names_and_order(sections, names, dtype):
    step = TrainStep(config(**sections), dtype=dtype)
    step(batch(), 0)
    state = step.state_dict()
    for part in ("encoder", "target_encoder", "predictor"):
        wanted = names["encoder" if "encoder" in part else part]
        assert list(state[part]) == [f"module.backbone.{name}" for name in wanted], part
    ordered = [[], [], [], []]
    for i, part in enumerate(("encoder", "predictor")):
        for name in names[part]:
            value = state[part][f"module.backbone.{name}"]
            ordered[i + 2 * ("bias" in name or value.ndim == 1)].append(value.shape)
    groups = state["opt"]["param_groups"]
    moments = state["opt"]["state"]
    assert [len(g["params"]) for g in groups] == [len(shapes) for shapes in ordered]
    for group, shapes in zip(groups, ordered):
        for number, shape in zip(group["params"], shapes):
            assert number not in moments or moments[number]["exp_avg"].shape == shape
    torch.amp.GradScaler("cpu").load_state_dict(state["scaler"])  # it refuses None and {}


@pytest.mark.parametrize("sections", [OLD, NEW])
def test_ours_still_reads_both_names(sections):
    step, again = (TrainStep(dataclasses.replace(config(**sections), seed=seed)) for seed in (1, 2))
    state = step.state_dict()
    again.load_state_dict(state)
    assert all(torch.equal(v, again.state_dict()["encoder"][k]) for k, v in state["encoder"].items())
    for part in ("encoder", "target_encoder"):  # as it was saved before
        state[part] = {k.replace("backbone.norm.", "backbone.norms_block.0."): v for k, v in state[part].items()}
    again.load_state_dict(state)
