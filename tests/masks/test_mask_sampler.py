"""MaskSampler: what the trainer calls."""

from dataclasses import replace

import pytest
import torch

from vjepa_fast.config.schema import MaskConfig, MasksConfig
from vjepa_fast.errors import ConfigError
from vjepa_fast.masks import MaskSampler
from vjepa_fast.ops import motion_saliency, sample_block_masks

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def sampler(cfg=None, compat="intended", **kwargs):
    settings = dict(crop_size=64, patch_size=16, tubelet_size=2, seed=3, mean=MEAN, std=STD, compat=compat)
    return MaskSampler(cfg or MasksConfig(), **{**settings, **kwargs})


def moving_clip(batch=4):
    clip = torch.zeros(batch, 3, 8, 64, 64, dtype=torch.uint8)
    for f in range(8):
        clip[:, :, f, 4 * f : 4 * f + 20, :16] = 255
    return clip


def test_masks_are_those_of_ops():
    clip = moving_clip()
    enc, pred = sampler()(clip, step=7, first_sample=12)
    want_enc, want_pred = sample_block_masks(4, (4, 4, 4), MasksConfig().specs, seed=3, step=7, first_sample=12).trim()
    assert len(enc) == len(pred) == 2
    assert all(torch.equal(a, b) and a.dtype == torch.int64 for a, b in zip(enc + pred, want_enc + want_pred))


def test_untruncated_masks_keep_all_tokens_of_every_sample():
    clip = moving_clip()
    enc, pred = sampler(MasksConfig(truncate="none"))(clip, step=7, first_sample=12)
    drawn = sample_block_masks(4, (4, 4, 4), MasksConfig().specs, seed=3, step=7, first_sample=12, truncate="none")
    assert len(enc) == len(pred) == 2 and any(len(set(m.lengths)) > 1 for m in enc)
    for masks, idx, sizes in ((enc, drawn.enc, drawn.enc_len), (pred, drawn.pred, drawn.pred_len)):
        for s, mask in enumerate(masks):
            assert mask.lengths == tuple(sizes[s].tolist()) and mask.tokens == 64
            want = [idx[s, b, : sizes[s, b]] + 64 * b for b in range(4)]
            assert mask.idx.dtype == torch.int64 and torch.equal(mask.idx, torch.cat(want)[None])
    both = torch.cat([enc[0].idx, pred[0].idx], 1)[0].sort().values
    assert torch.equal(both, torch.arange(4 * 64)), "no token is lost"


def test_groups_draw_independently():
    clip = torch.zeros(4, 3, 8, 128, 128)
    first, second = (sampler(crop_size=128)(clip, step=0, first_sample=0, group=group)[1][0] for group in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("mode", ["trilinear", "area"])
def test_motion_guides_the_masks(mode):
    spec = MaskConfig(num_blocks=1, motion_guided=True, motion_guided_strength=20.0)
    cfg = MasksConfig(specs=(spec,), saliency=mode)
    clip = moving_clip()
    _, (pred,) = sampler(cfg)(clip, step=0, first_sample=0)
    saliency = motion_saliency(clip, (4, 4, 4), MEAN, STD, mode=mode)
    _, (want,) = sample_block_masks(4, (4, 4, 4), cfg.specs, saliency, seed=3, step=0).trim()
    assert torch.equal(pred, want)
    plain = MasksConfig(specs=(replace(spec, motion_guided=False),))
    assert not torch.equal(pred, sampler(plain)(clip, step=0, first_sample=0)[1][0])


def test_published_motion_maps_need_a_batch_that_broadcasts():
    cfg = MasksConfig(specs=(MaskConfig(motion_guided=True),))
    with pytest.raises(ConfigError, match="compat"):
        sampler(cfg, compat="published")(moving_clip(2), step=0, first_sample=0)
    sampler(cfg, compat="published")(moving_clip(4), step=0, first_sample=0)  # B == T
    sampler(cfg)(moving_clip(2), step=0, first_sample=0)


def test_a_group_is_refused_before_its_clips_are_read_and_in_the_same_words():
    guided = sampler(MasksConfig(specs=(MaskConfig(motion_guided=True),)), compat="published")
    many = sampler(MasksConfig(specs=(MaskConfig(),) * 129))
    for strategy, clips, group in ((guided, 2, 0), (many, 4, 1)):
        with pytest.raises(ConfigError) as drawn:
            strategy(moving_clip(clips), step=0, first_sample=0, group=group)
        with pytest.raises(ConfigError) as asked:
            strategy.check_group((4, 4, 4), clips=clips, group=group)
        assert str(asked.value) == str(drawn.value)
    for strategy, clips, group in ((guided, 4, 0), (guided, 1, 9), (guided, None, 0), (many, 2, 0)):
        strategy.check_group((4, 4, 4), clips=clips, group=group)


def test_single_frames_are_one_time_step():
    cfg = MasksConfig(specs=(MaskConfig(motion_guided=True),))
    (enc,), (pred,) = sampler(cfg)(torch.zeros(2, 3, 1, 64, 64), step=0, first_sample=0)
    assert max(enc.max(), pred.max()) < 16


def test_errors_name_the_key():
    with pytest.raises(ConfigError, match="masks.truncate"):
        sampler(MasksConfig(truncate="latest"))
    with pytest.raises(ConfigError, match="masks.saliency"):
        sampler(MasksConfig(saliency="flow"))
    with pytest.raises(ConfigError, match="masks.specs"):
        sampler(MasksConfig(specs=()))
    with pytest.raises(ConfigError, match="masks.specs.0.num_blocks"):
        sampler(MasksConfig(specs=(MaskConfig(num_blocks=0),)))
    with pytest.raises(ConfigError, match="crop_size"):
        sampler(crop_size=60)
    with pytest.raises(ConfigError, match="frames of a clip"):
        sampler()(torch.zeros(1, 3, 7, 64, 64), step=0, first_sample=0)
    with pytest.raises(ConfigError, match=r"masks.specs\[0\]: no context"):
        sampler(MasksConfig(specs=(MaskConfig(spatial_scale=(1.0, 1.0), aspect_ratio=(1.0, 1.0)),)))(
            torch.zeros(1, 3, 8, 64, 64), step=0, first_sample=0
        )
