"""The count of FLOP against torch's own counter, and against the published step."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vjepa_fast import config as configs
from vjepa_fast import models
from vjepa_fast.layers.packed import Packed
from vjepa_fast.metrics import flops
from vjepa_fast.reference import build_reference
from vjepa_fast.trainer.step import TrainStep

from ..trainer.conftest import batch, config

G = 1e9


def base_dims(*overrides):
    cfg = configs.load("mixed_4gpu_baseline", list(overrides))
    return flops.Dims.of(*models.build_from_config(cfg, device="meta"))


def test_published_step():
    """ViT-B/16, 16 x 224 x 224, mean lengths of the published masks: about 880 GFLOP per clip."""
    masks = [(419, 814), (148, 1129)]
    cost = flops.step_cost(base_dims(), [flops.Clips(1, 1568, masks)], embed_all=True)
    want = {"target": 361, "context": 111, "predictor": 64, "backward": 344}
    for part, value in want.items():
        assert cost[part].flops / G == pytest.approx(value, rel=5e-3), part
    assert sum(c.flops for c in cost.values()) / G == pytest.approx(880, rel=3e-3)
    ours = flops.step_cost(base_dims(), [flops.Clips(1, 1568, masks)])
    saved = (2 * 1568 - 419 - 148) * 2 * 1179648 / G  # the patch embedding of tokens that no mask keeps
    assert (cost["context"].flops - ours["context"].flops) / G == pytest.approx(saved)


def counted(run) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"use_silu": True, "pred_use_silu": True},
        {"levels": 1},
        {"predict_all": False},
        {"modality_embedding": False},
    ],
)
def test_agrees_with_the_counter_of_torch(overrides):
    """On the reference, whose products are plain: forward and backward, two masks."""
    model = dict(embed_dim=48, depth=4, num_heads=2, levels=4, pred_embed_dim=24, pred_depth=2, pred_num_heads=2)
    model.update(overrides)
    cfg = config(model=model)
    if not cfg.model.predict_all:
        cfg = config(model=model, objectives={"pred": {}})
    step = TrainStep(cfg)
    ref = build_reference(crop_size=32, patch_size=8, num_frames=4, objectives=cfg.objectives, **model)
    data = batch()
    clip = data.groups[0].clip
    enc, pred = step.sampler(clip, step=0, first_sample=0, group=0)
    lengths = [(e.shape[1], p.shape[1]) for e, p in zip(enc, pred)]
    context = cfg.model.predict_all

    def target():
        with torch.no_grad():
            ref.target_encoder(ref.normalize(clip))

    def trained():
        z, z_pred, z_context = ref.forward_context([ref.normalize(clip)], [enc], [pred])
        sum(x.sum() for x in (*z_pred[0], *(z_context[0] if context else ()))).backward()

    clips = [flops.Clips(3, 32, lengths)]
    cost = flops.step_cost(step.dims, clips, predict_context=context, embed_all=True)
    assert counted(target) == pytest.approx(cost["target"].flops, rel=0.02)
    want = sum(cost[p].flops for p in ("context", "predictor", "backward"))
    assert counted(trained) == pytest.approx(want, rel=0.02)


def test_our_models_do_no_more_than_is_counted():
    """On the meta device, where our products are PyTorch's own: only kept tokens are embedded."""
    cfg = config()
    encoder, predictor = models.build_from_config(cfg, device="meta")
    clip = torch.empty(3, 3, 4, 32, 32, dtype=torch.uint8, device="meta")
    ids = [
        (torch.empty(3, e, dtype=torch.int64, device="meta"), torch.empty(3, p, dtype=torch.int64, device="meta"))
        for e, p in ((20, 12), (9, 23))
    ]
    enc, pred = map(list, zip(*ids))

    def run():
        z_pred, z_context = predictor(encoder(clip, enc), enc, pred, [0, 1])
        sum(x.sum() for x in (*z_pred, *z_context)).backward()

    cost = flops.step_cost(flops.Dims.of(encoder, predictor), [flops.Clips(3, 32, [(20, 12), (9, 23)])])
    assert counted(run) == pytest.approx(sum(cost[p].flops for p in ("context", "predictor", "backward")), rel=0.02)


