"""Every command and every block of Python in README.md, CONTRIBUTING.md and docs/ runs, in a folder of tiny examples.

A page's commands run in this process and in the order of the page. They run smaller than written: `SMALL` appends
options to a command or a script, `INSTEAD` replaces text of a Python block and `BEFORE` prepares names that it uses.
What needs a GPU, data or minutes is marked on the page, ``<!-- test: needs gpu -->`` before the block or
``<!-- test: long (synthetic_small.py) -->`` for what holds these words; its arguments are read by the command's own
parser, and names of make targets and modules must exist.
"""

import argparse
import ast
import contextlib
import glob
import importlib.util
import io
import json
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from tests.docs import pages
from tests.study import fake_study
from vjepa_fast import cli, config
from vjepa_fast.registry import KINDS, registry_of

PIECES = {path.relative_to(pages.ROOT).as_posix(): pages.pieces(path) for path in pages.PAGES}
# Words that stand for something on the pages.
WORDS = {
    "prepare (NAME|toys) (SOURCE|FOLDER)": "prepare folder films",
    "RECIPE": "ucf101_4gpu_baseline",
    "DIR": "runs/study",
    "FOLDER": "runs/mine",
    "MANIFEST": "train.csv",
    "SUITE": "motion8",
    "synthetic (mine|flicker)": "synthetic motion8",
    "--decoder mine": "--decoder pyav",
}
TINY = """data.crop_size=32 data.patch_size=8 data.dataset_fpcs=[4] data.batch_size=2 data.num_workers=0 data.fps=null
data.duration=null data.frame_sample_rate=1 model.model_name=vit_tiny model.embed_dim=48 model.depth=4 model.num_heads=2
model.pred_embed_dim=24 model.pred_depth=2 model.pred_num_heads=2 runtime.tensorboard=false runtime.dtype=float32
runtime.monitor_every=1 runtime.log_every=1"""
SETS = re.sub(r"(\S+)", r"--set \1", TINY)
VIEW = "--num-frames 4 --crop-size 32 --frame-step 1 --device cpu"
EPISODES = f"{VIEW} --way 2 --shots 1 --queries 1 --episodes 4 --workers 0"
TUNE = """--tune-epochs 1 --tune-batch 4 --meta-epochs 1 --meta-steps 1 --meta-way 2 --meta-shot 1 --meta-queries 1
--val-way 2 --val-queries 1"""
# How a command begins (a pattern) -> options that make it small; the longest that fits counts.
SMALL = {
    "vjepa-fast train": f"--max-steps 2 {SETS} --no-resume",
    "vjepa-fast train ucf101_4gpu_baseline --profile": f"--max-steps 4 {SETS} --set data.datasets=[train.csv]",
    "vjepa-fast train runs/mine": "--max-steps 2",
    "vjepa-fast train --videos": f"--minutes 0.01 --max-steps 2 {SETS} --no-resume",
    "vjepa-fast show": "--clips 1 --among 3 --device cpu",
    "vjepa-fast features": VIEW,
    "vjepa-fast probe": f"{EPISODES} --epochs 1",
    "vjepa-fast fewshot": EPISODES,
    "vjepa-fast fewshot .*--protocol": f"{EPISODES} --episodes 400",
    "vjepa-fast fewshot .*--method": f"{EPISODES} {TUNE}",
    "vjepa-fast geometry": f"{VIEW} --views 2",
    "vjepa-fast synthetic": "--train 2 --val 1 --test 1 --size 32 --frames 4 --workers 1",
    "vjepa-fast data manifest": "--val-fraction 0.25 --test-fraction 0.25",
    "vjepa-fast data check": "--frames 4 --speed 0.01",
    "vjepa-fast data show": f"{SETS} --clips 2",
    "vjepa-fast prepare": "--workers 1",
    "vjepa-fast study run": "--dry-run --variants baseline,ld --seeds 0 --published baseline",
    "vjepa-fast study report": "--csv small.csv",
    "vjepa-fast bench step": f"{SETS} --warmup 1 --repeats 1 --no-memory --providers vjepa_fast",
    "python benchmarks/bench_fewshot.py": "--episodes 4 --classes 6 --per-class 20 --widths 64 --repeats 1",
    "python benchmarks/bench_data.py": "--seconds 0.01 --only MJPEG",
    "python benchmarks/data_reading.py": "--clips 2 --size 32 --frames 4 --steps 1",
    "python benchmarks/mask_tokens.py": "--batch 2 --steps 2",
    "python benchmarks/frame_starts.py": "--only mpeg4",
    "python benchmarks/saved_bytes.py": "--batch 8 --ways fused",
    "python docs/tables.py": "--check",
    "python benchmarks/plot_step.py": "--page performance.md --png step.png",
}
# Page -> text of its Python blocks -> what runs in its place.
INSTEAD = {
    "docs/data.md": {
        'splits={"train": 1000, "test": 200}, workers=2': 'splits={"train": 2}, size=32, frames=4',
        "0], 16": "0], 4",
        "manifest, 16, 224, batch_size=8, workers=2": "manifest, 4, 32, batch_size=8, workers=0",
    },
    "docs/evaluation.md": {"way=5, shot=1, queries=15, episodes=1000": "way=2, shot=1, queries=1, episodes=4"},
    "docs/models.md": {
        '"vit_base", img_size=224, num_frames=16': "'vit_tiny', depth=4, img_size=32, num_frames=4, patch_size=8",
        "embed_dim=256, depth=8, num_heads=8": "embed_dim=24, depth=2, num_heads=2",
    },
    "docs/objectives.md": {"embed_dim=768": "embed_dim=8", "(8, 14, 14)": "(2, 4, 4)"},
    "docs/training.md": {'"folder=runs/mine"': '"folder=runs/python", *SMALL'},
}
# Page -> names that its Python blocks take for granted.
BEFORE = {
    "docs/training.md": """
SMALL = ["data.datasets=[train.csv]", "data.datasets_weights=null", *TINY]
SMALL += ["optimization.ipe=2", "optimization.epochs=1"]
""",
    "docs/data.md": "from vjepa_fast import config\ncfg = config.load('runs/mine/config.yaml')",
    "docs/fewshot.md": """
import numpy as np
from vjepa_fast.data import load_manifest
from vjepa_fast.evaluation import Features
novel = Features(np.random.default_rng(0).standard_normal((160, 8)).astype("float32"), np.arange(160) % 8, "novel")
novel_manifest, pretrain_manifest = load_manifest("test.csv"), load_manifest("train.csv")
""",
    "docs/geometry.md": """
from vjepa_fast.data import load_manifest
from vjepa_fast.evaluation import decode_clips
from vjepa_fast.models import load_encoder
encoder = load_encoder("runs/mine")
clips = decode_clips(load_manifest("test.csv"), num_frames=4, crop_size=32)
""",
    "docs/models.md": """
import torch
clip = torch.rand(2, 3, 4, 32, 32)
idx_0, idx_1, idx_pred = torch.arange(5).repeat(2, 1), torch.arange(7).repeat(2, 1), torch.arange(8, 20).repeat(2, 1)
""",
    "docs/objectives.md": """
import torch
e0 = e1 = torch.arange(20).repeat(2, 1)
m0 = m1 = torch.arange(20, 32).repeat(2, 1)
h = torch.randn(2, 32, 32)
z0, z1, p0, p1 = torch.randn(2, 20, 32), torch.randn(2, 20, 32), torch.randn(2, 12, 32), torch.randn(2, 12, 32)
""",
}


