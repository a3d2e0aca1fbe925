"""`runtime.logger`: rows at W&B and MLflow, by stand-ins with their interface and by the packages where installed."""

import contextlib
import importlib.util
import json
import logging
import sys
import time
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from vjepa_fast.errors import ConfigError, UserError
from vjepa_fast.trainer import check, checkpoint, train
from vjepa_fast.trainer.loggers import MLflow, Wandb
from vjepa_fast.trainer.metrics import flatten

from .conftest import config


@pytest.fixture
def manifest(half_manifest):
    return half_manifest


@pytest.fixture
def cfg(manifest, tmp_path):
    def make(logger, **runtime):
        return config(tmp_path / "run", data={"datasets": (manifest,)}, runtime={"logger": logger, **runtime})

    return make


def module(name, **content):
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    made.__dict__.update(content)
    return made


class FakeWandb:
    """Keeps what a run is told; ``broken`` names what raises."""

    def __init__(self, broken=()):
        self.starts, self.rows, self.finished, self.broken = [], [], 0, broken

    def init(self, **settings):
        if "init" in self.broken:
            raise RuntimeError("no API key\nlog in")
        self.starts.append(settings)
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, values, step):
        if "log" in self.broken:
            raise OSError("network is down")
        self.rows.append((step, values))

    def finish(self):
        self.finished += 1


class FakeMLflow:
    """A tracking store in memory."""

    def __init__(self):
        self.runs, self.uris, self.experiments = {}, [], {}

    def client(self, uri):
        self.uris.append(uri)
        return self

    def get_experiment_by_name(self, name):
        return self.experiments.get(name)

    def create_experiment(self, name):
        self.experiments[name] = SimpleNamespace(experiment_id=f"e{len(self.experiments)}")
        return self.experiments[name].experiment_id

    def create_run(self, experiment, run_name):
        run = f"r{len(self.runs)}"
        self.runs[run] = SimpleNamespace(name=run_name, params={}, rows=[], states=[])
        return SimpleNamespace(info=SimpleNamespace(run_id=run))

    def log_param(self, run, key, value):
        self.runs[run].params[key] = value

    def update_run(self, run, status):
        self.runs[run].states.append(status)

    def log_batch(self, run, metrics):
        self.runs[run].rows += [(m.step, m.key, m.value) for m in metrics]

    def set_terminated(self, run):
        self.runs[run].states.append("FINISHED")


def fake_wandb(monkeypatch, **kw):
    fake = FakeWandb(**kw)
    monkeypatch.setitem(sys.modules, "wandb", module("wandb", init=fake.init))
    return fake


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: flatten(row) for row in rows}


def stop_after(cfg, step):
    """Train to the end of ``step``, and leave the folder as a kill there leaves it."""
    train(cfg, max_steps=step)
    for path in checkpoint.all_in(cfg.folder)[1:]:
        path.unlink()


def test_wandb_gets_every_row_and_a_resumed_run_is_the_same_there(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    fake, run = fake_wandb(monkeypatch), tmp_path / "run"
    cfg = cfg("wandb", save_every=3)
    stop_after(cfg, 5)
    assert [step for step, _ in fake.rows] == [1, 2, 3, 4, 5] and fake.finished == 1
    assert dict(fake.rows) == rows_of(run)
    train(cfg)
    assert [step for step, _ in fake.rows][5:] == list(range(4, 13)) and dict(fake.rows) == rows_of(run)
    first, second = fake.starts
    assert first["id"] == second["id"] == json.loads((run / "logger.json").read_text())["wandb"]
    assert (first["project"], first["name"], first["resume"], first["dir"]) == ("mine", "run", "allow", str(run))
    assert first["config"]["optimization"]["lr"] == 1e-3
    train(cfg, resume=False, max_steps=1)
    assert fake.starts[2]["id"] != first["id"] and (run / "previous-1" / "logger.json").is_file()


def test_mlflow_gets_every_row_and_a_resumed_run_is_the_same_there(cfg, tmp_path, monkeypatch):
    fake, run = FakeMLflow(), tmp_path / "run"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    metric = lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step)  # noqa: E731
    monkeypatch.setitem(sys.modules, "mlflow", module("mlflow"))
    monkeypatch.setitem(sys.modules, "mlflow.entities", module("mlflow.entities", Metric=metric))
    monkeypatch.setitem(sys.modules, "mlflow.tracking", module("mlflow.tracking", MlflowClient=fake.client))
    cfg = cfg("mlflow", save_every=3)
    stop_after(cfg, 5)
    train(cfg)
    ((id, kept),) = fake.runs.items()
    assert id == json.loads((run / "logger.json").read_text())["mlflow"] and kept.name == "run"
    assert kept.states == ["RUNNING", "FINISHED"] * 2 and set(fake.uris) == {(run / "mlruns").absolute().as_uri()}
    assert kept.params["optimization.lr"] == "0.001" and kept.params["objectives.context.coeff"] == "0.5"
    wanted = {(step, key, value) for step, row in rows_of(run).items() for key, value in row.items()}
    assert wanted <= set(kept.rows) and {step for step, _, _ in kept.rows} == set(range(1, 13))


