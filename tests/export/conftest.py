from __future__ import annotations

import functools

import pytest
import torch

from vjepa_fast.models import build_encoder

SIZE = dict(img_size=32, patch_size=8, num_frames=4, embed_dim=24, depth=2, num_heads=2)
V2 = dict(levels=1, modality_embedding=False, img_temporal_dim_size=None, rope_variant="v2", interpolate_rope=False)
KINDS = {
    "V-JEPA 2.1": dict(levels=2),
    "V-JEPA 2": V2,
    "V-JEPA": dict(V2, use_rope=False),
    "SwiGLU": dict(levels=2, use_silu=True, mlp_ratio=3.3),
    "oblong": dict(levels=2, img_size=(32, 48), mean=(0.1, 0.2, 0.3)),
    "LeVJEPA": dict(levels=2, cls_token=True, block_causal=True),
}


@functools.cache
def encoder_of(kind):
    """A tiny encoder of a kind, whose attention is not uniform."""
    generator = torch.Generator().manual_seed(0)
    encoder = build_encoder(**{**SIZE, **KINDS[kind]})
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name != "pos_embed":
                parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.5 if "qkv" in name else 0.1))
    return encoder.eval().requires_grad_(False)


@pytest.fixture
def make():
    return encoder_of


@pytest.fixture
def transformers(monkeypatch):
    """The package, as if there were no checkout of this project on the path: it would take our kernels/ for its own."""
    from vjepa_fast.export.formats import hf

    pytest.importorskip("transformers")
    with hf.transformers() as found:
        yield found
