"""The encoder of LeVJEPA: class token, block-causal attention, dropped tokens; and its projector."""

import pytest
import torch

from vjepa_fast.models.levjepa import Projector, draw_kept, kept_tokens

TOKENS = 64  # 4 time steps of 16
LATER = slice(48, None)  # the last time step


@pytest.fixture
def encoder(small):
    """Of 4 time steps."""

    def build(**changes):
        own = dict(tubelet_size=1, levels=1, modality_embedding=False, img_temporal_dim_size=None, cls_token=True)
        return small(**{**own, "block_causal": True, **changes})

    return build


def clips(seed=0, batch=2):
    return torch.randint(
        0, 256, (batch, 3, 4, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def kept(count=20, batch=2, seed=0):
    return draw_kept(batch, TOKENS, 1 - count / TOKENS, torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_a_later_frame_changes_no_earlier_token(encoder):
    clip, full = clips(), encoder(block_causal=False)
    changed = clip.clone()
    changed[:, :, 3] = clips(1)[:, :, 3]
    causal = encoder()
    before, after = causal(clip), causal(changed)
    assert torch.equal(before[:, :48], after[:, :48]) and not torch.isclose(before[:, LATER], after[:, LATER]).all()
    assert (causal.summary(clip, None) - causal.summary(changed, None)).abs().max() > 1e-3  # the class token sees all
    assert (full(clip)[:, :48] - full(changed)[:, :48]).abs().max() > 1e-3
    first = clip.clone()
    first[:, :, 0] = clips(1)[:, :, 0]
    assert ((causal(first) - before).abs().amax((0, 2)) > 1e-5).all()  # but an earlier one all later


@torch.no_grad()
def test_within_a_frame_attention_is_bidirectional(encoder):
    """A change of the last patch of the first frame reaches its first token."""
    clip, causal = clips(), encoder()
    changed = clip.clone()
    changed[:, :, 0, 24:, 24:] = 255 - clip[:, :, 0, 24:, 24:]
    assert (causal(clip)[:, 0] - causal(changed)[:, 0]).abs().max() > 1e-5


@torch.no_grad()
def test_kept_tokens_have_the_positions_and_the_frames_they_had(encoder):
    """All tokens of the first two frames, alone, are what they are in the whole clip; in any order."""
    clip, causal = clips(), encoder()
    whole, idx = (
        causal(clip),
        torch.stack([torch.randperm(32, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]),
    )
    torch.testing.assert_close(
        causal(clip, idx), whole.gather(1, idx[..., None].expand(-1, -1, 24)), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("block_causal", [False, True])
def test_the_class_token_sees_the_kept_tokens_alone(encoder, block_causal):
    model, clip, idx = encoder(block_causal=block_causal), clips(), kept()
    found = model.summary(clip, idx)
    assert found.shape == (2, 24)
    left_out = torch.ones(2, TOKENS, dtype=torch.bool).scatter_(1, idx, False)  # [B, T*H*W]
    pixels = left_out.view(2, 1, 4, 4, 4).repeat_interleave(8, 3).repeat_interleave(8, 4)
    other = torch.where(pixels, clips(3), clip)
    torch.testing.assert_close(model.summary(other, idx), found, rtol=1e-5, atol=1e-6)
    assert (model.summary(clips(3), idx) - found).abs().max() > 1e-3
    assert (model.summary(clip, None) - found).abs().max() > 1e-3


@torch.no_grad()
def test_no_patch_token_reads_the_class_token_of_a_causal_encoder(encoder):
    clip, found = clips(), {}
    for block_causal in (True, False):
        model = encoder(block_causal=block_causal)
        before = model(clip)
        model.cls_token.add_(torch.randn_like(model.cls_token))
        found[block_causal] = float((model(clip) - before).abs().max())
    assert found[True] == 0 and found[False] > 1e-3


def test_the_class_token_has_no_position_and_learns(encoder):
    """A plain computation of one block: q and k of the patches rotated, those of the class token not."""
    from vjepa_fast.models import rope

    model, clip = encoder(depth=1, block_causal=False), clips()
    patches = model.patch_embed(clip, None, model.mean, model.std)
    x = torch.cat([model.cls_token.expand(2, -1, -1), patches], 1)
    block = model.blocks[0]
    qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv
    table = rope.rows(patches, model.grid(clip.shape), None, 12, model.rope_variant, model.rope_base)
    cos, sin = table.unbind(-2)

    def rotated(t):
        pairs = t[:, :, 1:].unflatten(-1, (-1, 2))
        across = torch.stack((-pairs[..., 1], pairs[..., 0]), -1).flatten(-2)
        return torch.cat([t[:, :, :1], t[:, :, 1:] * cos + across * sin], 2)

    q, k = rotated(q), rotated(k)
    x = x + block.attn.proj(((q @ k.mT / 12**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))
    want = model.norms_block[0](x + block.mlp(block.norm2(x)))
    torch.testing.assert_close(model.summary(clip, None), want[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(clip), want[:, 1:], rtol=1e-4, atol=1e-5)
    model.summary(clip, kept()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_recomputed_activations_give_the_same_gradients(encoder):
    grads = []
    for recompute in (False, True):
        model = encoder(use_activation_checkpointing=recompute)
        model.summary(clips(), kept()).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_what_such_an_encoder_does_not_support(encoder, small):
    with pytest.raises(ValueError, match="built without cls_token"):
        small().summary(clips(), None)
    for model in (encoder(), encoder(cls_token=False), encoder(block_causal=False)):
        with pytest.raises(ValueError, match=r"one mask \[B,K\], not a list"):
            model(clips(), [kept(), kept()])


def test_kept_tokens_are_uniform_distinct_and_as_many_as_asked():
    assert kept_tokens(3136, 0.95) == 157 and kept_tokens(8, 0.95) == 1  # as published; at least one
    idx = draw_kept(4000, TOKENS, 0.75, torch.Generator().manual_seed(0))
    assert idx.shape == (4000, 16) and idx.dtype == torch.int64 and (idx.diff(dim=1) > 0).all()
    share = torch.bincount(idx.flatten(), minlength=TOKENS) / 4000
    assert (share - 0.25).abs().max() < 0.03
    assert torch.equal(idx, draw_kept(4000, TOKENS, 0.75, torch.Generator().manual_seed(0)))
    assert draw_kept(3, TOKENS, 0.0, torch.Generator()) is None


def test_projector_normalises_by_the_batch_in_training_and_evaluation():
    torch.manual_seed(0)
    model, x = Projector(6, 10, 4).double(), torch.randn(7, 6, dtype=torch.float64)
    hidden = model.fc1(x)
    z = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt() * model.norm.weight + model.norm.bias
    want = model.fc2(z * 0.5 * (1 + torch.erf(z / 2**0.5)))
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(model.eval()(x), want)
    assert not dict(model.named_buffers()) and model.products == 6 * 10 + 10 * 4
