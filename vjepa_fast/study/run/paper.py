"""The suite ``paper``: the published recipes on the user's data sets, as ``vjepa-fast prepare`` lists them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vjepa_fast.config import Config
from vjepa_fast.errors import DataError, UserError
from vjepa_fast.study.jobs.pool import Task
from vjepa_fast.study.run.suites import PUBLISHED, Settings, Suite
from vjepa_fast.study.run.training import stretched


@dataclass(frozen=True)
class Place:
    """One data set: the manifests of its parts below the folder of `vjepa-fast prepare`, by the names it gives them
    (the first that is there counts), and the command that makes them. ``task``: of the probes; None: few-shot episodes.
    """

    title: str
    command: str
    parts: Mapping[str, tuple[str, ...]]
    task: str | None = None


ROLES = {"train": "base", "val": "val", "test": "novel"}  # of few-shot parts
EPISODES = {part: (role,) for part, role in ROLES.items()}
TRAIN_VAL = {"train": ("train",), "test": ("val",)}  # without public test labels: scored on the validation list
PLACES = {
    "diving48": Place("Diving-48", "prepare diving48 SOURCE", {"train": ("train",), "test": ("test",)}, "diving48"),
    "ssv2": Place("SSv2", "prepare ssv2 SOURCE", TRAIN_VAL, "ssv2"),
    "imagenet100": Place("ImageNet-100", "prepare imagenet100 SOURCE", TRAIN_VAL, "imagenet100"),
    "ucf101": Place(
        "UCF-101", "prepare ucf101 SOURCE", {"train": ("train1", "train"), "test": ("test1", "test")}, "ucf101"
    ),
    "motion8": Place(
        "synthetic motion",
        "synthetic motion8 OUT --train 160 --val 0 --test 40",
        {"train": ("train",), "test": ("test",)},
        "motion8",
    ),
    "kinetics100_cmn": Place("Kinetics-100, CMN", "prepare fewshot SOURCE --lists CMN_LISTS", EPISODES),
    "kinetics100_hyrsm": Place("Kinetics-100, HyRSM", "prepare fewshot SOURCE --lists HYRSM_LISTS", EPISODES),
    "k400_fewshot": Place("Kinetics, other lists", "prepare fewshot SOURCE --lists LISTS", EPISODES),
}
ON_REQUEST = ("k400_fewshot",)  # evaluated where its manifests are given
TUNED = ("meta-baseline", "sun")
PREPARED = "prepared"  # of a --data without a name: the folder that holds those of `prepare`


class Paper(Suite):
    """UCF-101, and its mixture with SSv2 and ImageNet-100, by the published recipes and the user's manifests.

    Every encoder is measured frozen on five data sets, by our probes and by the published ones, and few-shot on
    Kinetics-100, frozen and after Meta-Baseline and SUN.
    """

    evaluated = tuple(PLACES)
    own_pooling = "mean"  # SSv2 has 168,913 training clips
    recipes = PUBLISHED
    trained = {"single": ("ucf101",), "mixed": ("ucf101", "ssv2", "imagenet100")}  # in the recipes' order

    def __init__(self, settings: Settings, folder: Path):
        super().__init__(settings, folder)
        self.data = expand_data(settings.data)
        if not settings.evaluate:
            given = {key.partition(".")[0] for key in self.data}
            self.names = tuple(n for n in self.names if n not in ON_REQUEST or n in given)
        self.tune = tune_options(settings.tune)

    def weights(self, regime: str) -> dict[str, float]:
        """Sampling weights of the data sets that a regime trains on."""
        from vjepa_fast import config

        weights = config.load(PUBLISHED[regime]).data.datasets_weights or (1.0,)
        return dict(zip(self.trained[regime], weights, strict=True))

    def baseline(self, regime: str, compat: str, seed: int) -> Config:
        """The published baseline recipe on the user's manifests."""
        cfg = self._load(PUBLISHED[regime], compat, seed)
        paths = tuple(self.data[f"{name}.train"] for name in self.trained[regime])
        return stretched(
            dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, datasets=paths)), self.settings.scale
        )

    def evaluation(self) -> dict:
        """Also what few-shot encoders are tuned by."""
        return {**super().evaluation(), "tune": self.tune}

    def view(self) -> dict:
        """Short videos, which SSv2 has, hold their last frame."""
        return {**super().view(), "short": "hold"}

    def check(self, regimes: Iterable[str]) -> None:
        """Raise DataError that lists every manifest that is missing, with the command that makes it, or named and not
        there; or names few-shot parts that share files, or have too few classes or clips for their episodes.
        """
        needed = [f"{n}.train" for r in regimes for n in self.trained[r]]
        needed += [f"{name}.{part}" for name in self.names for part in ("train", "test")]
        order = [f"{name}.{part}" for name in PLACES for part in ("train", "test")]
        needed = [key for key in order if key in needed]
        if lacking := [key for key in needed if key not in self.data]:
            raise DataError(f"--data: {_missing(lacking, self.settings.data.get(PREPARED, PREPARED))}")
        gone = [f"{key}: {self.data[key]}" for key in needed if not os.path.isfile(self.data[key])]
        if gone:
            raise DataError(f"--data: no such file: {'; '.join(gone)}")
        for name, source in self.sources().items():
            if source["kind"] == "fewshot":
                self._check_few_shot(name, source["manifests"])

    def _check_few_shot(self, name: str, manifests: Mapping[str, str]) -> None:
        from vjepa_fast.data import load_manifest
        from vjepa_fast.evaluation.fewshot.protocols import EpisodeProtocol
        from vjepa_fast.evaluation.fewshot.tuning.methods import settings_of
        from vjepa_fast.evaluation.fewshot.tuning.parts import check_counts
        from vjepa_fast.evaluation.readout.choice import validation_rule
        from vjepa_fast.evaluation.run.fewshot import check_episodes
        from vjepa_fast.evaluation.tasks import check_apart

        parts = {ROLES[part]: load_manifest(path) for part, path in manifests.items()}
        check_apart(parts)
        episodes = {k: getattr(self.settings, k) for k in ("way", "queries", "episodes")}
        check_episodes(parts["novel"], EpisodeProtocol(**episodes))
        try:
            if "val" in parts:
                validation_rule(parts["val"], 1, self.settings.seed)
            for method in self.tune["methods"]:
                settings = settings_of(method, self.tune, **episodes)
                check_counts(parts["base"], parts.get("val"), parts["novel"], settings)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None

    def cost_lines(self, jobs: Sequence[Mapping[str, Any]]) -> list[str]:
        """GPU-hours and disk by part, and what is free there."""
        from vjepa_fast.evaluation.extract.shards import free_bytes
        from vjepa_fast.study.run import cost

        if not jobs:
            return []
        free = free_bytes(self.folder.absolute()) / 1e9
        return [*cost.table(cost.lines(self, jobs)), f"{self.folder}: its disk has {free:,.0f} GB free."]

    def tasks(self, regimes: Iterable[str]) -> list[Task]:
        """None: the user's data is there."""
        return []

    def sources(self) -> dict[str, dict]:
        """The user's manifests, with the task of the published probe where there is one."""
        out = {}
        for name in self.names:
            parts = {p: self.data[f"{name}.{p}"] for p in ("train", "val", "test") if f"{name}.{p}" in self.data}
            task = PLACES[name].task
            out[name] = {"kind": "probe" if task else "fewshot", "task": task, "manifests": parts}
        return out


