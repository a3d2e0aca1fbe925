"""Checkpoints written beside training: what they hold, what goes wrong in their thread, and who waits for whom."""

import os
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

from tests import forks
from tests.trainer.test_checkpoint import state
from vjepa_fast import config as configs
from vjepa_fast.config import schema
from vjepa_fast.errors import TrainingError, UserError
from vjepa_fast.metrics import hardware
from vjepa_fast.models import digests
from vjepa_fast.trainer import checkpoint, saving, train
from vjepa_fast.trainer.distributed import Distributed
from vjepa_fast.trainer.writer import RunLock

from .conftest import replaced, rows, tiny, wait_for


def saver(folder, background=True, keep=9) -> saving.Saver:
    run = schema.RuntimeConfig(async_save=background, keep_checkpoints=keep)
    return saving.Saver(folder, Distributed(), RunLock(folder), run)


def held(monkeypatch, until: threading.Event) -> list[int]:
    """Let every save wait for ``until`` before it reads what it writes; the steps whose saves have begun."""
    begun, save = [], checkpoint.save

    def late(folder, content, *more):
        begun.append(content["step"])
        assert until.wait(60)
        return save(folder, content, *more)

    monkeypatch.setattr(checkpoint, "save", late)
    return begun


def test_a_copy_is_of_its_own_and_shares_as_the_state_does():
    whole = torch.arange(12.0)
    live = {"a": {"x": whole, "y": whole[4:8], "t": whole.view(3, 4).T}, "b": [{"n": 1, "z": torch.ones(3)}, (2, "s")]}
    live |= {"empty": torch.zeros(0, 5), "half": torch.full((2,), 3.0, dtype=torch.bfloat16)}
    copies = saving.Copies()
    made = copies.of(live)
    expected = digests.digests_of(live)
    whole.add_(1)
    live["b"][0]["n"], live["b"][0]["z"] = 5, torch.zeros(3)
    live["half"].zero_()
    assert digests.digests_of(made) == expected != digests.digests_of(live)
    a = made["a"]
    assert a["x"].data_ptr() + 16 == a["y"].data_ptr() and a["t"].data_ptr() == a["x"].data_ptr()
    assert a["t"].stride() == (1, 4) and made["b"][1] == (2, "s")
    before = a["x"].data_ptr()
    assert copies.of(live)["a"]["x"].data_ptr() == before and a["x"][0] == 1  # the same memory, with what is now there


@pytest.mark.parametrize("mode", ["ema", "online"])
def test_checkpoints_hold_the_step_they_name_and_are_those_of_a_run_that_waits(manifest, tmp_path, monkeypatch, mode):
    """Each save reads its copy only after two more steps were made."""
    found = {}
    for background in (False, True):
        folder = tmp_path / f"{background}"
        run = {"save_every": 4, "keep_checkpoints": 9, "async_save": background}
        steps, save = threading.Semaphore(0), checkpoint.save

        def late(folder, content, *more, steps=steps, save=save):
            if content["step"] < 12:
                assert steps.acquire(timeout=60) and steps.acquire(timeout=60)
            return save(folder, content, *more)

        with monkeypatch.context() as patch:
            if background:
                patch.setattr(checkpoint, "save", late)
            cfg = tiny(manifest, folder, runtime=run, target={"mode": mode})
            train(
                cfg, on_log=lambda row, steps=steps: row["step"] % 4 in (1, 2) and row["step"] > 4 and steps.release()
            )
        contents = [(path.name, checkpoint.load(path)) for path in checkpoint.all_in(folder)]
        sizes = [path.stat().st_size // 4096 for path in checkpoint.all_in(folder)]
        sums = {f"{name}/{k}": v for name, c in contents for k, v in c["digests"].items() if k not in PER_RUN}
        found[background] = sums, sizes, rows(folder)
    assert len(found[True][0]) > 100 and found[True] == found[False]


PER_RUN = ("config", "versions", "metrics", "metrics/values")


@pytest.mark.parametrize("background", [True, False])
def test_what_goes_wrong_is_raised_in_one_line_and_the_checkpoint_before_stands(cfg, monkeypatch, background):
    save = checkpoint.save

    def fail(folder, content, *more):
        if content["step"] == 4:
            raise UserError("step-00000004.pt: cannot be written (No space left on device); free space")
        return save(folder, content, *more)

    monkeypatch.setattr(checkpoint, "save", fail)
    with pytest.raises(UserError, match="step-00000004.pt: cannot be written"):
        train(replaced(cfg, "runtime", async_save=background))
    assert [p.name for p in checkpoint.all_in(cfg.folder)] == ["step-00000002.pt"]
    assert [r["step"] for r in rows(cfg.folder)][:4] == [1, 2, 3, 4] and len(rows(cfg.folder)) <= 6
    assert not (Path(cfg.folder) / "run.lock").exists()


def test_a_save_that_fails_last_is_raised_at_the_end(cfg, monkeypatch):
    monkeypatch.setattr(checkpoint, "save", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(cfg, max_steps=1)


def test_one_save_at_a_time_and_the_run_ends_after_the_last(cfg, monkeypatch, capfd):
    go, busy, most = threading.Event(), [0], [0]
    begun, late = held(monkeypatch, go), checkpoint.save

    def counted(*args):
        busy[0] += 1
        most[0] = max(most[0], busy[0])
        try:
            return late(*args)
        finally:
            busy[0] -= 1

    monkeypatch.setattr(checkpoint, "save", counted)
    seen = []

    def look(row):
        if row["step"] == 4:  # the save of step 2 has not written anything, training went on
            seen.append((list(begun), checkpoint.all_in(cfg.folder)))
            go.set()

    train(cfg, on_log=look)
    assert seen == [([2], [])] and begun == [2, 4, 6, 8, 10, 12] and most == [1]
    assert [checkpoint.step_of(p) for p in checkpoint.all_in(cfg.folder)] == [10, 12]
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("saved ")]
    assert len(said) == 6 and " MB in " in said[0] and "training stood still" in said[0]
    assert any(row["save_wait"] > 0 for row in map(dict, read(cfg.folder)))


def read(folder):
    import json

    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    s, bad = saver(tmp_path), state(3)
    s.save(2, state(2))
    bad["encoder"]["w"][1] = float("nan")
    with pytest.raises(TrainingError, match=r"step 3: encoder/w is not finite"):
        s.save(3, bad, wait=True)
    assert s.path == checkpoint.path_of(tmp_path, 2) and len(checkpoint.all_in(tmp_path)) == 1


def test_a_save_that_nobody_waits_for_is_given_up_and_leaves_nothing(tmp_path, monkeypatch):
    s, begun, go = saver(tmp_path), threading.Event(), threading.Event()
    digest = digests.tensor_digest

    def slow(tensor):
        begun.set()
        assert go.wait(60)
        return digest(tensor)

    monkeypatch.setattr(digests, "tensor_digest", slow)
    content = state(2)
    content["encoder"] |= {f"w{n}": torch.full((9,), float(n)) for n in range(40)}
    s.save(2, content)
    assert begun.wait(60)
    threading.Timer(0.2, go.set).start()
    s.close(at_once=True)
    assert os.listdir(tmp_path / "checkpoints") == [] and s.job is None
    s.close()


def test_giving_up_while_the_file_is_written_leaves_nothing(tmp_path):
    looks = [0]

    def look():
        looks[0] += 1
        if looks[0] == 6:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, UserError)):
        checkpoint.save(tmp_path, state(2, 10_000), 2, look)
    assert looks[0] >= 6 and os.listdir(tmp_path / "checkpoints") == []


