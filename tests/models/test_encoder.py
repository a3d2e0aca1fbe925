from __future__ import annotations

import copy

import pytest
import torch

from vjepa_fast import ops
from vjepa_fast.errors import ConfigError
from vjepa_fast.models import SIZES, build_encoder, build_predictor
from vjepa_fast.models.vit import level_blocks


def ids(n, k, b=2):
    return torch.stack([torch.randperm(n)[:k].sort().values for _ in range(b)])


def test_levels_of_every_depth():
    assert level_blocks(12, 4) == (2, 5, 8, 11)
    assert level_blocks(24, 4) == (5, 11, 17, 23)
    assert level_blocks(40, 4) == (9, 19, 29, 39)
    assert level_blocks(48, 4) == (11, 23, 37, 47)
    assert level_blocks(32, 4) == (7, 15, 23, 31)
    assert level_blocks(6, 4) == (0, 2, 3, 5)
    assert level_blocks(12, 1) == (11,) and level_blocks(5, 5) == (0, 1, 2, 3, 4)
    with pytest.raises(ConfigError, match="model.levels: 4 levels of 3 blocks; accepted: 1 to 3"):
        level_blocks(3, 4)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("vit_tiny", 5.78),
        ("vit_small", 22.18),
        ("vit_base", 86.83),
        ("vit_large", 304.68),
        ("vit_huge", 632.64),
        ("vit_giant", 1013.27),
        ("vit_giant_xformers", 1013.27),
        ("vit_gigantic", 1845.22),
        ("vit_gigantic_xformers", 1845.22),
    ],
)
def test_every_size_runs_on_meta(name, params):
    encoder = build_encoder(name, device="meta")
    predictor = build_predictor(encoder)
    assert all(p.is_meta for p in [*encoder.parameters(), *predictor.parameters()])
    assert abs(sum(p.numel() for p in encoder.parameters()) / 1e6 - params) < 0.01
    idx = torch.empty(2, 50, dtype=torch.int64, device="meta")
    z = encoder(torch.empty(2, 3, 16, 224, 224, device="meta"), [idx, idx[:, :9]])
    width = 4 * SIZES[name].embed_dim
    assert [tuple(t.shape) for t in z] == [(2, 50, width), (2, 9, width)] and encoder.num_features == width
    pred, context = predictor(z[1], idx[:, :9], idx)
    assert pred.shape == (2, 50, width) and context.shape == (2, 9, width)


@pytest.mark.parametrize("variant", ["v2", "v2.1"])
@pytest.mark.parametrize("changes", [{}, {"use_silu": True}, {"use_rope": False}, {"interpolate_rope": False}])
def test_masks_list_equals_single_and_full(small, changes, variant):
    encoder = small(rope_variant=variant, **changes)
    clip = torch.randn(2, 3, 4, 32, 32)
    m0, m1 = ids(32, 20), ids(32, 7)
    both = encoder(clip, [m0, m1])
    assert isinstance(both, list)
    for got, mask in zip(both, (m0, m1)):
        assert torch.allclose(got, encoder(clip, mask), atol=1e-5)
    everything = torch.arange(32).expand(2, -1)
    assert torch.allclose(encoder(clip, everything), encoder(clip), atol=1e-5)
    shuffled = torch.randperm(32)
    assert torch.allclose(encoder(clip, everything[:, shuffled]), encoder(clip)[:, shuffled], atol=1e-5)


