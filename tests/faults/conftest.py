"""A tiny run on rendered videos, and what faults are injected into."""

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest
import torch

from tests import forks
from tests.trainer.conftest import config
from vjepa_fast import config as configs
from vjepa_fast.config.schema import Config
from vjepa_fast.data.synthetic import render_suite

ROOT = Path(__file__).parents[2]
VOLATILE = ("clips_per_s", "tokens_per_s", "step_flops", "mfu", "peak_memory_mb", "data_wait", "save_wait")


@pytest.fixture(scope="session")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("motion8")
    return render_suite("motion8", folder, splits={"train": 8}, size=32, frames=8, seed=0)["train"]


@pytest.fixture(scope="session")
def undisturbed(manifest, tmp_path_factory):
    """Rows of the run of `tiny` that nothing happens to."""
    from vjepa_fast.trainer import train

    return rows(train(tiny(manifest, tmp_path_factory.mktemp("undisturbed") / "run")).folder)


@pytest.fixture
def cfg(manifest, tmp_path):
    return tiny(manifest, tmp_path / "run")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(manifest, folder, **sections) -> Config:
    """12 steps of about 20 ms, saved every second one."""
    runtime = {"save_every": 2, "keep_checkpoints": 2, "threads": 1, **sections.pop("runtime", {})}
    return config(folder, data={"datasets": (str(manifest),), "num_workers": 1}, runtime=runtime, **sections)


def start(cfg: Config, *options: str, env: dict | None = None) -> forks.Forked:
    """``vjepa-fast train`` in a process of its own."""
    folder = Path(cfg.folder)
    recipe = folder.parent / f"{folder.name}.yaml"
    recipe.write_text(configs.dump_yaml(cfg))
    return forks.Forked("-m", "vjepa_fast", "train", str(recipe), *options, env={**os.environ, **(env or {})})


def rows(folder) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    found = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in VOLATILE} for row in found]


def wait_for(condition, process=None, seconds=60.0) -> None:
    """Until ``condition()``; fails where the process ends first or time runs out."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end or (process is not None and process.poll() is not None):
            raise AssertionError("never came" if process is None else process.communicate())
        time.sleep(0.01)


def replaced(cfg: Config, section: str, **values) -> Config:
    """``cfg`` with other values in a section."""
    return dataclasses.replace(cfg, **{section: dataclasses.replace(getattr(cfg, section), **values)})
