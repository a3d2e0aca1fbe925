"""Damaged rows, full and read-only folders, every system call of a save failing once, Ctrl-C while modules load."""

import errno
import io
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import forks
from tests.trainer.test_checkpoint import state
from vjepa_fast import config as configs
from vjepa_fast import files
from vjepa_fast.cli import main
from vjepa_fast.config import schema
from vjepa_fast.errors import UserError
from vjepa_fast.study.records import read_metrics
from vjepa_fast.trainer import checkpoint, saving, train
from vjepa_fast.trainer.distributed import Distributed
from vjepa_fast.trainer.metrics import truncate_rows
from vjepa_fast.trainer.writer import RunLock

from .conftest import ROOT, replaced, rows, start, tiny, wait_for

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX")
STRANGE = [
    b"\xff\xfe\n",
    b"[1, 2]\n",
    b'{"foo": 1}\n',
    b"12\n",
    b'{"step": "x", "loss": 1}\n',
    b"\0\0\n",
    b"[" * 99999 + b"\n",
]


@pytest.mark.parametrize("line", STRANGE)
def test_a_damaged_row_is_left_out_by_its_number_and_kept_aside(tmp_path, line, caplog):
    path = tmp_path / "metrics.jsonl"
    good = [b'{"step": %d, "loss": 1.5}\n' % step for step in (1, 2, 3)]
    before = good[0] + line + good[1] + good[2] + b'{"step": 4, "lo'
    path.write_bytes(before)
    with caplog.at_level(logging.WARNING):
        assert truncate_rows(path, 2)["step"] == 2
    assert path.read_bytes() == good[0] + good[1]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before
    assert f"{path}: no rows in line 2" in caplog.text


def test_a_torn_last_row_is_no_damage(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1}\n{"step": 2, "lo')
    assert truncate_rows(path, 9)["step"] == 1
    assert os.listdir(tmp_path) == ["metrics.jsonl"] and not caplog.records


def test_a_study_refuses_a_damaged_row_by_its_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 1}\n\xff\xfe\n')
    with pytest.raises(UserError, match=r"metrics.jsonl: line 2 is damaged"):
        read_metrics(tmp_path)


def test_a_line_is_added_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "rows"
    files.append_line(path, "one")
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, blob: write(fd, blob[:2]))  # a disk that fills up
    with pytest.raises(UserError, match="rows: cannot be written .No space left"):
        files.append_line(path, "two")
    monkeypatch.undo()
    assert path.read_text() == "one\n"
    with pytest.raises(UserError, match="cannot be written"):
        files.append_line(tmp_path / "gone" / "rows", "x")
    assert not (tmp_path / "gone").exists()


CALLS = ("open", "fsync", "replace", "mkdir", "close")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_every_call_of_a_save_fails_once(tmp_path, monkeypatch, number):
    """After any of them the checkpoints are whole, nothing half-written is left, and the next save succeeds."""
    content = state(2)
    checkpoint.save(tmp_path, content)
    folder, failed = tmp_path / "checkpoints", 0
    for call in CALLS:
        for at in range(50):
            count, real = [0], getattr(os, call)

            def faulty(*args, count=count, real=real, at=at, call=call, **options):
                count[0] += 1
                if count[0] == at + 1:
                    if call == "close":
                        real(*args)
                    raise OSError(number, os.strerror(number))
                return real(*args, **options)

            with monkeypatch.context() as patch:
                patch.setattr(os, call, faulty)
                try:
                    checkpoint.save(tmp_path, {**content, "step": 3}, keep=1)
                except UserError as error:
                    failed += 1
                    text = str(error)
                    assert "\n" not in text and "step-00000003.pt: cannot be written" in text  # noqa: PT017
                    left = [p.name for p in checkpoint.all_in(tmp_path)]
                    assert left in (["step-00000002.pt"], ["step-00000002.pt", "step-00000003.pt"])
            assert checkpoint.load(tmp_path)["step"] in (2, 3)
            assert [n for n in os.listdir(folder) if n.startswith(".")] == []
            checkpoint.save(tmp_path, {**content, "step": 3}, keep=2)
            checkpoint.save(tmp_path, {**content, "step": 2}, keep=2)
            (folder / "step-00000003.pt").unlink()
            if count[0] <= at:
                break
    assert failed >= 3


