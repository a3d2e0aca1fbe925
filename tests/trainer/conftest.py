"""A tiny run: 48 channels, 4 blocks, 32 px, 4 frames. Batches here are made in memory, in the loader's own types."""

import dataclasses

import pytest
import torch

from vjepa_fast.config import schema
from vjepa_fast.data import Batch, ClipGroup
from vjepa_fast.data.synthetic import render_suite


def config(folder="unused", **sections) -> schema.Config:
    """The tiny configuration; ``sections`` replace single values: ``config(target={"mode": "online"}, seed=3)``."""
    spec = schema.MaskConfig
    cfg = schema.Config(
        data=schema.DataConfig(dataset_fpcs=(4,), batch_size=3, crop_size=32, patch_size=8),
        masks=schema.MasksConfig(specs=(spec(num_blocks=2, spatial_scale=(0.3, 0.3)), spec(1, (0.5, 0.5)))),
        model=schema.ModelConfig(embed_dim=48, depth=4, num_heads=2, pred_embed_dim=24, pred_depth=2, pred_num_heads=2),
        objectives={
            "pred": {},
            "context": {"coeff": 0.5, "warmup": [0, 0], "weight_distance": True},
            "ld": {"hidden_dim": 8},
        },
        optimization=schema.OptimizationConfig(epochs=3, ipe=4, lr=1e-3, warmup=0.5),
        target=schema.TargetConfig(ema=(0.9, 1.0)),
        runtime=schema.RuntimeConfig(
            device="cpu", dtype="float32", log_every=1, save_every=1000, monitor_every=1000, tensorboard=False
        ),
        folder=str(folder),
    )
    for name, values in sections.items():
        old = getattr(cfg, name)
        new = dataclasses.replace(old, **values) if dataclasses.is_dataclass(old) else values
        cfg = dataclasses.replace(cfg, **{name: new})
    return cfg


def batch(step=0, size=3, frames=(4,), side=32, seed=0, modality="video", first=0):
    groups = []
    for n, f in enumerate(frames):
        gen = torch.Generator().manual_seed(1000 * seed + 10 * step + n)
        clip = torch.randint(0, 256, (size, 3, f, side, side), dtype=torch.uint8, generator=gen)
        groups.append(
            ClipGroup(
                clip=clip,
                labels=torch.zeros(size, dtype=torch.int64),
                dataset=torch.zeros(size, dtype=torch.int64),
                paths=[f"s{step}-{n}-{i}.mp4" for i in range(size)],
                fpc=f,
                modality=modality,
                first_sample=first + n * size,
            )
        )
    return Batch(groups=groups, step=step)


# made once in each test process: fixtures of a file would keep all of its tests in one (tests/conftest.py)
@pytest.fixture(scope="session")
def manifest(tmp_path_factory):
    """16 videos."""
    folder = tmp_path_factory.mktemp("motion8")
    return render_suite("motion8", folder, splits={"train": 16}, size=32, frames=8, seed=0)["train"]


@pytest.fixture(scope="session")
def half_manifest(tmp_path_factory):
    """8 videos."""
    return render_suite("motion8", tmp_path_factory.mktemp("motion8"), splits={"train": 8}, size=32, frames=8)["train"]


@pytest.fixture(scope="session")
def manifests(tmp_path_factory):
    """48 videos to train with, 16 for validation."""
    folder = tmp_path_factory.mktemp("motion8")
    return render_suite("motion8", folder, splits={"train": 48, "val": 16}, size=32, frames=8)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
