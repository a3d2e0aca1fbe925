"""Attention rollout: the weights are those that the encoder attends by, and the flow is that of the paper."""

import pytest
import torch

from vjepa_fast.layers.attention import FrameCausal
from vjepa_fast.models import attention_rollout, build_encoder, rollout

SIZE = {
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 2,
    "img_size": 32,
    "patch_size": 8,
    "num_frames": 4,
    "tubelet_size": 2,
    "levels": 2,
}
KINDS = {
    "rope": {},
    "rope v2": {"rope_variant": "v2", "interpolate_rope": False, "levels": 1, "modality_embedding": False},
    "sincos": {"use_rope": False},
    "class token": {"cls_token": True},
    "causal": {"block_causal": True},
    "causal class token": {"block_causal": True, "cls_token": True},
}


def encoder_of(kind, **more):
    torch.manual_seed(0)
    encoder = build_encoder(**{**SIZE, **KINDS[kind], **more}).eval()
    with torch.no_grad():
        for block in encoder.blocks:
            block.attn.qkv.weight.mul_(20)  # weights that are far from uniform
    return encoder


def clip_of(frames=4, batch=2):
    return torch.randint(
        0, 256, (batch, 3, frames, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def matrices(encoder, clip):
    """The weights of each block, mean over heads, [B,K,K]; asserts that attention with them is the block's own."""
    found = []

    def compare(block, args):
        x, rope, lengths = (*args, None)[:3]
        weights = rollout.attention_weights(rollout.rotated(block, x, rope), lengths)
        normed = block.norm1(x)
        v = block.attn.qkv(normed).unflatten(2, (3, block.attn.num_heads, -1))[:, :, 2].transpose(1, 2)
        ours = block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        assert torch.allclose(ours, block.attn(normed, rope, lengths), atol=1e-5)
        found.append(weights.mean(1))

    hooks = [block.register_forward_pre_hook(compare) for block in encoder.blocks]
    with torch.no_grad():
        encoder(clip)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_product_of_the_blocks(kind, monkeypatch):
    monkeypatch.setattr(rollout, "_ROWS", 5)
    encoder, clip = encoder_of(kind), clip_of()
    whole = torch.eye(matrices(encoder, clip)[0].shape[1])
    for weights in matrices(encoder, clip):
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5) and weights.max() > 3 / weights.shape[1]
        whole = (weights + torch.eye(weights.shape[1])) / 2 @ whole
    wanted = whole.mean(1) if encoder.cls_token is None else whole[:, 0, 1:] / whole[:, 0, 1:].sum(1, keepdim=True)
    found = attention_rollout(encoder, clip)
    assert found.shape == (2, 2, 4, 4) and torch.allclose(found.flatten(1), wanted, atol=1e-6)
    assert torch.allclose(found.sum((1, 2, 3)), torch.ones(2))


def test_frames_that_no_one_sees_get_less():
    found = attention_rollout(encoder_of("causal"), clip_of(frames=8)).sum((2, 3))
    assert (found[:, 0] > found[:, -1]).all()  # all see the first, the last sees itself


def test_one_token_that_all_look_at():
    """Keys and queries are made so that all weight goes to the one bright patch."""
    encoder = encoder_of("sincos", depth=2, levels=1)
    del encoder.blocks[1:]
    encoder.level_blocks = (0,)
    block, sign = encoder.blocks[0], torch.tensor([1.0, -1.0]).repeat(24)
    with torch.no_grad():
        for p in (encoder.pos_embed, encoder.patch_embed.proj.bias, block.attn.qkv.weight, block.attn.qkv.bias):
            p.zero_()
        block.attn.qkv.bias[:48] = 30 * sign  # every query alike
        block.attn.qkv.weight[48:96] = torch.eye(48)  # keys are the tokens: +1 and -1, or 0
        encoder.patch_embed.proj.weight.copy_(sign[:, None, None, None, None].expand(48, 3, 2, 8, 8))
        encoder.video_mod_embed.zero_()
    clip = torch.zeros(1, 3, 4, 32, 32)
    clip[..., 2:4, 8:16, 24:32] = 1.0
    found = attention_rollout(encoder, clip)[0]
    assert found[1, 1, 3] == pytest.approx(0.5 + 0.5 / 32, abs=1e-4)  # all of A, its own of I
    assert found[0, 0, 0] == pytest.approx(0.5 / 32, abs=1e-4)


def test_the_encoder_is_left_as_it_was_and_fused_blocks_are_refused(monkeypatch):
    encoder, clip = encoder_of("rope"), clip_of()
    before = encoder(clip)
    attention_rollout(encoder, clip)
    assert torch.equal(encoder(clip), before) and not any(b._forward_pre_hooks for b in encoder.blocks)
    monkeypatch.setattr(type(encoder), "_levels", lambda self, x, *rest: [x])
    with pytest.raises(RuntimeError, match="blocks were fused; call it in float32"):
        attention_rollout(encoder, clip)


def test_causal_weights_stop_at_the_frame():
    qk = torch.randn(2, 1, 1, 4, 8)
    weights = rollout.attention_weights(qk, FrameCausal(torch.tensor([0, 0, 1, 1])))[0, 0]
    assert (weights[:2, 2:] == 0).all() and (weights[2:] > 0).all()
