import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vjepa_fast.study.jobs import locks


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
    code = "import sys; from vjepa_fast.study.jobs.locks import Lock; assert Lock(sys.argv[1]).take()"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.lock")], check=True)
    assert (tmp_path / "x.lock").exists()
    lock = locks.Lock(tmp_path / "x.lock")
    assert lock.take()
    lock.release()


def _elsewhere(path: Path, age: float) -> None:
    path.write_text(json.dumps({"token": "t", "pid": 1, "host": "another machine", "namespace": 0}))
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
