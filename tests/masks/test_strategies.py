"""Every registered mask strategy: whole masks, a function of seed, step and sample, whatever the batch."""

import dataclasses

import pytest
import torch

from vjepa_fast.config.schema import Config, DataConfig, MaskConfig, MasksConfig
from vjepa_fast.errors import ConfigError
from vjepa_fast.masks import STRATEGIES, MaskStrategy
from vjepa_fast.trainer.building import build_samplers

GRID, TOKENS = (4, 4, 4), 64
SETTINGS = dict(crop_size=64, patch_size=16, tubelet_size=2, mean=(0.5,) * 3, std=(0.2,) * 3, compat="intended")


class Tubes(MaskStrategy):
    """Predicts the same random places in all time steps: a strategy from elsewhere."""

    OPTIONS = {"share": 0.5, "spread": 4}

    @classmethod
    def check(cls, cfg, section="masks"):
        super().check(cfg, section)
        if not 0 < cfg.options.get("share", 0.5) < 1:
            raise ConfigError(f"{section}.options.share: must lie between 0 and 1, got {cfg.options['share']}")

    def sample(self, clip, grid, *, step, first_sample, group):
        places = grid[1] * grid[2]
        rows = []
        for b in range(len(clip)):
            generator = self.generator(step=step, sample=first_sample + b, group=group)
            more = int(torch.randint(self.options["spread"], (), generator=generator))
            places_P = torch.randperm(places, generator=generator)[: int(places * self.options["share"]) + more]
            rows.append(torch.zeros(places, dtype=torch.bool).index_fill_(0, places_P, True).repeat(grid[0]))
        predicted_SBN = torch.stack(rows)[None]
        return self.cut(~predicted_SBN, predicted_SBN, step=step, first_sample=first_sample, group=group)


@pytest.fixture(params=[*STRATEGIES, "tubes"])
def build(request):
    """``build(truncate=..., seed=...)``: each registered strategy, and one that a plugin could bring."""
    kind = Tubes if request.param == "tubes" else STRATEGIES[request.param]

    def make(seed=3, **masks):
        return kind(MasksConfig(**masks), **SETTINGS, seed=seed)

    return make


