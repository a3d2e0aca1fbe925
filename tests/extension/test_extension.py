"""A package outside of the source tree adds one of each kind by registration alone, found through its entry point.

Seven of its modules are the examples of CONTRIBUTING.md as they stand there; the objective is swirl.py, beside this.
No file of vjepa_fast is touched or patched: everything runs in processes of its own that see the package installed.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import av
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
HERE = pathlib.Path(__file__).parent
NAMES = {
    "objective": "swirl",
    "mask strategy": "tubes",
    "decoder": "in_memory",
    "data set": "toys",
    "synthetic suite": "flicker",
    "attention backend": "one_by_one",
    "probe": "centroid",
    "evaluation task": "hmdb51",
}
CONTRACTS = {
    "swirl": ["tests/objectives/test_contract.py", "tests/objectives/test_packed.py"],
    "tubes": ["tests/masks/test_strategies.py"],
    "in_memory": ["tests/data/test_decoders.py"],
    "toys": ["tests/data/test_prepare.py"],
    "flicker": ["tests/data/test_synthetic.py"],
    "one_by_one": ["tests/layers/test_attention.py"],
    "centroid": ["tests/evaluation/test_probes.py"],
    "hmdb51": ["tests/evaluation/test_tasks.py"],
}
NEARLY = {  # --set -> what is suggested
    "masks.strategy=tubs": "tubes",
    "data.decoder=in_memry": "in_memory",
    "runtime.attention=one_by_on": "one_by_one",
    "objectives.swirk={}": "swirl",
    "masks.options.shar=0.5": "share",
}
RECIPE = """
data: {datasets: [clips/train.csv], dataset_fpcs: [4], batch_size: 2, crop_size: 32, patch_size: 8, decoder: in_memory}
masks: {strategy: tubes, options: {share: 0.6}}
model: {embed_dim: 24, depth: 4, num_heads: 2, pred_embed_dim: 12, pred_depth: 2, pred_num_heads: 1}
objectives: {pred: {}, swirl: {coeff: 0.5, scale: 2.0}}
optimization: {epochs: 1, ipe: 3, warmup: 0.0}
runtime: {device: cpu, dtype: float32, attention: one_by_one, log_every: 1, tensorboard: false}
folder: run
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder like site-packages that holds the installed package, and an empty folder to work in."""
    site = tmp_path_factory.mktemp("site")
    package = site / "their_package"
    package.mkdir()
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE)
    others = [block for block in blocks if "@objective(" not in block]
    assert len(others) == 7
    for n, block in enumerate(others):
        (package / f"part{n}.py").write_text(block)
    (package / "swirl.py").write_text((HERE / "swirl.py").read_text())
    modules = ["swirl", *(f"part{n}" for n in range(7))]
    (package / "__init__.py").write_text("".join(f"from their_package import {m}\n" for m in modules))
    info = site / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vjepa_fast.plugins]\ntheirs = their_package\n")
    return site


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    (work / "recipe.yaml").write_text(RECIPE)
    return work


@pytest.fixture(scope="module")
def run(site, work):
    def run(*command, cwd=work, ok=True):
        path = os.pathsep.join([str(site), str(ROOT)])
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        done = subprocess.run([sys.executable, "-m", *command], env=env, cwd=cwd, capture_output=True, text=True)
        assert (done.returncode == 0) == ok, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def film(path):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 32
        for grey in range(0, 240, 40):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), grey, np.uint8), "rgb24")))
        out.mux(stream.encode())


COMMANDS = """
import contextlib, io, json, sys
from vjepa_fast.cli import main
for name, command in json.loads(sys.argv[1]).items():
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(command)
    print(json.dumps([name, code, said.getvalue()]))
