"""A study so small that whole runs of it take seconds."""

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

from vjepa_fast.study.run.plan import Grid, StudyPlan
from vjepa_fast.study.run.runner import prepare, run_study
from vjepa_fast.study.run.suites import Settings

SIZES = {
    "motion8": {"train": 32, "val": 16, "test": 16},
    "order": {"train": 24, "val": 24, "test": 24},
    "objects": {"train": 48, "val": 48, "test": 48},
    "dive": {"train": 24, "val": 24, "test": 24},
    "fewshot": {"train": 108, "val": 216, "test": 432},
}
ENCODER = (
    "data.crop_size=32",
    "data.patch_size=16",
    "data.batch_size=4",
    "optimization.epochs=1",
    "optimization.ipe=4",
    "optimization.warmup=0.5",
    "model.embed_dim=24",
    "model.num_heads=2",
    "model.pred_embed_dim=24",
    "model.pred_num_heads=2",
)
SMALL = (*ENCODER, "runtime.log_every=1", "runtime.save_every=100", "runtime.peak_tflops=1")
NAMES = ("motion8", "order", "objects", "fewshot")
TINY = Settings(sizes=SIZES, size=32, overrides=SMALL, evaluate=NAMES, queries=1, episodes=50)
GRID = Grid(("baseline", "kinematic"), ("single",), (0,), published=("kinematic",))
KEYS = [
    "random_init-none-intended-s0",
    "baseline-single-intended-s0",
    "kinematic-single-intended-s0",
    "kinematic-single-published-s0",
]

place: Path | None = None  # that the test processes of a run have in common


def study(folder, settings=TINY, grid=GRID, **more) -> StudyPlan:
    return StudyPlan(folder, settings, grid, threads=1, force=True, **more)


@functools.cache
def data() -> Path:
    """The folder of a study of `TINY` that has its suites and decoded clips; the first test process that asks makes
    them for all.
    """
    folder = Path(tempfile.mkdtemp()) if place is None else place
    if place is None:
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    made = study(folder / "tiny-study")
    made.claim()
    prepare(made, 0, lambda *_: None)
    return made.folder


def prepared(made: StudyPlan) -> StudyPlan:
    """``made`` with its data, which one of `TINY` has as links to `data`."""
    made.claim()
    if made.settings == TINY:
        for name in ("suites", "cache", "tasks"):
            if not (made.folder / name).exists():
                shutil.copytree(data() / name, made.folder / name, copy_function=os.link)
    prepare(made, 0, lambda *_: None)
    return made


def events_of(made: StudyPlan, **more) -> tuple[list, list]:
    events = []
    failed = run_study(
        made,
        launcher="inline",
        on_event=lambda what, job: events.append((what, job if isinstance(job, str) else job["key"])),
        **more,
    )
    return events, failed