def test_samples_of_different_lengths_are_counted_one_by_one():
    cfg = config()
    encoder, predictor = models.build_from_config(cfg, device="meta")
    clip = torch.empty(2, 3, 4, 32, 32, dtype=torch.uint8, device="meta")

    def mask(*lengths):
        idx = torch.empty(1, sum(lengths), dtype=torch.int64, device="meta")
        return Packed(idx, torch.empty(2, dtype=torch.int64, device="meta"), lengths, 32)

    enc, pred = [mask(20, 5), mask(9, 1)], [mask(12, 27), mask(3, 31)]

    def run():
        z_pred, z_context = predictor(encoder(clip, enc), enc, pred, [0, 1])
        sum(x.sum() for x in (*z_pred, *z_context)).backward()

    clips = flops.clips_of((2, 4, 4), enc, pred)
    assert [(c.count, c.tokens, tuple(c.masks)) for c in clips] == [
        (1, 32, ((20, 12), (9, 3))),
        (1, 32, ((5, 27), (1, 31))),
    ]
    cost = flops.step_cost(flops.Dims.of(encoder, predictor), clips)
    assert counted(run) == pytest.approx(sum(cost[p].flops for p in ("context", "predictor", "backward")), rel=0.02)


@pytest.mark.parametrize("target", [{}, {"mode": "online", "stop_gradient": False}])
def test_a_step_reports_its_work(target):
    step = TrainStep(config(target=target))
    data = batch(frames=(4, 2))
    out = step(data, 0)
    clips = []
    for n, group in enumerate(data.groups):
        enc, pred = step.sampler(group.clip, step=0, first_sample=group.first_sample, group=n)
        clips.append(flops.Clips(3, 16 * group.fpc // 2, [(e.shape[1], p.shape[1]) for e, p in zip(enc, pred)]))
    cost = flops.step_cost(step.dims, clips, target_grad=bool(target))
    assert out.work.flops == sum(c.flops for c in cost.values())
    assert out.work.tokens == sum(3 * (c.tokens + sum(2 * e + p for e, p in c.masks)) for c in clips)
    assert (cost["ema"].bytes == 0) == bool(target)


def test_a_packed_step_reports_the_tokens_of_every_sample():
    step = TrainStep(config(masks={"truncate": "none"}))
    data = batch()
    enc, pred = step.sampler(data.groups[0].clip, step=0, first_sample=0, group=0)
    assert len(set(enc[0].lengths)) > 1  # or the draw shows nothing
    want = sum(32 + sum(2 * e.lengths[b] + p.lengths[b] for e, p in zip(enc, pred)) for b in range(3))
    assert step(data, 0).work.tokens == want


def test_samples_of_different_lengths():
    class Mask:
        def __init__(self, *lengths):
            self.lengths = lengths

    found = flops.clips_of((2, 4, 4), [Mask(5, 9), Mask(3, 4)], [Mask(20, 16), Mask(22, 21)])
    assert found == [flops.Clips(1, 32, [(5, 20), (3, 22)]), flops.Clips(1, 32, [(9, 16), (4, 21)])]
    equal = flops.clips_of((2, 4, 4), [torch.zeros(2, 5)], [torch.zeros(2, 20)])
    each = flops.clips_of((2, 4, 4), [Mask(5, 5)], [Mask(20, 20)])
    assert equal == [flops.Clips(2, 32, [(5, 20)])]
    dims = base_dims()
    for part, cost in flops.step_cost(dims, equal).items():
        assert flops.step_cost(dims, each)[part].flops == cost.flops, part


def test_bytes_of_the_optimiser_and_of_longer_masks():
    dims = base_dims()
    few = flops.step_cost(dims, [flops.Clips(1, 1568, [(100, 800)])])
    many = flops.step_cost(dims, [flops.Clips(1, 1568, [(400, 800)])])
    assert few["optimiser"].bytes == 28 * dims.trained and few["ema"].bytes == 8 * dims.averaged
    assert many["context"].bytes > few["context"].bytes and many["target"].bytes == few["target"].bytes
    twice = flops.step_cost(dims, [flops.Clips(2, 1568, [(100, 800)])])
    weights = 2 * (dims.encoder.depth * dims.encoder.matrices + dims.patch)
    assert twice["target"].bytes - weights == 2 * (few["target"].bytes - weights)