@pytest.mark.parametrize(("free", "background"), [(None, True), (10**9, True), (100, False)])
def test_auto_keeps_to_the_memory_that_is_free(tmp_path, monkeypatch, free, background):
    monkeypatch.setattr(hardware, "free_memory", lambda: free)
    s, said = saver(tmp_path, "auto"), []
    s.say = said.append
    s.save(2, state(2, 1000))
    s.settle()
    assert s.background is background and checkpoint.load(tmp_path)["step"] == 2
    assert any("runtime.async_save: auto leaves it off" in text for text in said) is not background


@pytest.mark.parametrize("choice", ["auto", True])
def test_where_memory_for_the_copy_runs_out_auto_does_without(tmp_path, monkeypatch, choice):
    def none(self, state):
        raise MemoryError("no pinned memory")

    monkeypatch.setattr(saving.Copies, "of", none)
    s, said = saver(tmp_path, choice), []
    s.say = said.append
    if choice is True:
        with pytest.raises(MemoryError):
            s.save(2, state(2))
        return
    s.save(2, state(2))
    assert checkpoint.load(tmp_path)["step"] == 2 and s.background is False
    assert "no memory for a copy of the state (no pinned memory)" in said[0] and "saved step-00000002.pt" in said[1]


def test_free_memory_is_that_of_the_machine_or_of_its_group(tmp_path):
    assert hardware._limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert hardware._limit(tmp_path) == 300
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 200\n")
    assert hardware._limit(tmp_path) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware._limit(tmp_path) is None
    if Path("/proc/meminfo").exists():
        assert 2**20 < hardware.free_memory() < 2**50


KILL = """
import os, signal, sys
from vjepa_fast.cli import main
from vjepa_fast.trainer import checkpoint
write = checkpoint._Watched.write
count = [0]
def some(self, data):
    if "step-00000004" in self.file.name:
        count[0] += 1
        if count[0] == 20:
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    return write(self, data)
checkpoint._Watched.write = some
sys.exit(main(["train", sys.argv[1]]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_kill_while_the_thread_writes_leaves_the_checkpoint_before(cfg, manifest, tmp_path):
    recipe, folder = tmp_path / "c.yaml", Path(cfg.folder)
    recipe.write_text(configs.dump_yaml(cfg))
    done = forks.run("-c", KILL, str(recipe))
    assert done.returncode == -signal.SIGKILL
    half = [name for name in os.listdir(folder / "checkpoints") if name.endswith(".tmp")]
    assert len(half) == 1 and [p.name for p in checkpoint.all_in(folder)] == ["step-00000002.pt"]
    result = train(cfg)
    assert rows(result.folder) == rows(train(tiny(manifest, tmp_path / "whole")).folder)
    assert not (folder / "checkpoints" / half[0]).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_waits_for_its_checkpoint(cfg, monkeypatch, number):
    go = threading.Event()
    begun = held(monkeypatch, go)

    def stop(row):
        if row["step"] == 3:
            threading.Timer(0.3, go.set).start()
            os.kill(os.getpid(), number)

    with pytest.raises((SystemExit, KeyboardInterrupt)) as end:
        train(cfg, on_log=stop)
    assert end.type is (SystemExit if number == signal.SIGTERM else KeyboardInterrupt)
    last = checkpoint.load(cfg.folder)["step"]
    assert begun[0] == 2 and begun[-1] == last == rows(cfg.folder)[-1]["step"]
    wait_for(lambda: not any(t.name == "vjepa-fast-save" for t in threading.enumerate()))