"""


@pytest.fixture(scope="module")
def said(run, work):
    """(exit code, output) of all commands of this file, by name, from one process."""
    parts = ["--train", "clips/train.csv", "--val", "clips/val.csv", "--test", "clips/test.csv", "--device", "cpu"]
    sizes = ["--train", "8", "--val", "4", "--test", "4", "--size", "32", "--frames", "8", "--workers", "1"]
    commands = {
        "render": ["synthetic", "flicker", "clips", *sizes],
        "prepare": ["prepare", "toys", "toys", "--out", "prepared", "--workers", "1"],
        "refuse": ["prepare", "toys", "twice", "--out", "refused", "--workers", "1"],
        "check": ["config", "check", "recipe.yaml"],
        "train": ["train", "recipe.yaml"],
        "show": ["config", "show", "run"],
        "probe": ["probe", "run", *parts, "--probe", "centroid"],
        "task": ["probe", "run", *parts, "--probe", "centroid", "--task", "hmdb51"],
        "config list": ["config", "list"],
        "doctor": ["doctor"],
        **{change: ["config", "check", "recipe.yaml", "--set", change] for change in NEARLY},
    }
    (work / "toys").mkdir()
    (work / "toys" / "train.txt").write_text("ball/1\ncar/2\n")
    (work / "toys" / "test.txt").write_text("ball/3\n")
    for number in (1, 2, 3):
        film(work / "toys" / f"{number}.mp4")
    shutil.copytree(work / "toys", work / "twice")
    (work / "twice" / "test.txt").write_text("ball/3\ncar/1\n")
    (work / "commands.py").write_text(COMMANDS)
    lines = run("commands", json.dumps(commands)).splitlines()
    return {name: (code, text) for name, code, text in map(json.loads, lines)}


def test_every_kind_is_listed(said):
    for command in ("config list", "doctor"):
        for kind, name in NAMES.items():
            assert re.search(rf"\b{name}\b", said[command][1]), f"{command} does not list the {kind} {name}"


def test_each_is_usable_by_name_from_yaml_and_command_line(said, work):
    codes = {**dict.fromkeys(said, 0), **dict.fromkeys(("task", "refuse", *NEARLY), 2)}
    assert {name: code for name, (code, _) in said.items()} == codes, said
    assert "usable" in said["check"][1]
    assert "twice/test.txt:2: 1 is in train as well" in said["refuse"][1]
    rows = [line.split() for line in (work / "prepared" / "train.csv").read_text().splitlines()]
    assert [(pathlib.Path(path).name, label) for path, label in rows] == [("1.mp4", "0"), ("2.mp4", "1")]
    assert json.loads((work / "prepared" / "classes.json").read_text()) == ["ball", "car"]
    assert "swirl" in said["train"][1]
    assert (work / "run" / "checkpoints" / "step-00000003.pt").is_file()
    for words in ("decoder: in_memory", "strategy: tubes", "share: 0.6", "attention: one_by_one", "scale: 2.0"):
        assert words in said["show"][1]
    assert "centroid" in said["probe"][1]
    assert "51" in said["task"][1]  # it wants the task's classes


def test_a_name_that_is_nearly_theirs_is_answered_with_it(said):
    for change, known in NEARLY.items():
        assert re.fullmatch(rf"error: .*did you mean {known}\?.*\n", said[change][1]), said[change]


def test_the_objective_has_its_published_keys_and_its_kernel(site):
    path = os.pathsep.join([str(site), str(ROOT)])
    done = subprocess.run(
        [sys.executable, str(HERE / "use_swirl.py")],
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_contract_tests_meet_all_of_them(run, work):
    files = [file for files in CONTRACTS.values() for file in files]
    chosen = " or ".join(CONTRACTS)
    report = work / "contracts.xml"
    run(
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        f"--junitxml={report}",
        "-k",
        chosen,
        *files,
        cwd=ROOT,
    )
    met = re.findall(
        r'<testcase classname="([\w.]+)" name="([^"]+)"[^>]*/>', report.read_text()
    )  # neither failed nor skipped
    for name, files in CONTRACTS.items():
        for file in files:
            module = file.removesuffix(".py").replace("/", ".")
            assert any(where == module and name in test for where, test in met), f"{file} has no test of {name}"
