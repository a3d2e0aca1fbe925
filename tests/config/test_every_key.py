"""``config check`` and ``config show`` refuse what ``train`` refuses before its first batch, in the same words.

Every key, found by walking the dataclasses and the registered objectives, is set to values of a wrong type, out of
range, unknown or empty.
"""

import argparse
import copy
import dataclasses
import functools
import importlib
import json
import math
import os

import pytest
import torch
import yaml

from vjepa_fast import cli, config, trainer
from vjepa_fast.errors import ConfigError
from vjepa_fast.objectives import OBJECTIVES
from vjepa_fast.trainer import check, preflight
from vjepa_fast.trainer.trainer import Trainer, TrainResult

VALUES = (-1, 0, 0.5, "nonsense", None, True, math.nan, [])
SAME_FIELDS = ("img_data.", "img_masks.")  # as data and masks, for which all values are tried
FEW = (-1, "nonsense")


def base(folder):
    """A configuration with every section and every objective, small enough to build at once."""
    for name, kind in (("clips", "mp4"), ("stills", "png")):
        (folder / f"{name}.csv").write_text(f"a.{kind} 0\nb.{kind} 1\n")
    data = {"crop_size": 16, "patch_size": 8, "batch_size": 1}
    model = {"embed_dim": 12, "depth": 1, "num_heads": 2, "levels": 1}
    return {
        "data": {"datasets": [str(folder / "clips.csv")], "dataset_fpcs": [4], **data},
        "img_data": {"datasets": [str(folder / "stills.csv")], "dataset_fpcs": [1], **data},
        "img_masks": {"specs": [{}]},
        "model": {**model, "pred_embed_dim": 12, "pred_depth": 1, "pred_num_heads": 2},
        "objectives": {name: {} for name in OBJECTIVES},
        "target": {"mode": "online"},
        "optimization": {"epochs": 1, "ipe": 1},
        "runtime": {"device": "cpu", "dtype": "float32", "tensorboard": False, "peak_tflops": 1.0},
        "folder": str(folder / "run"),
    }


def keys(section, path=""):
    """The path of every value of a configuration, nested sections, masks and fields of objectives included."""
    for field in dataclasses.fields(section):
        value, where = getattr(section, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from keys(value, f"{where}.")
        else:
            yield where
        if field.name == "specs":
            yield from keys(value[0], f"{where}.0.")
        elif field.name == "objectives":
            yield from (f"{where}.{name}.{f.name}" for name in value for f in dataclasses.fields(OBJECTIVES[name]))


def once(ask):
    """``ask`` that answers the question it was asked last as it did then, be it by an error."""
    last = [None, None]

    def asked(*question):
        if last[0] != repr(question):
            try:
                last[1] = ask(*question)
            except ConfigError as error:
                last[1] = error
            last[0] = repr(question)
        if isinstance(last[1], ConfigError):
            raise ConfigError(*last[1].args)
        return last[1]

    return asked


@pytest.fixture
def outcome(tmp_path, monkeypatch, capsys):
    """``outcome(command, ...)``: exit code, error and notes of a command about the base with one value changed.

    What all three commands ask in the same words is answered once: what a file with its overrides says, and whether
    that can be trained. Weights are left as they come, nothing is synced to the disk, C writes the YAML, and texts of
    parsers are not looked up in other languages.
    """
    loading = importlib.import_module("vjepa_fast.config.load")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vjepa_fast.trainer.run_folder.git_commit", lambda: "unknown")
    monkeypatch.setattr(Trainer, "run", lambda self, *args: TrainResult(self.folder, 0, {}, None))
    read = functools.cache(loading._read_yaml)
    monkeypatch.setattr(loading, "_read_yaml", lambda path: copy.deepcopy(read(path)))
    monkeypatch.setattr(config, "load", once(config.load))
    judged = once(preflight.check)
    monkeypatch.setattr(preflight, "check", judged)
    monkeypatch.setattr(trainer, "check", judged)
    for where in ("vit", "predictor"):
        monkeypatch.setattr(f"vjepa_fast.models.{where}.init_weights", lambda *args, **kwargs: None)
    for name in ("trunc_normal_", "kaiming_uniform_", "uniform_", "normal_"):
        monkeypatch.setattr(torch.nn.init, name, lambda weights, *args, **kwargs: weights)
    monkeypatch.setattr(torch.Tensor, "normal_", lambda weights, *args, **kwargs: weights)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(yaml, "SafeDumper", getattr(yaml, "CSafeDumper", yaml.SafeDumper))
    monkeypatch.setattr(argparse, "_", lambda text: text)
    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(base(tmp_path)))

    def run(*command, change=()):
        code = cli.main([*command, str(path), *change])
        out, err = capsys.readouterr()
        assert (code != 0) == bool(err) and err.count("\n") <= 1, err
        notes = [line.split(": ", 2)[2] for line in out.splitlines() if line.startswith("note: ")]
        flag = f"--set {change[1]}: " if change else ""
        return err.removeprefix("error: ").removeprefix(f"{path}: ").removeprefix(flag).rstrip("\n"), notes

    return run


