"""Where rows of metrics go besides ``metrics.jsonl``: TensorBoard, Weights & Biases, MLflow (``runtime.logger``).

A run has one entry there, whatever it is stopped and started: ``logger.json`` of the run folder keeps its id.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import secrets
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from vjepa_fast import config as configs
from vjepa_fast.config.schema import Config
from vjepa_fast.errors import ConfigError, UserError
from vjepa_fast.files import first_line, parse_json, write_json
from vjepa_fast.trainer.distributed import Distributed

_log = logging.getLogger("vjepa_fast")
MARK = "logger.json"
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
_TO_INSTALL = {"mlflow": "mlflow-skinny"}
_PARAM = 500  # characters of a setting that MLflow takes


class Sink(Protocol):
    """Takes rows."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a row by name (``terms/pred``)."""
        ...

    def close(self) -> None:
        """The process ends, the run perhaps not."""
        ...


def check(cfg: Config) -> None:
    """ConfigError where what ``runtime.logger`` names is not installed."""
    name = cfg.runtime.logger
    if name is not None and importlib.util.find_spec(_PACKAGES[name]) is None:
        raise ConfigError(
            f"runtime.logger: {name} is not installed; pip install {_TO_INSTALL.get(name, name)}, or set "
            "runtime.logger=null"
        )


def open_sinks(cfg: Config, world: Distributed, done: int) -> list[Sink]:
    """What the rows of a run that has made ``done`` steps go to; nothing but in the first process.

    Raises:
        UserError: one cannot be started; every process raises.
    """
    sinks: list[Sink] = []
    error = None
    if world.main:
        name, folder = cfg.runtime.logger, Path(cfg.folder)
        try:
            if cfg.runtime.tensorboard or name == "tensorboard":
                asked = name if name == "tensorboard" else ""
                sinks.append(Guarded(TensorBoard(folder / "tensorboard", done, asked), "tensorboard"))
            if name == "wandb":
                sinks.append(Guarded(Wandb(cfg, folder), name))
            elif name == "mlflow":
                sinks.append(Guarded(MLflow(cfg, folder), name))
        except Exception as e:
            error = e
    world.agree(error)
    return sinks


class TensorBoard:
    """Events in a folder; those beyond step ``done`` are marked as void."""

    def __init__(self, folder: Path, done: int, asked: str = ""):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            key = "runtime.logger" if asked else "runtime.tensorboard"
            raise UserError(
                f"{key}: tensorboard cannot be imported ({error}); install it or --set "
                f"{key}={'null' if asked else 'false'}"
            ) from None
        self.writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar each."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the file."""
        self.writer.close()


class Wandb:
    """A run of Weights & Biases, its files in ``wandb/`` of the run folder.

    Project, entity and mode are those of its own environment variables (``WANDB_PROJECT``, ``WANDB_MODE=offline``).
    """

    def __init__(self, cfg: Config, folder: Path):
        with _started("wandb", "log in (wandb login), or set WANDB_MODE=offline to write to the run folder alone"):
            wandb = importlib.import_module("wandb")
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "vjepa_fast"),
                name=_name(folder),
                id=_kept_id(folder, "wandb", lambda: secrets.token_hex(4)),
                resume="allow",
                dir=str(folder),
                config=configs.to_dict(cfg),
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Rows that W&B has already, of steps made again after a kill, are left out there."""
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        """Send what waits."""
        self.run.finish()


class MLflow:
    """A run of MLflow, in files in ``mlruns/`` of the run folder, or at the ``MLFLOW_TRACKING_URI``.

    MLflow 3 wants to be told that files are meant: ``MLFLOW_ALLOW_FILE_STORE`` is set for this process, unless it is.

    The experiment is that of ``MLFLOW_EXPERIMENT_NAME``, else ``vjepa_fast``.
    """

    def __init__(self, cfg: Config, folder: Path):
        hint = "check MLFLOW_TRACKING_URI"
        with _started("mlflow", hint):
            entities = importlib.import_module("mlflow.entities")
            self.metric = entities.Metric
            uri = os.environ.get("MLFLOW_TRACKING_URI")
            if not uri:
                uri = (folder / "mlruns").absolute().as_uri()
                os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            self.client: Any = importlib.import_module("mlflow.tracking").MlflowClient(uri)
            self.id = _kept_id(folder, "mlflow", lambda: self._create(cfg, folder))
            self.client.update_run(self.id, status="RUNNING")

    def _create(self, cfg: Config, folder: Path) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "vjepa_fast")
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found is not None else self.client.create_experiment(name)
        run = self.client.create_run(experiment, run_name=_name(folder)).info.run_id
        for key, value in _settings(configs.to_dict(cfg)):
            self.client.log_param(run, key, value)
        return run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One batch for each row."""
        now = int(1000 * time.time())
        self.client.log_batch(self.id, metrics=[self.metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        """The process ends; a run that goes on is RUNNING again."""
        self.client.set_terminated(self.id)


class Guarded:
    """A sink that may fail while training: it is then told once, and left alone. ``metrics.jsonl`` has all rows."""

    def __init__(self, sink: Sink, name: str):
        self.sink: Sink | None = sink
        self.name = name

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """As the sink's."""
        self._try(lambda sink: sink.log(step, values))

    def close(self) -> None:
        """As the sink's."""
        self._try(lambda sink: sink.close())

    def _try(self, call: Callable[[Sink], None]) -> None:
        if self.sink is None:
            return
        try:
            call(self.sink)
        except Exception as error:
            self.sink = None
            _log.warning("%s failed (%s); rows from here on are in metrics.jsonl alone", self.name, first_line(error))


def _name(folder: Path) -> str:
    return folder.absolute().name


def _kept_id(folder: Path, name: str, make: Callable[[], str]) -> str:
    """The id that the run has at ``name``; made, and kept in the run folder, when it first asks."""
    path = folder / MARK
    known: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        found = parse_json(path.read_bytes())
        known = found if isinstance(found, dict) else {}
    if name not in known:
        known[name] = make()
        write_json(path, known, parents=False)
    return known[name]


@contextlib.contextmanager
def _started(name: str, hint: str) -> Generator[None]:
    """What goes wrong in a foreign library when it is started, as one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"runtime.logger: {name} cannot be started ({first_line(error)}); {hint}") from error


def _settings(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, value as a text) of all settings, nested names joined with dots."""
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield prefix + key, str(value)[:_PARAM]