def _missing(lacking: Sequence[str], folder: str) -> str:
    parts: dict[str, list[str]] = {}
    for key in lacking:
        name, _, part = key.partition(".")
        parts.setdefault(name, []).append(part)

    def how(name: str) -> str:
        command, out = PLACES[name].command, os.path.join(folder, name)
        command = command.replace("OUT", out) if "OUT" in command else f"{command} --out {out}"
        named = [f"{name}.{p if PLACES[name].task else ROLES[p]}" for p in parts[name]]
        return f"{', '.join(named)} (vjepa-fast {command})"

    return (
        f"{len(lacking)} manifests are missing: {'; '.join(map(how, parts))}; then give --data {folder}, or "
        f"--data {lacking[0]}=FILE.csv; --evaluate leaves out what is not to be measured"
    )


def tune_options(given: Mapping[str, str]) -> dict:
    """{"methods": [...], option: value, ...} of {"methods": "sun,sun-d", "trunk": "head", "tune_epochs": "20", ...}.

    Raises UserError for a method or an option that is not known.
    """
    from vjepa_fast.evaluation.fewshot.tuning.methods import METHODS, OPTIONS

    asked = given.get("methods", ",".join(TUNED))
    methods = [] if asked == "none" else [m.strip() for m in asked.split(",") if m.strip()]
    for name in [*methods, *given]:
        if name not in ("methods", *METHODS, *OPTIONS):
            raise UserError(
                f"--tune {name}: not known; give methods=none or methods={','.join(METHODS)}, and {', '.join(OPTIONS)}"
            )
    return {"methods": methods, **{k: _value(k, v) for k, v in given.items() if k != "methods"}}