def test_check_and_show_refuse_what_train_refuses(tmp_path, outcome):
    assert outcome("config", "check") == outcome("config", "show") == outcome("train") == ("", [])
    refused, accepted, different = set(), set(), []
    for key in keys(config.from_dict(base(tmp_path))):
        for value in FEW if key.startswith(SAME_FIELDS) else VALUES:
            text = f"{key}={'.nan' if value is math.nan else json.dumps(value)}"
            (shown, _), (checked, notes), (trained, _) = (
                outcome(*command, change=("--set", text))
                for command in (("config", "show"), ("config", "check"), ("train",))
            )
            if notes and shown == checked == "":  # files are no part of the configuration: check only notes them
                shown = checked = notes[0]
            if not shown == checked == trained:
                different.append(f"{text}\n  show:  {shown}\n  check: {checked}\n  train: {trained}")
            assert not trained or key.split(".")[-1] in trained or notes, trained
            (refused if trained else accepted).add(key)
    assert not different, "\n".join(different)
    assert len(refused) > 150 and len(accepted) > 60


def test_a_configuration_made_in_python_is_checked_too(tmp_path):
    cfg = config.from_dict(base(tmp_path))
    for change, message in (
        ({"seed": -1}, r"seed: must be in \[0"),
        ({"folder": None}, "folder: expected text, got null"),
        (
            {"masks": config.MasksConfig(specs=(config.MaskConfig(num_blocks=0),))},
            "masks.specs.0.num_blocks: must be in",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            Trainer(dataclasses.replace(cfg, **change))
    assert not (tmp_path / "run").exists()


def test_masks_of_every_group_of_clips_are_looked_at(tmp_path):
    """A group is the clips of one length in a batch; those of images are numbered from 8 on."""
    guided = {"compat": "published", "masks": {"specs": [{"motion_guided": True}]}, "img_masks": None}
    clips = str(tmp_path / "clips.csv")
    two = {"datasets": [clips] * 2, "dataset_fpcs": [4, 2]}
    stills = {"datasets": [clips] * 2, "dataset_fpcs": [1, 4]}
    for change, refused in (
        ({**guided, "data": {"batch_size": 3}}, "compat published: motion maps need a batch of 1 or of 2 .*, got 3"),
        ({**guided, "data": {"batch_size": 2}}, None),
        ({**guided, "compat": "intended", "data": {"batch_size": 3}}, None),
        ({**guided, "data": {"batch_size": 3, **two}}, None),  # how many clips of each length come differs
        ({**guided, "data": {"batch_size": 3, "datasets_weights": [1, 0], **two}}, "of 2 .*, got 3"),
        ({**guided, "data": {"batch_size": 3, "datasets_weights": [0, 1], **two}}, "of 1 .*, got 3"),
        ({"masks": {"specs": [{}] * 129}, "data": {"batch_size": 2}}, None),
        ({"masks": {"specs": [{}] * 129}, "data": {"batch_size": 2, **two}}, "masks.specs: from 1 to 256 .*, got 129"),
        ({"masks": {"specs": [{}] * 129}, "data": {"batch_size": 1, **two}}, None),  # never both in one batch
        ({"img_masks": {"specs": [{}] * 28}}, None),
        ({"img_masks": {"specs": [{}] * 29}}, "masks.specs: from 1 to 256 .*, got 29"),
        ({"img_data": None, "img_masks": None, "masks": {"specs": [{}] * 29}, "data": stills}, "got 29"),
    ):
        values = base(tmp_path)
        for section, changed in change.items():
            values[section] = {**values[section], **changed} if section == "data" else changed
        values["objectives"] = {"pred": {}}
        cfg = config.from_dict(values)
        if refused is None:
            check(cfg)
        else:
            with pytest.raises(ConfigError, match=refused):
                check(cfg)
