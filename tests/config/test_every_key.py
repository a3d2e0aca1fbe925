"""``config check`` and ``config show`` refuse what ``train`` refuses before its first batch, in the same words.

Every key there is, found by walking the dataclasses and the registered objectives, is set to values of wrong types, out
of range, unknown and empty.
"""

import dataclasses
import json
import math
import time

import pytest
import torch
import yaml

from vjepa_fast import cli, config
from vjepa_fast.config.schema import Config
from vjepa_fast.objectives import registry
from vjepa_fast.trainer.trainer import Trainer, TrainResult

VALUES = (-1, 0, 0.5, 3, "nonsense", "", None, True, math.nan, -math.inf, [], [1, 2], {})
HEAD = {"hidden_dim", "num_slices"}


def base(folder):
    """A configuration that a processor builds at once, with every section and every objective."""
    manifests = {"clips": "a.mp4 0\nb.mp4 1\n", "stills": "a.png 0\nb.png 1\n"}
    for name, lines in manifests.items():
        (folder / f"{name}.csv").write_text(lines)
    data = {"crop_size": 16, "patch_size": 8, "batch_size": 1}
    terms = {
        name: {field.name: 4 for field in dataclasses.fields(term) if field.name in HEAD}
        for name, term in registry().items()
    }
    return {
        "data": {"datasets": [str(folder / "clips.csv")], "dataset_fpcs": [4], **data},
        "img_data": {"datasets": [str(folder / "stills.csv")], "dataset_fpcs": [1], **data},
        "img_masks": {"specs": [{}]},
        "model": {"embed_dim": 12, "depth": 2, "num_heads": 2, "levels": 2}
        | {"pred_embed_dim": 12, "pred_depth": 1, "pred_num_heads": 2},
        "objectives": terms,
        "target": {"mode": "online"},
        "optimization": {"epochs": 1, "ipe": 1},
        "runtime": {"device": "cpu", "dtype": "float32", "tensorboard": False, "peak_tflops": 1.0},
        "folder": str(folder / "run"),
    }


def keys(section, path=""):
    """The path of every value of a configuration, nested sections included."""
    for field in dataclasses.fields(section):
        value, where = getattr(section, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from keys(value, f"{where}.")
            continue
        yield where
        if field.name == "specs":
            yield from keys(value[0], f"{where}.0.")
        elif field.name == "objectives":
            for name in value:
                yield f"{where}.{name}"
                yield from (f"{where}.{name}.{f.name}" for f in dataclasses.fields(registry()[name]))


def test_(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Trainer, "run", lambda self, *args: TrainResult(self.folder, 0, {}, None))
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(base(tmp_path)))

    def outcome(*command):
        code = cli.main([*command])
        out, err = capsys.readouterr()
        notes = [line for line in out.splitlines() if line.startswith("note: ")]
        return code, err, notes

    assert outcome("config", "check", str(path))[:2] == (0, "")
    n = r = 0
    t0 = time.time()
    T = [0, 0]
    for key in keys(config.load(path)):
        for value in VALUES:
            text = f"{key}={json.dumps(value).replace('NaN', '.nan').replace('-Infinity', '-.inf')}"
            s = time.time()
            shown = outcome("config", "show", str(path), "--set", text)
            checked = outcome("config", "check", str(path), "--set", text)
            trained = outcome("train", str(path), "--set", text)
            n += 1
            r += shown[0] != 0
            T[shown[0] != 0] += time.time() - s
            if not shown[:2] == checked[:2] == trained[:2]:
                print(text, shown, checked, trained)
    with capsys.disabled():
        print(n, r, T)
