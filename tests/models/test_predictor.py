from __future__ import annotations

import pytest
import torch

from vjepa_fast.errors import ConfigError
from vjepa_fast.models import build_predictor
from vjepa_fast.models.predictor import predictor_levels


@pytest.fixture
def make(small):
    def build(encoder_changes=None, **changes):
        encoder = small(**(encoder_changes or {}))
        predictor = build_predictor(encoder, **{**dict(embed_dim=12, depth=2, num_heads=2), **changes})
        with torch.no_grad():
            for parameter in predictor.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return predictor

    return build


def inputs(k=6, m=9):
    torch.manual_seed(1)
    perm = torch.stack([torch.randperm(32) for _ in range(2)])
    return torch.randn(2, k, 96), perm[:, :k], perm[:, k : k + m]


def test_levels_as_published():
    published = {
        4: (0, 1, 2, 3),
        8: (1, 3, 5, 7),
        12: (2, 5, 8, 11),
        20: (4, 9, 14, 19),
        24: (4, 11, 17, 23),
        40: (9, 19, 29, 39),
    }
    assert {depth: predictor_levels(depth) for depth in published} == published


@pytest.mark.parametrize("encoder_changes", [{}, {"use_rope": False}, {"rope_variant": "v2"}])
def test_order_of_tokens_does_not_matter(make, encoder_changes):
    predictor = make(encoder_changes)
    z, enc, pred = inputs()
    a, c = predictor(z, enc, pred)
    pe, pp = torch.randperm(6), torch.randperm(9)
    a2, c2 = predictor(z[:, pe], enc[:, pe], pred[:, pp])
    assert torch.allclose(a2, a[:, pp], atol=1e-5) and torch.allclose(c2, c[:, pe], atol=1e-5)
    moved, _ = predictor(z, enc, pred.roll(1, 1))
    assert not torch.allclose(moved, a, atol=1e-3)  # positions do matter


def test_without_context(make):
    z, enc, pred = inputs()
    full = make()
    a, c = full(z, enc, pred)
    b, none = full(z, enc, pred, context=False)
    assert none is None and torch.equal(a, b) and c is not None
    lean = make(return_all_tokens=False)
    assert "predictor_proj_context.weight" not in lean.state_dict() and lean(z, enc, pred)[1] is None


def test_mask_index_and_modality_change_the_output(make):
    predictor = make(num_mask_tokens=3)
    z, enc, pred = inputs()
    outs = [predictor(z, enc, pred, mask_index=i)[0] for i in range(4)]
    assert torch.equal(outs[0], outs[3]) and not torch.equal(outs[0], outs[1]) and not torch.equal(outs[1], outs[2])
    assert not torch.equal(outs[0], predictor(z, enc, pred, modality="image")[0])
    with pytest.raises(ValueError, match="modality: expected 'video' or 'image', got 'audio'"):
        predictor(z, enc, pred, modality="audio")


def test_normalized_outputs(make):
    z, enc, pred = inputs()
    for out in make(normalize=True)(z, enc, pred):
        levels = out.unflatten(-1, (4, 24))
        assert levels.mean(-1).abs().max() < 1e-5 and (levels.var(-1, unbiased=False) - 1).abs().max() < 1e-2


def test_grid_of_another_clip_size(make):
    """A clip of another size needs its own grid: with it, positions are those of that clip."""
    z, enc, pred = inputs()
    predictor = make({"interpolate_rope": False})
    wide = predictor(z, enc, pred, grid=(2, 4, 8))[0]

    # In a grid twice as wide the same (t,h,w) have other ids.
    def rename(idx):
        return (idx // 16 * 4 + idx // 4 % 4) * 8 + idx % 4

    want = predictor(z, enc, pred)[0]
    assert torch.allclose(predictor(z, rename(enc), rename(pred), grid=(2, 4, 8))[0], want, atol=1e-5)
    assert not torch.allclose(wide, want, atol=1e-3)


def test_one_level_and_another_target_width(make):
    predictor = make(levels=1, out_embed_dim=40)
    assert isinstance(predictor.predictor_embed, torch.nn.Linear)
    _, enc, pred = inputs()
    assert predictor(torch.randn(2, 6, 24), enc, pred)[0].shape == (2, 9, 40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_heads=5), "model.pred_embed_dim: 12 is not a multiple of model.pred_num_heads 5"),
        (dict(num_mask_tokens=0), "model.num_mask_tokens: must be at least 1, got 0"),
        (dict(depth=0), "model.pred_depth: must be at least 1, got 0"),
    ],
)
def test_bad_arguments(make, changes, message):
    with pytest.raises(ConfigError, match=message):
        make(**changes)
