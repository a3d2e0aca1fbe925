from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ops.parity import DEVICES
from vjepa_fast.models import build_encoder, build_predictor

GOLDENS = Path(__file__).parents[1] / "goldens"


class Golden:
    """Arrays of an .npz as tensors on ``device``; ids as int64."""

    def __init__(self, name: str, device: str):
        self.arrays, self.device = np.load(GOLDENS / name), device

    def __call__(self, key: str) -> torch.Tensor:
        tensor = torch.from_numpy(self.arrays[key]).to(self.device)
        return tensor.long() if tensor.dtype == torch.int32 else tensor

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key[len(prefix) :]: self(key) for key in self.arrays.files if key.startswith(prefix)}


@pytest.fixture(scope="session", params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(scope="session")
def encoder_golden(device):
    return Golden("encoder.npz", device)


@pytest.fixture(scope="session")
def predictor_golden(device):
    return Golden("predictor.npz", device)


@pytest.fixture
def golden_encoder(encoder_golden):
    encoder = build_encoder(img_size=64, num_frames=8, embed_dim=64, depth=12, num_heads=2)
    encoder.load_state_dict(encoder_golden.group("sd/"), strict=True)
    return encoder.to(encoder_golden.device)


@pytest.fixture
def golden_predictor(golden_encoder, predictor_golden):
    predictor = build_predictor(golden_encoder, embed_dim=32, depth=8, num_heads=2, num_mask_tokens=2)
    predictor.load_state_dict(predictor_golden.group("sd/"), strict=True)
    return predictor.to(predictor_golden.device)


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
