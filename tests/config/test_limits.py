"""Recipes that ask for memory or time without end, or hold what Python's own readers stumble over."""

import dataclasses
import time

import pytest

from vjepa_fast import config
from vjepa_fast.config import text
from vjepa_fast.errors import ConfigError

LAUGHS = "".join(f"  {b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
MERGES = "".join(f"  {b}: &{b} {{<<: [{', '.join(['*' + a] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi"))
HOSTILE = {
    "aliases": ("x:\n  a: &a [x, x, x, x, x, x, x, x, x]\n" + LAUGHS, "more than 50000 values"),
    "merges": ("x:\n  a: &a {k: 1}\n" + MERGES, "more than 50000 values"),
    "many": ("data: {datasets: [" + "a," * 200_000 + "]}", "more than 50000 values"),
    "itself": ("masks: {options: &a {x: *a}}", "an alias within what it stands for"),
    "lists": ("data: " + "[" * 10_000, "more than 32 sections or lists in one another"),
    "dashes": ("data:\n  " + "- " * 10_000 + "x", "more than 32 sections or lists in one another"),
    "sections": ("data: " + "{a: " * 10_000, "more than 32 sections or lists in one another"),
    "long": ("folder: " + "x" * 1_000_001, "more than 1000000 characters"),
    "decimal": ("seed: " + "9" * 5000, "a number of 5000 characters"),
    "hexadecimal": ("seed: 0x" + "f" * 100_000, "a number of 100002 characters"),
    "sexagesimal": ("seed: " + ":".join(["59"] * 20_000), "a number of 59999 characters"),
    "month": ("seed: 2001-13-45", "no timestamp: '2001-13-45'"),
    "prefix": ("seed: 0x_", "no int: '0x_'"),
    "tag": ("seed: !!bool abc", "no bool: 'abc'"),
    "infinity": ("optimization: {lr: 1e999}", "optimization.lr: expected a number, got inf"),
    "nul": ('folder: "a\\0b"', "folder: expected text"),
    "surrogate": ('folder: "\\ud800"', "folder: expected text"),
    "depth": ("model: {depth: 1000000000}", "model.depth: must be at most 1000, got 1000000000"),
    "workers": ("data: {num_workers: 1000000}", "data.num_workers: must be at most 1000"),
    "epochs": ("optimization: {epochs: 100000000000000000000}", "optimization.epochs: must be at most 1000000000"),
    "log_every": ("runtime: {log_every: 100000000000000000000}", "runtime.log_every: must be at most 9007199254740992"),
    "fpcs": ("data: {dataset_fpcs: [16, 1000000000000]}", "data.dataset_fpcs: must be at most 100000, got 1000000"),
    "masks": ("masks: {specs: [" + "{}, " * 300 + "]}", "masks.specs: must name at least one mask and at most 256"),
    "python": ("folder: !!python/object/apply:os.system [id]", "could not determine a constructor"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refused_at_once_in_one_line_that_names_the_file(tmp_path, name):
    content, words = HOSTILE[name]
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    begin = time.process_time()
    with pytest.raises(ConfigError) as error:
        config.load(file)
    assert time.process_time() - begin < 8
    said = str(error.value)
    assert said.startswith(f"{file}: ") and words in said and "\n" not in said and len(said) < 700


def test_aliases_within_the_limits_are_read(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("data: &d {crop_size: 64}\nimg_data: {<<: *d, batch_size: 3, dataset_fpcs: [1]}\n")
    cfg = config.load(file)
    assert (cfg.img_data.crop_size, cfg.img_data.batch_size) == (64, 3)
    assert text.parse("a: &x [1, 2]\nb: [*x, *x]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


def test_a_long_chain_of_bases(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.yaml").write_text(f"base: {i + 1}.yaml\n")
    (tmp_path / "40.yaml").write_text("seed: 1\n")
    assert config.load(tmp_path / "30.yaml").seed == 1
    with pytest.raises(ConfigError, match="more than 16 files"):
        config.load(tmp_path / "0.yaml")


def test_names_that_are_not_utf8_survive_a_run_folder(tmp_path):
    file = tmp_path / "recipe.yaml"
    cfg = dataclasses.replace(config.load(None), folder="runs/a\udcff")
    file.write_text(config.dump_yaml(cfg))
    assert config.load(file).folder == "runs/a\udcff"


def test_a_long_value_is_cut_in_the_message(tmp_path, capsys):
    from vjepa_fast.cli import main

    file = tmp_path / "recipe.yaml"
    file.write_text("runtime: {device: " + "x" * 500_000 + "}")
    assert main(["config", "show", str(file)]) == 2
    said = capsys.readouterr().err
    assert "unknown value 'xxx" in said and len(said) < 600 and said.count("\n") == 1


def test_an_error_shows_no_control_characters(tmp_path, capsys):
    from vjepa_fast.cli import main

    assert main(["config", "show", str(tmp_path / "a\x1b[31m\u202eb.yaml")]) == 2
    said = capsys.readouterr().err
    assert "a\\x1b[31m\\u202eb.yaml" in said


def test_what_a_caller_does_to_a_value_is_not_there_when_the_text_is_read_again():
    first = text.parse("a: &x [1, 2]\nb: *x\n")
    first["a"].append(3)
    assert text.parse("a: &x [1, 2]\nb: *x\n") == {"a": [1, 2], "b": [1, 2]}
