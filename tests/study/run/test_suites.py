"""The paper's suite on the user's manifests."""

from pathlib import Path

import pytest

from tests.study.run.tiny import SMALL, events_of, study
from vjepa_fast import config
from vjepa_fast.data.synthetic import render_suite
from vjepa_fast.errors import DataError, UserError
from vjepa_fast.study.run import cells
from vjepa_fast.study.run.clips import SIZES
from vjepa_fast.study.run.paper import expand_data
from vjepa_fast.study.run.plan import Grid, StudyPlan
from vjepa_fast.study.run.suites import Settings


def test_the_papers_suite_on_the_users_manifests(tmp_path):
    """A tiny encoder on rendered stand-ins for the data sets: trained, then evaluated from manifests."""
    base = render_suite("motion8", tmp_path / "data", splits={"train": 16, "test": 16}, size=32, frames=32, fps=8)
    novel = render_suite("fewshot", tmp_path / "few", splits={"train": 36, "test": 432}, size=32, frames=32, fps=8)
    data = {n: str(Path(base["train"]).parent) for n in ("ucf101", "ssv2", "imagenet100", "diving48")}
    data |= {"k400_fewshot.base": novel["train"], "k400_fewshot.novel": novel["test"]}
    overrides = (
        *(o for o in SMALL if "ipe" not in o),
        "optimization.ipe=1",
        "model.depth=4",
        "model.pred_depth=2",
        "data.num_workers=0",
        "runtime.dtype=float32",
        "model.use_activation_checkpointing=false",
    )
    settings = Settings(
        "paper", overrides=overrides, data=data, evaluate=("ssv2", "k400_fewshot"), queries=1, episodes=20
    )
    made = study(tmp_path / "s", settings, Grid(("hw",), ("mixed",), (7,)))
    _, failed = events_of(made)
    assert failed == []
    cell = cells.read_cell(made.folder, "hw-mixed-intended-s7")
    assert [(r["suite"], r["probe"]) for r in cell["rows"]] == [
        ("ssv2", "linear"),
        ("ssv2", "knn"),
        ("k400_fewshot", "1-shot"),
        ("k400_fewshot", "5-shot"),
    ]
    assert made.jobs[1]["config"]["data"]["datasets_weights"] == [0.2, 0.6, 0.2]
    assert made.jobs[1]["config"]["objectives"] == config.load("mixed_4gpu_hw").objectives
    single = StudyPlan(tmp_path / "s", settings, Grid(("hw",), ("single",), (7,)))
    assert single.jobs[1]["config"]["data"]["datasets"] == [base["train"]]
    assert single.jobs[1]["evaluation"] == made.jobs[1]["evaluation"]  # one view for both regimes


def test_manifests_that_are_missing_are_all_named(tmp_path):
    with pytest.raises(DataError) as caught:
        study(tmp_path, Settings("paper"), Grid(("baseline",), ("mixed",)))
    for name in ("ucf101.train", "ssv2.train", "imagenet100.test", "diving48.test", "k400_fewshot.test"):
        assert name in str(caught.value)
    data = {f"ucf101.{p}": str(tmp_path / f"{p}.csv") for p in ("train", "test")}
    with pytest.raises(DataError, match="no such file: ucf101.train: .*train.csv; ucf101.test"):
        study(tmp_path, Settings("paper", data=data, evaluate=("ucf101",)), Grid(("baseline",), ("single",)))
    with pytest.raises(UserError, match="kinetics.train=...: not known"):
        expand_data({"kinetics.train": "x"})
    with pytest.raises(UserError, match="not a folder that holds any of train.csv"):
        expand_data({"ssv2": str(tmp_path)})
    assert not (tmp_path / "study.json").exists()


def test_settings_have_sizes_of_their_own():
    Settings().sizes["dive"]["train"] = 1
    assert Settings().sizes["dive"]["train"] == SIZES["dive"]["train"] > 1
