"""One writer per run folder; ranks end with their launcher; a folder that goes is noticed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vjepa_fast import config as configs
from vjepa_fast import locks
from vjepa_fast.errors import ConfigError, DataError, TrainingError, UserError
from vjepa_fast.trainer import checkpoint, train
from vjepa_fast.trainer.writer import NAME

from .conftest import ROOT, replaced, rows, start, tiny, wait_for


def test_a_second_trainer_is_refused_and_changes_nothing(cfg):
    seen = []

    def second(row):
        before = sorted(os.listdir(cfg.folder))
        with pytest.raises(UserError, match=rf"run: in use by process {os.getpid()} on .*--folder") as error:
            train(cfg, resume=False)
        assert "\n" not in str(error.value)
        assert sorted(os.listdir(cfg.folder)) == before
        seen.append(row["step"])

    train(cfg, max_steps=3, on_log=second)
    assert seen == [1, 2, 3] and [r["step"] for r in rows(cfg.folder)] == [1, 2, 3]
    assert not (Path(cfg.folder) / NAME).exists()
    assert train(cfg).step == 12  # free again


def test_the_folder_of_a_killed_run_is_taken_over_with_a_word(cfg, capfd):
    folder = Path(cfg.folder)
    folder.mkdir()
    code = "import sys; from vjepa_fast.locks import Lock; assert Lock(sys.argv[1]).take()"
    subprocess.run([sys.executable, "-c", code, str(folder / NAME)], check=True)
    train(cfg, max_steps=1)
    assert "taken over from process" in capfd.readouterr().err


def test_a_run_that_does_not_start_leaves_no_folder(cfg, tmp_path):
    bad = replaced(cfg, "data", datasets=(str(tmp_path / "none.csv"),))
    with pytest.raises((ConfigError, DataError)):
        train(bad)
    assert not Path(cfg.folder).exists()


def test_a_folder_taken_over_meanwhile_is_not_written_to(cfg):
    lock = Path(cfg.folder) / NAME

    def overtaken(row):
        if row["step"] == 3:
            lock.write_text(json.dumps({"token": "other", "pid": os.getppid(), **locks.place()}))

    with pytest.raises(TrainingError, match="took this run folder over"):
        train(cfg, on_log=overtaken)
    assert [r["step"] for r in rows(cfg.folder)] == [1, 2, 3]
    assert json.loads(lock.read_text())["token"] == "other"


def test_a_lock_that_someone_removes_comes_back(cfg):
    lock = Path(cfg.folder) / NAME
    there = []

    def remove(row):
        there.append(lock.exists())
        lock.unlink()

    assert train(cfg, max_steps=3, on_log=remove).step == 3
    assert there == [True] * 3


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_folder_that_is_moved_away_ends_the_run_and_does_not_come_back(cfg, tmp_path, monkeypatch, log_every):
    folder, save = Path(cfg.folder), checkpoint.save

    def move(*args):
        found = save(*args)
        if args[1]["step"] == 4:
            folder.rename(tmp_path / "moved")
        return found

    monkeypatch.setattr(checkpoint, "save", move)
    with pytest.raises(TrainingError, match="run: the run folder was moved or removed"):
        train(replaced(cfg, "runtime", log_every=log_every, tensorboard=log_every == 1))
    assert not folder.exists()
    monkeypatch.undo()
    whole = train(tiny(cfg.data.datasets[0], tmp_path / "whole", runtime={"log_every": log_every}))
    moved = train(replaced(configs.load(str(tmp_path / "moved"), [f"folder={tmp_path / 'moved'}"]), "runtime"))
    assert rows(moved.folder) == rows(whole.folder)


LAUNCHER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-m", "vjepa_fast", "train", sys.argv[1]], stderr=open(sys.argv[2], "w")).wait()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_rank_saves_and_ends_when_its_launcher_is_gone(cfg, tmp_path):
    cfg = replaced(cfg, "optimization", epochs=5000)
    recipe, log, folder = tmp_path / "c.yaml", tmp_path / "log", Path(cfg.folder)
    recipe.write_text(configs.dump_yaml(cfg))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(recipe), str(log)], env=env)
    wait_for(lambda: (folder / "metrics.jsonl").exists() and len(rows(folder)) > 2, launcher)
    pid = json.loads((folder / NAME).read_text())["pid"]
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    try:
        wait_for(lambda: not locks.alive(pid), seconds=30)
    except AssertionError:
        os.kill(pid, signal.SIGKILL)
        raise
    assert "the launcher of this process is gone" in log.read_text()
    assert checkpoint.load(folder)["step"] == rows(folder)[-1]["step"]
    assert not (folder / NAME).exists()


def test_the_command_says_who_holds_the_folder(cfg):
    lock = locks.Lock(Path(cfg.folder) / NAME)
    assert lock.take()
    process = start(cfg)
    out, err = process.communicate(timeout=60)
    lock.release()
    assert process.returncode == 2 and not out
    assert err.startswith(f"error: {cfg.folder}: in use by process {os.getpid()}") and err.count("\n") == 1
