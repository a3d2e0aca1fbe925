"""The encoders as models of timm."""

from __future__ import annotations

import pytest
import torch

from vjepa_fast.errors import CheckpointError, ConfigError
from vjepa_fast.export import export_encoder
from vjepa_fast.models import SIZES, build_encoder, load_encoder, to_fair

timm = pytest.importorskip("timm")
from vjepa_fast import timm_models  # noqa: E402

NAME = "vjepa_fast_vit_tiny_patch16_224"
ARCH = dict(img_size=32, num_frames=4)
V2 = dict(levels=1, modality_embedding=False, img_temporal_dim_size=None, rope_variant="v2", interpolate_rope=False)
TIMM_V2 = dict(V2, img_temporal_dim_size=0)
IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
CLIPS = torch.randn(2, 3, 4, 32, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    encoder = build_encoder("vit_tiny", **ARCH).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder.requires_grad_(False)


@pytest.fixture(scope="module")
def file(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "x.pt"
    torch.save({"ema_encoder": to_fair(trained.state_dict())}, path)
    return path


def test_every_size_has_a_name():
    assert [f"vjepa_fast_{size}_patch16_224" for size in SIZES] == timm_models.NAMES
    assert set(timm_models.NAMES) <= set(timm.list_models("vjepa_fast_*"))
    config = timm.data.resolve_model_data_config(timm.create_model(NAME))
    assert config["input_size"] == (3, 224, 224) and config["mean"] == (0.485, 0.456, 0.406)


def test_images_and_clips(file, trained):
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), num_classes=5, **ARCH)
    model.eval()
    with torch.no_grad():
        for x, clip in ((IMAGES, IMAGES[:, :, None]), (CLIPS, CLIPS)):
            tokens = model.forward_features(x)
            assert torch.equal(tokens, trained(clip, hierarchical=False))
            pooled = model.forward_head(tokens, pre_logits=True)
            assert torch.equal(pooled, tokens.mean(1))
            assert model(x).shape == (2, 5) and torch.equal(model(x), model.head(pooled))
    model.reset_classifier(3)
    assert model(IMAGES).shape == (2, 3) and model.get_classifier().out_features == 3
    model.reset_classifier(0, "")
    assert model(IMAGES).shape == (2, 6, 192) and model.num_classes == 0
    with pytest.raises(ConfigError, match="global_pool: 'max'"):
        model.reset_classifier(0, "max")


def test_checkpoint_path_and_state_dict(file, trained, tmp_path):
    model = timm.create_model(NAME, checkpoint_path=str(file), num_classes=5, **ARCH)
    assert torch.equal(model.forward_features(CLIPS), trained(CLIPS, hierarchical=False))
    torch.save(model.state_dict(), tmp_path / "own.pt")
    again = timm.create_model(NAME, checkpoint_path=str(tmp_path / "own.pt"), num_classes=5, **ARCH).eval()
    assert torch.equal(again(CLIPS), model.eval()(CLIPS))
    with pytest.raises(CheckpointError, match="not expected norms_block"):
        timm.create_model(NAME, checkpoint_path=str(file), levels=2, **ARCH)


def test_features_only(file, trained):
    overlay = dict(file=str(file))
    model = timm.create_model(
        NAME, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True, out_indices=(2, -7), **ARCH
    )
    assert model.feature_info.channels() == [192, 192] and model.feature_info.reduction() == [16, 16]
    assert len(model.model.encoder.blocks) == 6  # those after the last index are gone
    with torch.no_grad():
        maps = model(IMAGES)
        assert [tuple(x.shape) for x in maps] == [(2, 192, 2, 3)] * 2
        assert [tuple(x.shape) for x in model(CLIPS)] == [(2, 192, 2, 2, 3)] * 2
        level = trained.norms_block[0](maps[0].flatten(2).transpose(1, 2))  # block 2 is the first level
        assert (level - trained(IMAGES[:, :, None])[..., :192]).abs().max() < 1e-5
    with pytest.raises(ConfigError, match="there is no block 12; there are 12"):
        timm.create_model(NAME, features_only=True, out_indices=(12,), **ARCH)


def test_intermediates(trained):
    model = timm.create_model(NAME, **ARCH)
    model.encoder.load_state_dict(trained.state_dict())
    with torch.no_grad():
        last, outs = model.forward_intermediates(CLIPS, indices=3, norm=True, output_fmt="NLC")
        assert len(outs) == 3 and torch.equal(last, outs[-1])
        assert torch.equal(last, model.forward_features(CLIPS))
        assert len(model.forward_intermediates(CLIPS, intermediates_only=True)) == 12


def test_v_jepa_2_embeds_images_as_standing_clips(tmp_path):
    torch.manual_seed(0)
    encoder = build_encoder("vit_tiny", **ARCH, **V2).eval()
    export_encoder(encoder, "safetensors", tmp_path / "x.safetensors")
    overlay = dict(file=str(tmp_path / "x.safetensors"))
    wanted = encoder(IMAGES[:, :, None].expand(-1, -1, 2, -1, -1), hierarchical=False)
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **ARCH, **TIMM_V2)
    assert torch.equal(model.forward_features(IMAGES), wanted)
    words = (
        "give levels=1, interpolate_rope=False, rope_variant='v2', modality_embedding=False, img_temporal_dim_size=0"
    )
    with pytest.raises(CheckpointError, match=words):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **ARCH)
    assert load_encoder(tmp_path / "x.safetensors").rope_variant == "v2"


def test_trained_by_timm():
    from timm.optim import param_groups_layer_decay

    model = timm.create_model(NAME, num_classes=2, drop_rate=0.1, **ARCH)
    model.set_grad_checkpointing()
    model(CLIPS).sum().backward()
    assert model.encoder.blocks[0].attn.qkv.weight.grad is not None
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    assert len({group["lr_scale"] for group in groups}) == 14
    assert "encoder.video_mod_embed" in model.no_weight_decay()
    with pytest.raises(ConfigError, match="in_chans: the encoder takes 3 channels, got 4"):
        timm.create_model(NAME, in_chans=4)
