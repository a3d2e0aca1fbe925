"""The command line as a user sees it: subprocesses, exit codes, one-line errors."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vjepa_fast import cli, config
from vjepa_fast.errors import UserError
from vjepa_fast.registry import KINDS, registry_of

ROOT = Path(__file__).parents[2]


def vjepa_fast(*args, cwd=None, **kwargs):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "vjepa_fast", *map(str, args)],
        cwd=cwd,
        env=env,
        text=True,
        capture_output=True,
        timeout=120,
        **kwargs,
    )


def test_help_is_fast_and_lists_every_command():
    times = []
    for _ in range(3):
        before = os.times()
        done = vjepa_fast("--help")
        after = os.times()
        assert done.returncode == 0
        # processor time, so that a busy machine does not count; where the system does not tell it, elapsed time
        used = sum(after[2:4]) - sum(before[2:4])
        times.append(used if os.name == "posix" else after.elapsed - before.elapsed)
    assert 0 < min(times) < 0.5
    for name in cli.COMMANDS:
        assert re.search(rf"^  {name} +\w", done.stdout, re.M)


def test_help_imports_no_heavy_module():
    code = (
        "import sys; from vjepa_fast.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'numpy', 'yaml', 'av', 'rich', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as info:
        cli.main([name, "--help"])
    assert info.value.code == 0
    assert f"usage: vjepa-fast {name}" in capsys.readouterr().out


def test_commands_are_discovered():
    assert {"train", "config"} <= set(cli.COMMANDS)
    for name, module in cli.COMMANDS.items():
        assert module == f"vjepa_fast.cli.{name}"


def test_version():
    from vjepa_fast import __version__

    done = vjepa_fast("--version")
    assert (done.returncode, done.stdout) == (0, f"vjepa-fast {__version__}\n")


def test_errors_of_a_process_are_one_line_on_stderr():
    done = vjepa_fast("train", "mixed_4gpu_baseline", "--set", "optimization.lrr=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --set optimization.lrr=1: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["trian"], ["trian: unknown command; commands: ", "did you mean train?"]),
        (["train"], ["name a recipe, a YAML file or a run folder, or --videos DIR", "vjepa-fast train --help"]),
        (["train", "x.yaml", "--wrong"], ["unrecognized arguments: --wrong"]),
        (["config", "shwo", "x"], ["argument ACTION: invalid choice: 'shwo'"]),
        (["train", "mixed_4gpu_baseline", "--max-steps", "0"], ["--max-steps: 0 is not a positive number"]),
        (["train", "mixed_4gpu_baseline", "--set", "optimization.lrr=1"], ["optimization.lrr", "did you mean lr?"]),
        (["train", "mixed_4gpu_baseline", "--device", "tpu"], ["--device tpu: runtime.device: unknown value 'tpu'"]),
        (
            ["train", "mixed_4gpu_baseline", "--set", "lr=1"],
            ["--set lr=1: lr: unknown key", "did you mean optimization.lr?"],
        ),
        (["train", "mixed_4gpu_baseline", "--set", "optimization.batch_sise=1"], ["did you mean data.batch_size?"]),
        (
            ["train", "mixed_4gpu_baseline", "--set", "optimization.lr=-1"],
            ["error: --set optimization.lr=-1: optimization.lr: must"],
        ),
        (
            ["train", "mixed_4gpu_baseline", "--set", "model.embed_dim=7", "--set", "seed=1"],
            ["error: --set model.embed_dim=7: "],
        ),
        (
            ["train", "mixed_4gpu_baseline", "--set", "model.model_name=vit_x"],
            ["error: --set model.model_name=vit_x: "],
        ),
        (
            ["train", "synthetic_small", "--batch-size", "1", "--set", "method=levjepa"],
            ["error: --set method=levjepa: "],
        ),
        (["train", "mixed_4gpu_baseline", "--lr", "x"], ["--lr: x is not a positive number"]),
        (["train", "--videos", "nowhere", "--out", "nowhere-run"], ["error: nowhere: no such folder"]),
        (["train", "nowhere/none.yaml"], ["nowhere/none.yaml: no such file"]),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(argv, parts, capsys):
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (UserError("clip.mp4: broken\nbeyond repair"), 2, "error: clip.mp4: broken beyond repair\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), 2, "error: runs/a: No space left on device\n"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/a"), 2, "error: runs/a: Permission denied\n"),
    ],
)
def test_exceptions_become_exit_codes(monkeypatch, capsys, raised, code, message):
    from vjepa_fast.cli import train

    def run(args):
        raise raised

    monkeypatch.setattr(train, "run", run)
    assert cli.main(["train", "x.yaml"]) == code
    assert capsys.readouterr().err == message


def test_a_defect_keeps_its_traceback(monkeypatch):
    from vjepa_fast.cli import train

    def run(args):
        raise RuntimeError("a defect")

    monkeypatch.setattr(train, "run", run)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["train", "x.yaml"])


def test_config_list_and_show(tmp_path, capsys):
    names = vjepa_fast("config", "list", "--recipes").stdout.split()
    assert names == config.list_recipes() and len(names) >= 35
    overrides = ["optimization.lr=3e-4", "seed=7"]
    assert cli.main(["config", "show", "mixed_4gpu_fwm_hw_ld", "--set", overrides[0], "--set", overrides[1]]) == 0
    path = tmp_path / "shown.yaml"
    path.write_text(capsys.readouterr().out)
    assert config.load(path) == config.load("mixed_4gpu_fwm_hw_ld", overrides)


def test_config_refuses_unknown_objective_and_field(capsys):
    assert cli.main(["config", "show", "mixed_4gpu_baseline", "--set", "objectives.dleta={}"]) == 2
    err = capsys.readouterr().err
    assert "error: --set objectives.dleta={}: objectives.dleta: unknown" in err and "did you mean delta" in err
    assert cli.main(["config", "check", "mixed_4gpu_baseline", "--set", "objectives.context.cooeff=1"]) == 2
    err = capsys.readouterr().err
    assert "objectives.context.cooeff" in err and "did you mean coeff" in err and err.count("\n") == 1


@pytest.mark.parametrize("action", ["show", "check"])
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("runtime.attention=foo", ["runtime.attention: unknown attention backend 'foo'; accepted: auto, sdpa, "]),
        ("masks.specs.0.num_blocks=20000", ["masks.specs.0.num_blocks: must be in [1, 16383], got 20000"]),
        ("data.decoder=pyva", ["data.decoder: unknown decoder 'pyva'", "did you mean pyav?"]),
        ("masks.strategy=block", ["masks.strategy: unknown mask strategy 'block'", "did you mean blocks?"]),
        ("model.model_name=vit_bsae", ["model.model_name: unknown 'vit_bsae'", "did you mean"]),
        ("objectives.kinematic={}", ["objectives.kinematic: no gradient can reach this term", "target.mode: online"]),
        ("model.predict_all=false", ["objectives.context: needs predicted context tokens; set model.predict_all=true"]),
    ],
)
def test_config_refuses_what_train_would(action, change, parts, capsys):
    assert cli.main(["config", action, "mixed_4gpu_baseline", "--set", change]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and all(part in captured.err for part in parts)


def test_config_check_builds_the_full_size_and_notes_missing_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["config", "check", "mixed_4gpu_fwm_hw_ld"]) == 0
    usable, note = capsys.readouterr().out.splitlines()
    encoder = float(re.search(r"encoder (\d+\.\d) M", usable).group(1))
    assert 85 < encoder < 90  # ViT-B/16
    assert note.startswith("note: train would refuse the data: ucf101.csv: no such manifest")
    (tmp_path / "clips.csv").write_text("clip.mp4 0\n")
    values = ("data.datasets=clips.csv", "data.datasets_weights=null", "data.dataset_fpcs=16")
    change = [part for value in values for part in ("--set", value)]
    assert cli.main(["config", "check", "mixed_4gpu_fwm_hw_ld", *change]) == 0
    assert "note: " not in capsys.readouterr().out


def test_config_check_names_the_command_of_a_shard_and_does_not_run_it(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(f"data: {{datasets: ['pipe:touch {tmp_path}/ran']}}\n")
    for action in ("check", "show"):
        assert cli.main(["config", action, str(tmp_path / "r.yaml")]) == 0
        out = capsys.readouterr().out
        assert action == "show" or f"note: data.datasets: train would run pipe:touch {tmp_path}/ran" in out
    assert not (tmp_path / "ran").exists()


def test_config_list_names_the_entries_of_every_kind(capsys):
    assert cli.main(["config", "list"]) == 0
    recipes, kinds = capsys.readouterr().out.split("\n\n")
    *lines, _ = recipes.splitlines()
    assert sorted(line[2:].split()[0] for line in lines) == config.list_recipes()
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines), "every recipe has a line"
    own = [line[2:].split()[0] for line in lines if line.startswith("* ")]
    assert own[0] == "own_videos" and {"laptop_vjepa", "levjepa_small"} < set(own) and "(own data: " in lines[0]
    listed = dict(line.split(": ") for line in kinds.splitlines())
    assert list(listed) == list(KINDS)
    assert all(listed[kind].split(", ") == sorted(registry_of(kind)) for kind in KINDS)


def test_closed_pipe_is_no_error():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        f"{sys.executable} -m vjepa_fast config list | head -1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        env=env,
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr and done.stdout.count("\n") == 1


@pytest.mark.parametrize("name", ["2024-01-01", "001", "a #2", "a: b", "null", "[x]", "\u00e9 \U0001f3ac", "a\u2028b"])
def test_a_run_folder_may_have_any_name(name, tmp_path, monkeypatch):
    """It is no YAML, whatever it looks like: for a new run, and for one that goes on."""
    from vjepa_fast.cli import train

    folders = []
    monkeypatch.setattr(train, "_train", lambda args, cfg, overrides: folders.append(cfg.folder) or 0)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "synthetic_small", "--folder", name]) == 0
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.yaml").write_text(config.dump_yaml(config.load("synthetic_small")), encoding="utf-8")
    assert cli.main(["train", name]) == 0
    assert folders == [name, name]


def test_missing_manifest_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "mixed_4gpu_baseline", "--folder", "run", "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ucf101.csv: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
