"""One process at a time holds a lock; those of processes that are gone are taken over."""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vjepa_fast import locks


def test_one_process_holds_a_lock(tmp_path):
    a, b = (locks.Lock(tmp_path / "x.lock") for _ in "ab")
    assert a.take() and not b.take()
    b.release()  # not its own: stays
    assert not b.take()
    a.release()
    assert b.take()
    b.release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path):
    code = "import sys; from vjepa_fast.locks import Lock; assert Lock(sys.argv[1]).take()"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.lock")], check=True)
    assert (tmp_path / "x.lock").exists()
    lock = locks.Lock(tmp_path / "x.lock")
    assert lock.take()
    lock.release()


def _elsewhere(path: Path, age: float) -> None:
    path.write_text(json.dumps({"token": "t", "pid": 1, "host": "another machine", "boot": "b", "namespace": 0}))
    os.utime(path, (time.time() - age,) * 2)


def test_a_lock_of_another_machine_is_taken_over_when_its_heart_stops(tmp_path):
    path = tmp_path / "x.lock"
    _elsewhere(path, locks.STALE - 60)
    assert not locks.Lock(path).take()
    _elsewhere(path, locks.STALE + 60)
    held = locks.Lock(path)
    assert held.take() and not locks.Lock(path).take()
    held.release()


def test_a_held_lock_is_touched(tmp_path):
    lock = locks.Lock(tmp_path / "x.lock", stale=0.4)
    assert lock.take()
    time.sleep(1.0)
    assert not locks.Lock(tmp_path / "x.lock", stale=0.4).take()
    lock.release()


def test_a_lock_that_was_taken_over_is_noticed_and_not_touched(tmp_path):
    lock = locks.Lock(tmp_path / "x.lock", stale=0.2)
    assert lock.take() and not lock.lost
    _elsewhere(tmp_path / "x.lock", 50)
    deadline = time.time() + 10
    while not lock.lost:
        assert time.time() < deadline
        time.sleep(0.02)
    assert time.time() - (tmp_path / "x.lock").stat().st_mtime > 40
    lock.release()
    assert (tmp_path / "x.lock").exists()


def test_of_many_one_takes_over(tmp_path):
    for round_ in range(10):
        path = tmp_path / f"{round_}.lock"
        _elsewhere(path, 1000)
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda lock: lock.take(), [locks.Lock(path) for _ in range(8)]))
        assert sum(got) <= 1
        if not any(got):  # each saw another at it; the next look succeeds
            assert locks.Lock(path).take()


def _held_here(path: Path, **other: object) -> None:
    path.write_text(json.dumps({"token": "t", "pid": os.getppid(), "born": None, **locks.place(), **other}))


def test_a_living_process_of_this_machine_keeps_its_lock_however_silent(tmp_path):
    path = tmp_path / "x.lock"
    _held_here(path)
    os.utime(path, (0, 0))
    lock = locks.Lock(path)
    assert not lock.take()
    assert str(os.getppid()) in lock.holder and locks.place()["host"] in lock.holder


def test_a_process_number_used_again_is_another_process(tmp_path):
    path = tmp_path / "x.lock"
    _held_here(path, born=1)
    lock = locks.Lock(path)
    assert lock.take() and f"process {os.getppid()}" in lock.taken_over
    lock.release()


def test_before_a_restart_of_the_machine_the_heart_decides(tmp_path):
    path = tmp_path / "x.lock"
    _held_here(path, boot="another boot")
    assert not locks.Lock(path).take()
    os.utime(path, (0, 0))
    lock = locks.Lock(path)
    assert lock.take()
    lock.release()


def test_a_copy_of_a_folder_is_free_and_a_folder_that_was_moved_is_not(tmp_path):
    lock = locks.Lock(tmp_path / "a" / "x.lock")
    assert lock.take()
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    (tmp_path / "a").rename(tmp_path / "moved")
    assert not locks.Lock(tmp_path / "moved" / "x.lock").take()
    other = locks.Lock(tmp_path / "copy" / "x.lock")
    assert other.take()
    other.release()


def test_a_zombie_holds_nothing():
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not locks.alive(child.pid)
    child.wait()
    assert locks.alive(os.getpid(), locks.born(os.getpid()))
    assert not locks.alive("no number") and not locks.alive(10**30)


def test_a_lock_file_of_any_content_is_refused_or_taken(tmp_path):
    path = tmp_path / "x.lock"
    for content in (b"", b"\xff\xfe", b"[1]", b"{}", b'{"pid": [1], "host": {"a": "b\\n"}, "since": "x"}'):
        path.write_bytes(content)
        lock = locks.Lock(path)
        assert not lock.take() and "\n" not in lock.holder
        os.utime(path, (0, 0))
        assert lock.take()
        lock.release()
    assert list(tmp_path.iterdir()) == []


def test_without_links_a_lock_is_made_all_the_same(tmp_path, monkeypatch):
    def no_links(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    a, b = (locks.Lock(tmp_path / "x.lock") for _ in "ab")
    assert a.take() and not b.take()
    a.release()
    assert list(tmp_path.iterdir()) == []
