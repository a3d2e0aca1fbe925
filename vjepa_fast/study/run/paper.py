"""The suite ``paper``: the published recipes on the user's data sets, as ``vjepa-fast prepare`` lists them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from vjepa_fast.config import Config
from vjepa_fast.errors import DataError, UserError
from vjepa_fast.study.jobs.pool import Task
from vjepa_fast.study.run.suites import PUBLISHED, Settings, Suite
from vjepa_fast.study.run.training import stretched


class Paper(Suite):
    """UCF-101, and its mixture with SSv2 and ImageNet-100, by the published recipes and the user's manifests."""

    evaluated = ("diving48", "ssv2", "imagenet100", "ucf101", "k400_fewshot")
    own_pooling = "mean"  # SSv2 has 168,913 training clips
    recipes = PUBLISHED
    trained = {"single": ("ucf101",), "mixed": ("ucf101", "ssv2", "imagenet100")}  # in the recipes' order

    def __init__(self, settings: Settings, folder: Path):
        super().__init__(settings, folder)
        self.data = expand_data(settings.data)

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

    def check(self, regimes: Iterable[str]) -> None:
        """Raise DataError that lists every manifest that is missing, or named and not there."""
        needed = [f"{n}.train" for r in regimes for n in self.trained[r]]
        for name in self.names:
            needed += [f"{name}.test"] if name == "k400_fewshot" else [f"{name}.train", f"{name}.test"]
        lacking = [key for key in dict.fromkeys(needed) if key not in self.data]
        if lacking:
            raise DataError(
                f"--data: no manifest for {', '.join(lacking)}; give --data {lacking[0]}=FILE.csv, or --data "
                f"{lacking[0].split('.')[0]}=FOLDER with train.csv, val.csv and test.csv (few-shot: base.csv and "
                "novel.csv); --evaluate leaves out what is not to be measured"
            )
        gone = [f"{key}: {self.data[key]}" for key in dict.fromkeys(needed) if not os.path.isfile(self.data[key])]
        if gone:
            raise DataError(f"--data: no such file: {'; '.join(gone)}")

    def tasks(self, regimes: Iterable[str]) -> list[Task]:
        """None: the user's data is there."""
        return []

    def sources(self) -> dict[str, dict]:
        """The user's manifests."""
        out = {}
        for name in self.names:
            parts = {p: self.data[f"{name}.{p}"] for p in ("train", "val", "test") if f"{name}.{p}" in self.data}
            out[name] = {"kind": "fewshot" if name == "k400_fewshot" else "probe", "manifests": parts}
        return out


def expand_data(data: Mapping[str, str]) -> dict[str, str]:
    """{"ssv2.train": absolute path, ...} of {"ssv2": folder, "ucf101.test": file}; base and novel are train and test.

    Raises UserError for a name that no suite knows, or a folder without manifests.
    """
    known = sorted(Paper.evaluated)
    parts = {"train": "train", "val": "val", "test": "test", "base": "train", "novel": "test"}
    out = {}
    for name, path in data.items():
        suite, _, part = name.partition(".")
        if suite not in known or (part and part not in parts):
            raise UserError(
                f"--data {name}=...: not known; names are {', '.join(known)}, alone (a folder) or with "
                ".train, .val, .test, .base or .novel"
            )
        files = {part: Path(path)} if part else {p: file for p in parts if (file := Path(path) / f"{p}.csv").is_file()}
        out |= {f"{suite}.{parts[p]}": os.path.abspath(file) for p, file in files.items()}
        if not files:
            wanted = ", ".join(f"{p}.csv" for p in parts)
            raise UserError(f"--data {name}={path}: not a folder that holds any of {wanted}")
    return out