def test_masked_tokens_do_not_leak(small):
    encoder, mask = small(), ids(32, 6)
    clip = torch.randn(2, 3, 4, 32, 32)
    keep = torch.zeros(2, 32).scatter_(1, mask, 1.0).view(2, 1, 2, 4, 4)
    keep = keep.repeat_interleave(2, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
    other = torch.where(keep.bool(), clip, torch.randn_like(clip))
    assert torch.equal(encoder(clip, mask), encoder(other, mask))


def test_last_level_is_the_last_quarter(small):
    encoder, clip = small(), torch.randn(1, 3, 4, 32, 32)
    full, last = encoder(clip), encoder(clip, hierarchical=False)
    assert full.shape == (1, 32, 96) and torch.equal(full[..., -24:], last)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_other_numbers_of_levels(small, levels):
    encoder = small(levels=levels)
    predictor = build_predictor(encoder, embed_dim=12, depth=2, num_heads=2)
    clip, enc, pred = torch.randn(1, 3, 4, 32, 32), ids(32, 5, 1), ids(32, 9, 1)
    z = encoder(clip, enc)
    assert z.shape == (1, 5, levels * 24) and len(encoder.norms_block) == levels
    assert [tuple(t.shape) for t in predictor(z, enc, pred)] == [(1, 9, levels * 24), (1, 5, levels * 24)]


@pytest.mark.parametrize(("patch", "side"), [(8, 40), (14, 42), (16, 48)])
def test_patch_sizes(patch, side):
    encoder = build_encoder(img_size=side, patch_size=patch, num_frames=4, embed_dim=12, depth=4, num_heads=2)
    assert encoder.grid((1, 3, 4, side, 2 * side)) == (2, side // patch, 2 * side // patch)
    out = encoder(torch.randn(1, 3, 4, side, 2 * side))
    assert out.shape == (1, 4 * (side // patch) ** 2, 48) and out.isfinite().all()


def test_image_path(small):
    encoder = small()
    image = torch.randn(2, 3, 1, 32, 32)
    out = encoder(image)
    assert out.shape == (2, 16, 96)
    out.sum().backward()
    assert encoder.patch_embed_img.proj.weight.grad.any() and encoder.img_mod_embed.grad.any()
    assert encoder.patch_embed.proj.weight.grad is None and encoder.video_mod_embed.grad is None
    plain = small(img_temporal_dim_size=None, modality_embedding=False)
    assert not any("img" in key or "mod_embed" in key for key in plain.state_dict())
    with pytest.raises(ConfigError, match="frames of a clip: 1 .*img_temporal_dim_size: 1"):
        plain(image)


def test_one_token_and_one_sample(small):
    encoder = small()
    predictor = build_predictor(encoder, embed_dim=12, depth=2, num_heads=2)
    enc, pred = torch.tensor([[3]]), torch.tensor([[0]])
    z = encoder(torch.randn(1, 3, 4, 32, 32), enc)
    z_pred, z_context = predictor(z, enc, pred)
    assert z_pred.shape == z_context.shape == (1, 1, 96) and z_pred.isfinite().all()


def test_one_patch_across(small):
    out = small(img_size=8)(torch.randn(1, 3, 4, 8, 8))
    assert out.shape == (1, 2, 96) and out.isfinite().all()


def test_uint8_clip_equals_its_normalised_form(small):
    encoder, mask = small(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)), ids(32, 11)
    clip = torch.randint(0, 256, (2, 3, 4, 32, 32), dtype=torch.uint8)
    normal = ops.normalize_clip(clip, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert torch.allclose(encoder(clip, mask), encoder(normal, mask), atol=1e-5)


def test_initial_weights():
    torch.manual_seed(0)
    encoder = build_encoder("vit_tiny", use_silu=True)
    state = encoder.state_dict()
    for key, value in state.items():
        if key.endswith("bias"):
            assert not value.any(), key
        elif "norm" in key:
            assert (value == 1).all(), key
        elif "mod_embed" in key:
            assert 0 < value.abs().max() < 1e-5, key
        else:
            std = 0.02
            if key.endswith(("attn.proj.weight", "mlp.fc3.weight")):
                std /= (2 * (int(key.split(".")[1]) + 1)) ** 0.5
            assert abs(value.std().item() / std - 1) < 0.03, key
    predictor = build_predictor(encoder, use_silu=False)
    assert not any(token.any() for token in predictor.mask_tokens)
    for i in (0, 7):
        std = 0.02 / (2 * (i + 1)) ** 0.5
        assert abs(predictor.predictor_blocks[i].mlp.fc2.weight.std().item() / std - 1) < 0.03
    drawn = build_predictor(encoder, zero_init_mask_tokens=False)
    assert abs(drawn.mask_tokens[1].std().item() / 0.02 - 1) < 0.2
    by_inputs = build_predictor(build_encoder("vit_tiny", init="fan_in"), init="fan_in")
    blocks = build_encoder("vit_tiny", init="fan_in").blocks
    for layer in (by_inputs.predictor_embed[0], by_inputs.predictor_blocks[3].attn.qkv, blocks[2].mlp.fc1):
        assert abs(layer.weight.std().item() * (3 * layer.in_features) ** 0.5 - 1) < 0.03


def test_swiglu_widths():
    wide = build_encoder("vit_base", use_silu=True, device="meta").blocks[0].mlp
    assert wide.fc1.weight.shape == wide.fc2.weight.shape == (2048, 768) and wide.fc3.weight.shape == (768, 2048)
    full = build_encoder("vit_base", use_silu=True, wide_silu=False, device="meta").blocks[0].mlp
    assert full.fc1.weight.shape == (3072, 768)


def test_recompute_changes_nothing(small):
    """Same gradients, and the checkpointed run keeps fewer activations."""
    clip, grads, saved = torch.randn(2, 3, 4, 32, 32), [], []
    for recompute in (False, True):
        encoder = small(use_activation_checkpointing=recompute)
        count = 0

        def pack(t):
            nonlocal count
            count += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = encoder(clip).square().mean()
        saved.append(count)
        loss.backward()
        grads.append([p.grad for p in encoder.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert saved[1] < saved[0]


def test_autocast_stays_near_float32(small):
    encoder, clip = small(), torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = encoder(clip)
    with torch.no_grad():
        full = encoder(clip)
    assert (low.float() - full).abs().mean() < 0.02 * full.abs().mean()


def test_copies_are_independent(small):
    encoder, clip = small(), torch.randn(1, 3, 4, 32, 32)
    encoder(clip)
    twin = copy.deepcopy(encoder)
    with torch.no_grad():
        encoder.blocks[0].attn.qkv.weight.zero_()
    assert not torch.equal(encoder(clip), twin(clip))


@pytest.mark.parametrize("variant", ["v2", "v2.1"])
def test_compiles_in_one_graph(small, variant):
    """No graph break, no complex numbers, and one graph for any number of kept tokens."""
    encoder = small(rope_variant=variant, depth=2, levels=2)
    predictor = build_predictor(encoder, embed_dim=12, depth=1, num_heads=2)
    clip, graphs = torch.randn(2, 3, 4, 32, 32), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    try:
        compiled = [torch.compile(m, backend=backend, fullgraph=True, dynamic=True) for m in (encoder, predictor)]
        for k in (9, 11, 14):
            enc, pred = ids(32, k), ids(32, k + 2)
            got, _ = compiled[1](compiled[0](clip, enc), enc, pred)
            assert torch.allclose(got, predictor(encoder(clip, enc), enc, pred)[0], atol=1e-5)
    finally:
        torch._dynamo.reset()
    assert len(graphs) == 2
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert not any("complex" in target or "polar" in target for target in targets)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="vit_bsae"), "model.model_name: unknown 'vit_bsae'; accepted: .*did you mean vit_base"),
        (dict(embed_dim=96), "model.model_name: without a name give embed_dim, depth and num_heads"),
        (dict(name="vit_tiny", img_size=100), "data.crop_size: 100 is not a multiple of data.patch_size 16; use 96"),
        (dict(name="vit_tiny", num_frames=5), "data.dataset_fpcs: 5 is not a multiple of .*tubelet_size 2; use 4"),
        (dict(name="vit_tiny", num_heads=5), "model.embed_dim: 192 is not a multiple of model.num_heads 5; use 190"),
        (dict(name="vit_tiny", num_heads=48), "model.num_heads: 192 channels in 48 heads"),
        (
            dict(name="vit_tiny", use_rope=False, num_heads=5),
            "model.embed_dim: 192 is not a multiple of model.num_heads 5",
        ),
        (dict(name="vit_tiny", rope_variant="v3"), "model.rope_variant: unknown value 'v3'; accepted: v2, v2.1"),
        (dict(name="vit_tiny", n_registers=4), "model.n_registers: .*use 0 / false"),
        (dict(name="vit_tiny", has_cls_first=True), "model.has_cls_first: .*use 0 / false"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build_encoder(**arguments)
    assert "\n" not in str(caught.value)


def test_cls_and_registers_off_are_accepted():
    build_encoder("vit_tiny", n_registers=0, has_cls_first=False, device="meta")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 30, 32), "height of a clip: 30 is not a multiple of data.patch_size 8"),
        ((1, 3, 3, 32, 32), "frames of a clip: 3 is not a multiple of data.tubelet_size 2"),
    ],
)
def test_clips_that_do_not_fit(small, shape, message):
    with pytest.raises(ConfigError, match=message):
        small()(torch.zeros(shape))