class Faulty(io.FileIO):
    """A file whose write number ``at`` goes wrong as ``kind`` says: the error of that number; ``full``, a part of it is
    written, and then ENOSPC for good; ``short``: every write takes a part alone, which is no error.
    """

    kind, at, count = "short", 0, 0

    def write(self, data):
        kind = type(self)
        kind.count += 1
        data = memoryview(data).cast("B")
        if kind.kind == "short":
            return super().write(data[: max(1, len(data) // 2)])
        if kind.count <= kind.at:
            return super().write(data)
        if kind.count == kind.at + 1 and kind.kind == "full":
            return super().write(data[: len(data) // 2])
        if kind.count == kind.at + 1 or kind.kind == "full":
            number = errno.ENOSPC if kind.kind == "full" else kind.kind
            raise OSError(number, os.strerror(number))
        return super().write(data)


def writes_fail(patch, kind, at):
    Faulty.kind, Faulty.at, Faulty.count = kind, at, 0

    def faulty_open(path, mode="r", **options):
        assert mode == "wb"
        return io.BufferedWriter(Faulty(os.fspath(path), "wb"))

    patch.setattr(files, "open", faulty_open, raising=False)


def several(step):
    """A checkpoint of more than one write."""
    content = state(step)
    content["encoder"] |= {f"w{n}": torch.full((5000,), float(n)) for n in range(3)}
    return content


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EIO, "full"])
def test_every_write_of_a_save_fails_once(tmp_path, monkeypatch, kind, background):
    """In the thread of a save too: one line, the checkpoint before stands, nothing is left, the next save succeeds."""
    checkpoint.save(tmp_path, several(2))
    run = schema.RuntimeConfig(async_save=background, keep_checkpoints=2)
    saver = saving.Saver(tmp_path, Distributed(), RunLock(tmp_path), run)
    failed = 0
    for at in range(100):
        with monkeypatch.context() as patch:
            writes_fail(patch, kind, at)
            try:
                saver.save(3, several(3))
                saver.settle()
            except UserError as error:
                failed += 1
                assert "\n" not in str(error) and "step-00000003.pt: cannot be written" in str(error)  # noqa: PT017
                assert os.strerror(errno.EIO if kind == errno.EIO else errno.ENOSPC) in str(error)  # noqa: PT017
                assert os.listdir(tmp_path / "checkpoints") == ["step-00000002.pt"]
        assert checkpoint.load(tmp_path)["step"] == (2 if Faulty.count > at else 3)
        if Faulty.count <= at:
            break
    assert failed >= 5 and failed == at
    saver.save(4, several(4))
    saver.settle()
    assert checkpoint.load(tmp_path)["step"] == 4


def test_writes_that_take_a_part_alone_make_a_whole_file(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        writes_fail(patch, "short", 0)
        checkpoint.save(tmp_path, several(2))
    assert Faulty.count > 20 and checkpoint.load(tmp_path)["encoder"]["w2"][4999] == 2


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from vjepa_fast.cli import main
from vjepa_fast.trainer import checkpoint
save = checkpoint.save
def fill(*args):
    if args[1]["step"] > 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return save(*args)
checkpoint.save = fill
sys.exit(main(["train", sys.argv[1]]))
"""


def test_a_disk_that_fills_up_ends_with_one_line_and_all_that_was_written(cfg, manifest, tmp_path):
    recipe = tmp_path / "c.yaml"
    recipe.write_text(configs.dump_yaml(cfg))
    done = forks.run("-c", FULL, str(recipe))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "cannot be written" in last
    assert checkpoint.load(cfg.folder)["step"] == 2 and [r["step"] for r in rows(cfg.folder)][:4] == [1, 2, 3, 4]
    result = train(cfg)
    assert rows(result.folder) == rows(train(tiny(manifest, tmp_path / "whole")).folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_may_not_be_written_is_one_line(cfg, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        train(cfg)
    tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("BrokenProcessPool", "x\ny"),
        ("SafetensorError", "x\ny"),
        ("MemoryError", ""),
        ("RuntimeError", "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 1 GiB"),
    ],
)
def test_what_the_machine_does_is_one_line(monkeypatch, capsys, name, text):
    kind = type(name, (Exception,), {})

    def fail(argv):
        raise kind(text)

    monkeypatch.setattr("vjepa_fast.cli._run", fail)
    assert main(["train"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_a_defect_keeps_its_traceback(monkeypatch):
    def fail(argv):
        raise RuntimeError("x")

    monkeypatch.setattr("vjepa_fast.cli._run", fail)
    with pytest.raises(RuntimeError):
        main(["train"])


IMPORTS = """
import sys
from vjepa_fast.cli import main
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("importing", flush=True)
            import time
            try:
                time.sleep(20)
            except BaseException:
                pass
sys.meta_path.insert(0, Slow())
sys.exit(main(["train", sys.argv[1]]))
"""


def test_ctrl_c_ends_an_import_that_swallows_it(cfg, tmp_path):
    recipe = tmp_path / "c.yaml"
    recipe.write_text(configs.dump_yaml(cfg))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", IMPORTS, str(recipe)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None and process.stdout.readline() == "importing\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "interrupted\n" and time.monotonic() - began < 10


def test_ctrl_c_during_a_run_saves_and_gives_the_folder_back(cfg):
    cfg = replaced(cfg, "optimization", epochs=5000)
    process = start(cfg)
    path = Path(cfg.folder) / "metrics.jsonl"
    wait_for(lambda: path.exists() and path.read_bytes().count(b"\n") > 3, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert checkpoint.load(cfg.folder)["step"] == rows(cfg.folder)[-1]["step"]
    assert not (Path(cfg.folder) / "run.lock").exists()
