from __future__ import annotations

import pytest
import torch

from vjepa_fast.models import build_encoder


@pytest.fixture
def small():
    """Builds a small encoder: 32 px, patch 8, 4 frames -> grid (2,4,4), width 24, depth 4."""

    def build(**changes):
        torch.manual_seed(0)
        arguments = dict(img_size=32, patch_size=8, num_frames=4, embed_dim=24, depth=4, num_heads=2)
        encoder = build_encoder(**{**arguments, **changes})
        with torch.no_grad():  # biases and gains that matter
            for parameter in encoder.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return encoder

    return build