def test_a_logger_that_is_not_installed_is_refused_before_anything_is_written(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package in (("wandb", "wandb"), ("mlflow", "mlflow-skinny")):
        with pytest.raises(
            ConfigError, match=f"runtime.logger: {name} is not installed; pip install {package}, or set"
        ):
            check(cfg(name))
        with pytest.raises(ConfigError, match="is not installed"):
            train(cfg(name))
    assert not (tmp_path / "run").exists()


def test_one_that_cannot_start_ends_the_run_in_one_line(cfg, tmp_path, monkeypatch):
    fake_wandb(monkeypatch, broken=("init",))
    with pytest.raises(UserError) as error:
        train(cfg("wandb"))
    assert str(error.value).startswith("runtime.logger: wandb cannot be started (no API key); log in (wandb login), or")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_one_that_fails_while_training_is_told_once(cfg, tmp_path, monkeypatch, caplog):
    fake = fake_wandb(monkeypatch, broken=("log",))
    with caplog.at_level(logging.WARNING, "vjepa_fast"):
        assert train(cfg("wandb"), max_steps=3).step == 3
    told = [r.getMessage() for r in caplog.records if "wandb failed" in r.getMessage()]
    assert len(told) == 1 and "network is down" in told[0] and not fake.rows
    assert len(rows_of(tmp_path / "run")) == 3


def test_tensorboard_by_name(cfg, tmp_path):
    train(cfg("tensorboard"), max_steps=1)
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


@contextlib.contextmanager
def quietly(monkeypatch, tmp_path):
    for key, value in {
        "MODE": "offline",
        "SILENT": "true",
        "CONFIG_DIR": str(tmp_path),
        "CACHE_DIR": str(tmp_path),
    }.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    yield


def test_wandb_itself_offline(cfg, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    cfg, run = cfg("wandb"), tmp_path / "run"
    run.mkdir()
    with quietly(monkeypatch, tmp_path):
        ids = []
        for step in (1, 2):
            sink = Wandb(cfg, run)
            sink.log(step, {"loss": 0.5, "terms/pred": 0.25})
            ids.append(sink.run.id)
            sink.close()
    assert ids[0] == ids[1]
    files = list((run / "wandb").glob(f"offline-run-*-{ids[0]}/run-{ids[0]}.wandb"))
    end = time.monotonic() + 30  # its own process writes the end of a run after `finish` has returned
    while not all(b"terms/pred" in file.read_bytes() for file in files) and time.monotonic() < end:
        time.sleep(0.05)
    assert files and all(b"terms/pred" in file.read_bytes() for file in files)


def test_mlflow_itself_in_files(cfg, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    cfg, run = cfg("mlflow"), tmp_path / "run"
    run.mkdir()
    for step in (1, 2):
        sink = MLflow(cfg, run)
        sink.log(step, {"loss": 0.5 / step, "terms/pred": 0.25})
        sink.close()
    found = sink.client.get_run(sink.id)
    assert found.info.run_name == "run" and found.info.status == "FINISHED"
    assert [(m.step, m.value) for m in sink.client.get_metric_history(sink.id, "loss")] == [(1, 0.5), (2, 0.25)]
    assert found.data.metrics["terms/pred"] == 0.25 and found.data.params["optimization.lr"] == "0.001"
    assert (run / "mlruns").is_dir()