def _value(name: str, text: str) -> str | int | float:
    if name == "trunk":
        return text
    try:
        return float(text) if name.endswith("_lr") or name == "flip" else int(text)
    except ValueError:
        raise UserError(f"--tune {name}={text}: expected a number") from None


def expand_data(data: Mapping[str, str]) -> dict[str, str]:
    """{"ssv2.train": absolute path, ...} of {"prepared": folder of folders, "ssv2": folder, "ucf101.test": file}; base
    and novel are train and test. What is named wins over what ``prepared`` has. A folder without test.csv and novel.csv
    is taken as one of `vjepa-fast prepare`.

    Raises UserError for a name that no suite knows, or a folder without manifests.
    """
    parts = {"train": "train", "val": "val", "test": "test", "base": "train", "novel": "test"}
    out = prepared(data[PREPARED]) if PREPARED in data else {}
    for name, path in sorted(data.items(), key=lambda item: "." in item[0]):
        if name == PREPARED:
            continue
        suite, _, part = name.partition(".")
        if suite not in PLACES or (part and part not in parts):
            raise UserError(
                f"--data {name}=...: not known; names are {', '.join(sorted(PLACES))}, alone (a folder) or with "
                ".train, .val, .test, .base or .novel"
            )
        if part:
            out[f"{suite}.{parts[part]}"] = os.path.abspath(path)
            continue
        files = {parts[p]: file for p in parts if (file := Path(path) / f"{p}.csv").is_file()}
        if "test" not in files:
            files = _made(suite, Path(path))
        if not files:
            wanted = ", ".join(f"{p}.csv" for p in parts)
            raise UserError(f"--data {name}={path}: not a folder that holds any of {wanted}")
        out = {key: file for key, file in out.items() if not key.startswith(f"{suite}.")}
        out |= {f"{suite}.{p}": os.path.abspath(file) for p, file in files.items()}
    return out


def prepared(folder: str) -> dict[str, str]:
    """The manifests of the paper's data sets that lie below ``folder``, as `vjepa-fast prepare` names them."""
    if not os.path.isdir(folder):
        raise UserError(f"--data {folder}: no such folder; vjepa-fast prepare makes one per data set below it")
    return {
        f"{name}.{part}": os.path.abspath(file)
        for name in PLACES
        for part, file in _made(name, Path(folder, name)).items()
    }


def _made(name: str, folder: Path) -> dict[str, Path]:
    """What `vjepa-fast prepare` left of a data set in ``folder``, by part."""
    found = {
        part: [file for stem in stems if (file := folder / f"{stem}.csv").is_file()]
        for part, stems in PLACES[name].parts.items()
    }
    return {part: files[0] for part, files in found.items() if files}