class Read(Exception):
    """The arguments were read; nothing else is to happen."""


@contextlib.contextmanager
def all_is_well(output):
    """A script may end by `sys.exit` with 0 or None."""
    try:
        yield
    except SystemExit as stop:
        if stop.code:
            raise AssertionError(output.getvalue()) from stop


def small(argv):
    """``argv`` with the options that make it small."""
    if argv[1:3] == ["study", "run"]:
        argv = [word.replace("runs/study", "runs/new") for word in argv]  # the other one is finished
    fits = [pattern for pattern in SMALL if re.match(pattern, " ".join(argv))]
    return [*argv, *(SMALL[max(fits, key=len)].split() if fits else ())]


def run(argv, read_only=False):
    """Run one command of ours in this process; ``read_only`` stops once its arguments are read."""
    program, *rest = argv
    with pytest.MonkeyPatch.context() as patch:
        if read_only:
            parse = argparse.ArgumentParser.parse_args

            def only_read(self, *args, **options):
                parse(self, *args, **options)
                raise Read

            patch.setattr(argparse.ArgumentParser, "parse_args", only_read)
        output = io.StringIO()
        with contextlib.suppress(Read), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            if program == "vjepa-fast":
                assert cli.main(rest) == 0, output.getvalue()
            else:
                patch.setattr(sys, "path", sys.path[:])
                patch.setattr(sys, "argv", rest)
                with all_is_well(output):
                    runpy.run_path(str(pages.ROOT / rest[0]), run_name="__main__")


