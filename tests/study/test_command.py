"""``vjepa-fast study``: its subcommands, and the arguments of ``study run``."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from vjepa_fast.cli import main, study

ROOT = Path(__file__).parents[2]


def command(folder, *more) -> int:
    return main(["study", "run", str(folder / "s"), "--device", "cpu", *more])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--variants", "basline"], "basline: no variant"),
        (["--regimes", "double"], "--regimes: 'double'"),
        (["--regimes", ","], "nothing to run"),
        (["--seeds", "4..0"], "--seeds: '4..0'"),
        (["--seeds", "a"], "--seeds: 'a'"),
        (["--compat", "both"], "--compat: 'both'"),
        (["--published", "none"], "none: no variant"),
        (["--scale", "0"], "--scale"),
        (["--jobs", "0"], "--jobs: 0"),
        (["--sizes", "motion8.tests=3"], "--sizes motion8.tests=3"),
        (["--sizes", "order.val=0"], "no clips for order.val"),
        (["--set", "objectives.hw.coeff=2"], "the study sets objectives.hw.coeff itself"),
        (["--set", "optimization.lrr=2"], "unknown key"),
        (["--evaluate", "motion9"], "--evaluate: 'motion9'"),
        (["--data", "ssv2"], "--data: belongs to --suite paper, not to synthetic"),
        (["--suite", "paper", "--data", "ssv2="], "--data ssv2=: expected NAME=VALUE"),
        (["--suite", "paper", "--data", "nothing"], "--data nothing: no such folder"),
        (["--suite", "paper", "--sizes", "dive.val=9"], "--sizes: belongs to --suite synthetic"),
        (["--compat", "published", "--variants", "amg", "--set", "data.batch_size=5"], "amg-single-published-s0: amg"),
    ],
)
def test_wrong_arguments_name_the_argument_and_write_nothing(tmp_path, more, message, capsys, monkeypatch):
    monkeypatch.setattr("vjepa_fast.study.run.runner.run_study", None)  # accepted arguments start no study
    assert command(tmp_path, *more) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "s").exists()


def test_dry_run_lists_and_writes_nothing(tmp_path, capsys):
    assert command(tmp_path, "--dry-run", "--seeds", "0..4", "--published", "baseline,kinematic", "--scale", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{5 * (1 + 2 * 23)} runs, {5 * (1 + 2 * 23)} to do" and len(lines) == 236
    assert any("kinematic-mixed-published-s4" in line and "240 steps" in line for line in lines)
    assert not (tmp_path / "s").exists()


def test_methods_that_nobody_published_run_as_intended_only(tmp_path, capsys):
    command(tmp_path, "--dry-run", "--seeds", "0", "--regimes", "single", "--compat", "intended,published")
    keys = [line.split()[2] for line in capsys.readouterr().out.splitlines()[:-1]]
    assert "pixels-single-intended-s0" in keys and "pixels-single-published-s0" not in keys
    assert "fwm_hw-single-published-s0" in keys and len(keys) == 1 + 21 + 20


def test_only_published_runs_with_compat_published(tmp_path, capsys):
    command(tmp_path, "--dry-run", "--seeds", "0", "--regimes", "single", "--compat", "published", "--variants", "hw")
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()[:-1]] == [
        "random_init-none-intended-s0",
        "hw-single-published-s0",
    ]


def test_subcommands_are_found_and_help_is_light():
    there = [p.stem.removeprefix("_study_") for p in (ROOT / "vjepa_fast/cli").glob("_study_*.py")]
    assert sorted(study.SUBCOMMANDS) == sorted(there) and "claims" in there
    code = (
        "import sys; from vjepa_fast.cli import main\n"
        "try: main(['study', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'yaml', 'rich', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    assert all(name in done.stdout for name in there)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required"),
        (["claim"], "invalid choice: 'claim'"),
        (["claims", "--json", "/nowhere/c.json"], "/nowhere/c.json: cannot be written"),
        (["claims", "--study", "/nowhere"], "/nowhere/study.json: not found"),
    ],
)
def test_wrong_usage(argv, message, capsys):
    assert main(["study", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("pool", ("Task", "run_tasks", "FORMAT")),
        ("launch", ("Lock", "run_processes", "run_slurm", "slots")),
        ("runner", ("Grid", "read_plan", "run_study")),
    ],
)
def test_modules_of_the_first_version_still_have_their_names(module, names):
    with pytest.warns(DeprecationWarning, match=f"study.{module} is"):
        old = importlib.reload(importlib.import_module(f"vjepa_fast.study.{module}"))
    assert all(hasattr(old, name) for name in names)