def clips(batch=4):
    return torch.randint(0, 256, (batch, 3, 8, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def samples(masks, truncate):
    """[mask][sample] -> its token indices."""
    if truncate != "none":
        return [list(mask) for mask in masks]
    return [list((mask.idx[0] % mask.tokens).split(mask.lengths)) for mask in masks]


@pytest.mark.parametrize("truncate", ["batch", "random", "none"])
def test_masks_are_sorted_apart_and_on_the_grid(build, truncate):
    sampler = build(truncate=truncate)
    assert sampler.grid((4, 3, 8, 64, 64)) == GRID
    for step in range(3):
        enc, pred = sampler(clips(), step=step, first_sample=12, group=1)
        assert len(enc) == len(pred) >= 1
        for e, p in zip(samples(enc, truncate), samples(pred, truncate)):
            assert len(e) == len(p) == 4
            for context, predicted in zip(e, p):
                assert context.dtype == predicted.dtype == torch.int64 and len(context) and len(predicted)
                assert all((x.diff() > 0).all() and x[0] >= 0 and x[-1] < TOKENS for x in (context, predicted))
                both = torch.cat([context, predicted])
                assert len(both.unique()) == len(both)
                assert truncate != "none" or len(both) == TOKENS, "no token is lost"


def same(a, b):
    return all(torch.equal(x, y) for one, two in zip(a, b) for xs, ys in zip(one, two) for x, y in zip(xs, ys))


@pytest.mark.parametrize("truncate", ["batch", "random", "none"])
def test_masks_are_a_function_of_seed_step_and_sample(build, truncate):
    def draw(seed=3, step=5, first_sample=12, group=0):
        drawn = build(truncate=truncate, seed=seed).draw(clips(), step=step, first_sample=first_sample, group=group)
        return [samples(masks, truncate) for masks in drawn.wait()]

    assert same(draw(), draw())
    for other in (dict(seed=4), dict(step=6), dict(first_sample=99), dict(group=1)):
        assert not same(draw(), draw(**other)), other


def test_masks_do_not_depend_on_how_the_batch_is_split(build):
    sampler = build(truncate="none")
    whole = [samples(m, "none") for m in sampler(clips(), step=2, first_sample=8)]
    parts = [sampler(clips()[i : i + 2], step=2, first_sample=8 + i) for i in (0, 2)]
    halves = [[samples(m, "none") for m in part] for part in parts]
    joined = [[a + b for a, b in zip(*side)] for side in zip(*halves)]
    assert same(whole, joined)


def test_cut_to_the_fewest():
    drawn = {
        t: Tubes(MasksConfig(truncate=t), **SETTINGS, seed=1)(clips(), step=0, first_sample=0)
        for t in ("batch", "random", "none")
    }
    for full, earliest, random in zip(*(drawn[t] for t in ("none", "batch", "random"))):
        all_tokens = samples(full, "none")[0]
        fewest = min(map(len, all_tokens))
        assert len(set(map(len, all_tokens))) > 1 and earliest[0].shape == random[0].shape == (4, fewest)
        assert all(torch.equal(kept, tokens[:fewest]) for kept, tokens in zip(earliest[0], all_tokens))
        assert all(set(kept.tolist()) <= set(tokens.tolist()) for kept, tokens in zip(random[0], all_tokens))
        assert not torch.equal(random[0], earliest[0])


def test_a_strategy_is_used_by_name_with_its_options(monkeypatch):
    monkeypatch.setattr(STRATEGIES, "_entries", dict(STRATEGIES))
    STRATEGIES.add("tubes", Tubes)
    data = DataConfig(crop_size=64)

    def samplers(**masks):
        return build_samplers(Config(data=data, masks=MasksConfig(strategy="tubes", **masks)))

    video, images = samplers(options={"share": 0.25})
    assert isinstance(video, Tubes) and images is video and video.options == {"share": 0.25, "spread": 4}
    for options, message in (
        ({"shares": 0.5}, "masks.options.shares: unknown option.*share, spread; did you mean share"),
        ({"share": "half"}, "masks.options.share: expected a number, got 'half'"),
        ({"spread": True}, "masks.options.spread: expected a value like 4"),
        ({"share": 2}, "masks.options.share: must lie between"),
    ):
        with pytest.raises(ConfigError, match=message):
            samplers(options=options)
    own = Config(data=data, img_data=data, img_masks=MasksConfig(strategy="tube"))
    with pytest.raises(ConfigError, match="img_masks.strategy: unknown mask strategy 'tube'.*did you mean tubes"):
        build_samplers(own)
    with pytest.raises(TypeError, match="derived from"):
        STRATEGIES.add("thing", dict)


def test_motion_guides_every_spec():
    plain = MasksConfig(truncate="none")
    guided = dataclasses.replace(
        plain, specs=tuple(dataclasses.replace(spec, motion_guided=True) for spec in plain.specs)
    )
    made = [
        STRATEGIES[name](cfg, **SETTINGS, seed=3)(clips(), step=0, first_sample=0)
        for name, cfg in (("motion", plain), ("blocks", guided), ("blocks", plain))
    ]
    motion, as_specs, uniform = ([samples(m, "none") for m in masks] for masks in made)
    assert same(motion, as_specs) and not same(motion, uniform)


def test_random_masks_by_their_shares():
    def draw(specs=1, **options):
        cfg = MasksConfig(strategy="random", specs=(MaskConfig(),) * specs, options=options)
        sampler = STRATEGIES["random"](cfg, **SETTINGS, seed=3)
        return [torch.cat(side) for side in sampler(clips(64), step=1, first_sample=0)]

    enc, pred = draw()
    assert enc.shape == (64, 16) and pred.shape == (64, 48), "all others are predicted"
    assert (torch.bincount(enc.flatten(), minlength=TOKENS) > 4).all(), "every token is context for some"
    assert len({tuple(row) for row in enc.tolist()}) == 64
    enc, pred = draw(specs=2, context=0.5, predict=0.25)
    assert enc.shape == (128, 32) and pred.shape == (128, 8) and not torch.equal(enc[:64], enc[64:])


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"options": {"context": 1.0}}, "masks.options.context: must be greater than 0 and at most 0.95, got 1.0"),
        ({"options": {"predict": 0}}, "masks.options.predict: .*got 0"),
        ({"specs": (MaskConfig(num_blocks=2),)}, r"masks.specs: .*no blocks.*specs: \[\{\}\]"),
    ],
)
def test_random_masks_refuse(masks, message):
    with pytest.raises(ConfigError, match=message):
        STRATEGIES["random"](MasksConfig(strategy="random", **masks), **SETTINGS, seed=3)