def check(piece):
    """Run a command in the working directory, or read its arguments where it is marked."""
    text = piece.text
    for word, meant in WORDS.items():
        text = re.sub(rf"(?<!\S){word}(?!\S)", meant, text)
    argv = [w for word in pages.words(text) for w in (glob.glob(word) if "*" in word else [word])]
    program, *rest = argv
    options = {word for word in rest if word.startswith("--")}
    plain = [word for word in rest if re.fullmatch("[a-z]+", word)]
    if program == "make":
        done = subprocess.run(["make", "-n", *rest], cwd=pages.ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif program == "pip":
        extras = re.findall(r"\[(.+?)\]", argv[-1])
        project = (pages.ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert all(re.search(rf"^{e} = \[", project, re.MULTILINE) for e in extras)
    elif program == "torchrun" and rest:
        from torch.distributed.run import parse_args

        launched = parse_args(rest)
        assert (launched.module, launched.training_script) == (True, "vjepa_fast")
        run(["vjepa-fast", *launched.training_script_args], read_only=True)
    elif program == "vjepa-fast" and (piece.mark == "fragment" or piece.kind == "mention" and plain == rest):
        assert options <= set(re.findall(r"--[\w-]+", help_of(plain)))
    elif program == "vjepa-fast" or rest and rest[0].endswith(".py"):
        run(argv if piece.mark else small(argv), read_only=bool(piece.mark))
    elif rest:
        assert rest[0] == "-m"
        assert importlib.util.find_spec(rest[1]), rest[1]
        assert all((pages.ROOT / word).exists() for word in rest[2:] if word.endswith(".py"))


def help_of(words):
    """What ``vjepa-fast WORDS --help`` prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as stop:
        cli.main([*words, "--help"])
    assert stop.value.code == 0
    return output.getvalue()


def execute(piece, names):
    """Run a block of Python in ``names``; of a marked one its imports, of a fragment nothing."""
    text = piece.text
    for old, new in INSTEAD.get(piece.page, {}).items():
        text = text.replace(old, new)
    if piece.mark == "fragment":
        return
    tree = ast.parse(text)
    if piece.mark:
        tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    exec(compile(tree, str(piece), "exec"), names)


@pytest.fixture(autouse=True)
def as_before():
    """Commands set the number of threads, examples register things."""
    threads, kinds = torch.get_num_threads(), {kind: registry_of(kind) for kind in KINDS}
    before = {kind: set(entries) for kind, entries in kinds.items()}
    yield
    torch.set_num_threads(threads)
    for kind, entries in kinds.items():
        for name in set(entries) - before[kind]:
            del entries._entries[name]


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Videos, manifests, a trained run, a study and the other files that pages name, in one folder."""
    from vjepa_fast.data.synthetic import render_suite

    folder = tmp_path_factory.mktemp("examples")
    render_suite("motion8", folder, splits={"train": 32, "val": 16, "test": 16}, size=32, frames=8)
    rows = [line.split() for line in (folder / "train.csv").read_text().splitlines()]
    for path, label in rows:
        for films in ("videos", "films"):
            (folder / films / label).mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / path, folder / films / label)
    shutil.copy(folder / rows[0][0], folder / "film.mp4")
    (folder / "mix").mkdir()
    for name, part in {
        "a": "train",
        "b": "train",
        "c": "train",
        "base": "train",
        "novel": "test",
        "k400": "test",
        "mix/a": "train",
    }.items():
        shutil.copy(folder / f"{part}.csv", folder / f"{name}.csv")
    (folder / "my.yaml").write_text(next(p.text for p in PIECES["docs/config.md"] if p.kind == "yaml"))
    (folder / "pretrain-256px-16f.yaml").write_text(yaml.safe_dump(published()))
    fake_study.make_study(folder / "runs/study", variants=("baseline", "ld"), seeds=(0, 1), samples=16)
    shutil.copy(pages.ROOT / "docs/performance.md", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command = "vjepa-fast train ucf101_4gpu_baseline --set data.datasets=[train.csv] --folder runs/mine"
        run(small(command.split()))
    shutil.copytree(folder / "runs/mine", folder / "runs/demo/baseline")
    return folder


def published():
    """A configuration of the published runs, as nested sections."""
    flat = json.loads((pages.ROOT / "tests/goldens/published_recipes.json").read_text())["base"]
    nested = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return nested


@pytest.mark.parametrize("page", [name for name, found in PIECES.items() if found])
def test_page_does_what_it_says(page, examples, tmp_path, monkeypatch):
    shutil.copytree(examples, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names, broken = {"TINY": TINY.split()}, []
    exec(BEFORE.get(page, ""), names)
    for piece in PIECES[page]:
        try:
            if piece.kind == "python":
                execute(piece, names)
            elif piece.kind == "yaml":
                (tmp_path / "page.yaml").write_text(piece.text)
                config.load("page.yaml")
            else:
                check(piece)
        except (Exception, SystemExit) as error:
            broken.append(f"{piece}\n    {type(error).__name__}: {error}")
    assert not broken, "\n".join(broken)


def test_contributing_shows_each_kind_once():
    before = {kind: set(registry_of(kind)) for kind in KINDS}
    names = {"__name__": __name__}
    for piece in PIECES["CONTRIBUTING.md"]:
        if piece.kind == "python":
            exec(piece.text, names)
    added = {kind: set(registry_of(kind)) - before[kind] for kind in KINDS}
    assert [len(new) for new in added.values()] == [1] * len(KINDS), added
