"""The same global batch on 1, 2 and 4 processes: the same masks, losses and weights, over 20 steps."""

import dataclasses
import json

import pytest
import torch
from PIL import Image

from vjepa_fast.data.loader import ClipLoader
from vjepa_fast.errors import ConfigError
from vjepa_fast.trainer import passes, streams

from .ranks import launch_all, small

STEPS = 20
# In float64, so that what is left is no rounding: the order of a sum differs, and AdamW's quotient of tiny gradients
# makes whole steps of that in float32.
RUN = """
import sys
import torch
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
from vjepa_fast import config
from vjepa_fast.trainer.trainer import Trainer
trainer = Trainer(config.load(sys.argv[1]))
step, drawn = trainer.step, []
assert all(p.dtype == torch.get_default_dtype() for p in step.params)
for sampler in {step.sampler, step.img_sampler}:
    def draw(clip, inner=sampler.draw, **keys):
        found = inner(clip, **keys)
        enc, pred = found.wait()
        for b in range(len(clip)):
            key = keys["step"], keys["group"], keys["first_sample"] + b
            drawn.append((key, [m[b].tolist() if getattr(m, "ndim", 0) == 2 and len(m) == len(clip) else None
                                  for m in (*enc, *pred)]))
        return found
    sampler.draw = draw
rows = []
trainer.run(on_log=rows.append)
torch.save({"drawn": drawn, "weights": [p.detach() for p in step.params],
            "target": [p.detach() for p in step.target_encoder.parameters()]}, sys.argv[2])
trainer.close()
"""


@pytest.fixture
def cfg(tmp_path):
    return small(
        tmp_path,
        clips=24,
        optimization={"epochs": 2, "ipe": STEPS // 2, "global_batch": 8},
        objectives={"pred": {}, "context": {"warmup": [0, 0]}, "sigreg": {"num_slices": 16}, "ld": {"hidden_dim": 8}},
    )


def images(tmp_path):
    """A manifest of single pictures."""
    lines = []
    for n in range(12):
        Image.new("RGB", (40, 36), (20 * n, 255 - 20 * n, 90)).save(path := tmp_path / f"i{n}.png")
        lines.append(f"{path} 0")
    (tmp_path / "images.csv").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "images.csv")


def outcomes(cfg, tmp_path, worlds=(1, 2, 4), script=RUN):
    """Of runs on so many processes (rows, masks drawn, what each process has left)."""
    runs = [(cfg, f"of{world}", world) for world in worlds]
    for (_, name, world), (_, codes, errors, outs) in zip(runs, launch_all(runs, tmp_path, script)):
        assert codes == [0] * world, errors
        found = [torch.load(path) for path in outs]
        drawn = dict(x for f in found for x in f["drawn"])  # the banner draws some of the first step as well
        text = (tmp_path / name / "metrics.jsonl").read_text()
        yield [json.loads(line) for line in text.splitlines()], drawn, found


VARIANTS = {
    "batch": {},
    "none": {"masks": {"truncate": "none"}},
    "images": {"images": {"rank_ratio": 0.3, "batch_size": 3}},  # 1 of 4 batches, as int(4 x 0.3)
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_two_and_four_processes_are_the_same_run(variant, cfg, tmp_path):
    changes = dict(VARIANTS[variant])
    if (stream := changes.pop("images", None)) is not None:
        data = dataclasses.replace(cfg.data, datasets=(images(tmp_path),), dataset_fpcs=(1,), **stream)
        cfg = dataclasses.replace(cfg, img_data=data)
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, img_temporal_dim_size=1))
    for name, values in changes.items():
        cfg = dataclasses.replace(cfg, **{name: dataclasses.replace(getattr(cfg, name), **values)})
    (rows, drawn, (alone,)), *others = outcomes(cfg, tmp_path)
    assert len(rows) == STEPS and len(drawn) == STEPS * (9 if stream else 8)
    for found, masks, ranks in others:
        assert masks == drawn
        for a, b in zip(rows, found, strict=True):
            for key in ("loss", "terms", "weights", "grad_norm"):
                torch.testing.assert_close(b[key], a[key], rtol=1e-6, atol=0)
            assert a["step_flops"] == b["step_flops"]
        for rank in ranks:
            for what in ("weights", "target"):
                for p, q in zip(rank[what], alone[what], strict=True):
                    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


def test_float32_losses_agree(cfg, tmp_path):
    """As it is trained: with one process fewer roundings are the same, so losses part a little."""
    a, b = (rows for rows, *_ in outcomes(cfg, tmp_path, (1, 4), RUN.replace("(torch.float64)", "(torch.float32)")))
    print(max(abs(x["loss"] - y["loss"]) / x["loss"] for x, y in zip(a, b)))
    torch.testing.assert_close([r["loss"] for r in b], [r["loss"] for r in a], rtol=1e-5, atol=0)


def of(cfg, **sections):
    for name, values in sections.items():
        cfg = dataclasses.replace(cfg, **{name: dataclasses.replace(getattr(cfg, name), **values)})
    return cfg


def test_a_step_reads_the_same_samples_for_every_split_of_its_batches(cfg):
    found = set()
    for world, times in ((1, 4), (2, 2), (4, 1)):
        split, paths = of(cfg, optimization={"accumulate": times}), []
        for step in range(3):
            for rank in range(world):
                (share,) = streams.shares(split, rank, world)
                with ClipLoader(split, share=share, start_step=step * times) as loader:
                    paths += [p for _ in range(times) for g in next(loader).groups for p in g.paths]
                assert loader.sample_at(3) == 24
        found.add(tuple(sorted(paths)))
    assert len(found) == 1 and len(found.pop()) == 24


def test_images_are_the_published_share_of_the_batches(cfg):
    cfg = dataclasses.replace(cfg, img_data=dataclasses.replace(cfg.data, rank_ratio=0.3))
    for world, times in ((8, 1), (4, 2), (1, 8), (2, 4)):
        split = of(cfg, optimization={"accumulate": times})
        each = [streams.shares(split, rank, world) for rank in range(world)]
        videos, images = zip(*each)
        assert sorted(n for share in images for n in share.own) == [0, 1]  # int(8 x 0.3)
        assert sorted(n for share in videos for n in share.own) == list(range(6))
        assert {share.of for share in images} == {2} and {share.of for share in videos} == {6}
        assert {len(v.own) + len(i.own) for v, i in each} == {times}
    with pytest.raises(ConfigError, match="img_data.rank_ratio: 0.3 of 2 batches .* set optimization.accumulate=2 or"):
        streams.shares(of(cfg, optimization={"accumulate": 1}), 0, 2)


def test_micro_batches_follow_from_the_global_batch(cfg, monkeypatch):
    for world, times in ((1, 4), (2, 2), (4, 1)):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        assert passes.resolve(cfg).optimization.accumulate == times
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="optimization.global_batch: 8 clips are no multiple of the 6 that are read"):
        passes.resolve(cfg)
