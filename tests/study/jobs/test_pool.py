import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vjepa_fast.errors import DataError, UserError
from vjepa_fast.study.jobs import pool
from vjepa_fast.study.jobs.pool import Task, run_here, run_tasks


def add(path: str, value: int, fail: bool = False) -> int:
    if fail:
        raise DataError(f"{path}: told to fail")
    with open(path, "a") as file:
        file.write(f"{value}\n")
    return value


def vanish() -> None:
    os._exit(3)


def sleep_long() -> None:
    time.sleep(60)


def graph(folder: Path, value: int = 1, fail: bool = False) -> list[Task]:
    log = str(folder / "log.txt")
    return [
        Task("last", add, lambda r: {"path": log, "value": r["left"] + r["right"], "fail": fail}, ("left", "right")),
        Task("left", add, lambda r: {"path": log, "value": value}),
        Task("right", add, lambda r: {"path": log, "value": 10}),
    ]


def run(folder, tasks, at_once=1):
    events = []
    tell = lambda kind, name: events.append((kind, name))  # noqa: E731
    if not at_once:
        return run_here(tasks, folder, on_event=tell), events
    found = run_tasks(tasks, folder, at_once=at_once, threads=1, on_event=tell)
    return found, events


def test_in_this_process_and_in_others_alike(tmp_path):
    last, left, right = graph(tmp_path)
    with pytest.raises(DataError, match="told to fail"):
        run(tmp_path, [left, right, graph(tmp_path, fail=True)[0]], at_once=0)
    found, events = run(tmp_path, [left, right, last], at_once=0)
    assert found == {"left": 1, "right": 10, "last": 11}
    assert events == [("kept", "left"), ("kept", "right"), ("start", "last"), ("done", "last")]
    assert run(tmp_path, [last, left, right]) == (found, [("kept", name) for name in ("left", "right", "last")])
    _, other, _ = graph(tmp_path, value=2)
    found, events = run(tmp_path, [other, right, last], at_once=0)
    assert [e for e in events if e[0] == "done"] == [("done", "left"), ("done", "last")] and found["last"] == 12
    (tmp_path / "tasks" / "left.json").write_text("{")
    assert ("done", "left") in run(tmp_path, [other, right, last], at_once=0)[1]


def test_order_restart_and_changed_plan(tmp_path):
    with pytest.raises(DataError, match="told to fail"):
        run(tmp_path, graph(tmp_path, fail=True))
    found, events = run(tmp_path, graph(tmp_path))
    assert found == {"left": 1, "right": 10, "last": 11}
    assert events[:2] == [("kept", "left"), ("kept", "right")] and ("done", "last") in events
    log = (tmp_path / "log.txt").read_text().split()
    assert sorted(log[:2]) == ["1", "10"] and log[2:] == ["11"]
    found, events = run(tmp_path, graph(tmp_path, value=2))  # the changed task and what needs it, nothing else
    assert [e for e in events if e[0] == "done"] == [("done", "left"), ("done", "last")] and found["last"] == 12
    (tmp_path / "tasks" / "left.json").write_text("{")
    assert ("done", "left") in run(tmp_path, graph(tmp_path, value=2))[1]


def test_a_result_whose_file_is_gone_is_made_again(tmp_path):
    path = str(tmp_path / "out.txt")
    task = Task("one", add, lambda r: {"path": path, "value": 5}, check=lambda result: os.path.exists(path))
    run(tmp_path, [task])
    assert run(tmp_path, [task])[1] == [("kept", "one")]
    os.unlink(path)
    assert ("done", "one") in run(tmp_path, [task])[1]


def test_a_killed_worker_is_told_and_ends_the_others(tmp_path):
    start = time.time()
    tasks = [Task("dies", vanish, lambda r: {}), Task("sleeps", sleep_long, lambda r: {})]
    with pytest.raises(UserError, match="worker process was killed.*goes on"):
        run(tmp_path, tasks, at_once=2)
    assert time.time() - start < 50
    assert not list((tmp_path / "tasks").glob("*.json"))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc to see whether a process lives")
@pytest.mark.parametrize("kind", ["tell_pid", "tell_pid_and_save"])
def test_workers_leave_when_the_parent_is_killed(tmp_path, kind):
    mark = tmp_path / "pid.txt"
    code = (
        "import sys, pathlib\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_pool\n"
        "from vjepa_fast.study.jobs.pool import Task, run_tasks\n"
        "if __name__ == '__main__':\n"
        f"    task = Task('t', test_pool.{kind}, lambda r: {{'path': {str(mark)!r}}})\n"
        f"    run_tasks([task], pathlib.Path({str(tmp_path)!r}), at_once=1, threads=1, on_event=lambda *a: None)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    try:
        _until(mark.exists, 60)
    finally:
        parent.kill()
        parent.wait()
    pid = int(mark.read_text())
    _until(lambda: not _alive(pid), 30)


def tell_pid(path: str) -> None:
    Path(path + ".tmp").write_text(str(os.getpid()))
    os.replace(path + ".tmp", path)
    time.sleep(120)


def tell_pid_and_save(path: str) -> None:
    """As the trainer: SIGTERM ends the step in hand, saves, and leaves with SystemExit."""
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    Path(path + ".tmp").write_text(str(os.getpid()))
    os.replace(path + ".tmp", path)
    while not stop:
        time.sleep(0.05)
    sys.exit(0)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _until(condition, seconds: float) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.1)


def test_the_key_covers_function_arguments_and_needs():
    one = Task("t", add, lambda r: {"value": 1})
    two = Task("t", add, lambda r: {"value": 2})
    other = Task("t", vanish, lambda r: {"value": 1})
    needs = Task("t", add, lambda r: {"value": 1}, ("n",))
    keys = [pool._key(one, {}, {}), pool._key(two, {}, {}), pool._key(other, {}, {})]
    keys += [pool._key(needs, {}, {"n": "a"}), pool._key(needs, {}, {"n": "b"})]
    assert len(set(keys)) == 5
    named = Task("t", add, lambda r: {"value": 1, "path": "x"}, identity=["a"])
    moved = Task("t", add, lambda r: {"value": 1, "path": "y"}, identity=["a"])
    assert pool._key(named, {}, {}) == pool._key(moved, {}, {})


def test_thread_variables_are_put_back(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    run(tmp_path, graph(tmp_path))
    assert os.environ["OMP_NUM_THREADS"] == "7" and "MKL_NUM_THREADS" not in os.environ
    stored = json.loads((tmp_path / "tasks" / "last.json").read_text())
    assert stored["result"] == 11 and stored["cpu_seconds"] >= 0
