"""Jobs in processes of their own and as a SLURM array, with work that has nothing to do with a study."""

import json
import os
import signal
import sys
import time
import types
from pathlib import Path

import pytest

from vjepa_fast.errors import UserError
from vjepa_fast.study.jobs import processes
from vjepa_fast.study.jobs.processes import Work, run_processes, run_slurm, slots


def result(job: dict, ending: str = "txt") -> Path:
    return Path(job["folder"]) / f"{job['key']}.{ending}"


def do(job: dict) -> None:
    print("working on", job["key"])
    if job["does"] == "raise":
        raise ValueError("no such luck")
    if job["does"] == "vanish":
        os.kill(os.getpid(), signal.SIGKILL)
    if job["does"] == "leave":
        os._exit(7)
    result(job).write_text("done")


def done(job: dict) -> bool:
    return result(job).is_file()


def fail(job: dict, error) -> None:
    result(job, "error").write_text(str(error))


WORK = Work(do, done, fail)


def jobs(folder: Path, *does: str) -> list[dict]:
    return [{"folder": str(folder), "key": f"{i}-{what}", "does": what} for i, what in enumerate(does)]


def test_each_ending_is_recorded(tmp_path):
    made, events = jobs(tmp_path, "work", "raise", "vanish", "leave", "work"), []
    result(made[4]).write_text("from before")
    run_processes(WORK, made, [None, None], 1, lambda what, job: events.append((what, job["key"])), poll=0.05)
    ended = {key: what for what, key in events if what != "start"}
    assert ended == {"0-work": "done", "1-raise": "failed", "2-vanish": "failed", "3-leave": "failed", "4-work": "kept"}
    assert [key for what, key in events if what == "start"] == [job["key"] for job in made[:4]]
    said = [result(job, "error").read_text() for job in made[1:4]]
    assert said[0] == "no such luck" and "killed by SIGKILL" in said[1] and "exit code 7" in said[2]
    assert (tmp_path / "logs" / "0-work.log").read_text() == "working on 0-work\n"
    assert not list((tmp_path / "locks").iterdir())


def _elsewhere(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"token": "t", "pid": 1, "host": "another machine", "namespace": 0}))


def test_a_job_in_other_hands_is_left_alone_and_waited_for(tmp_path):
    one, other, theirs = jobs(tmp_path, "work", "work", "work")
    lock = WORK.lock(theirs).path
    _elsewhere(lock)
    assert WORK.locked(theirs) == "elsewhere" and not done(theirs)
    events = []

    def on_event(what, job):
        events.append((what, job["key"]))
        if what == "done" and job is other:  # meanwhile the other command has finished
            result(theirs).write_text("theirs")
            lock.unlink()

    run_processes(WORK, [theirs, one, other], [None], 1, on_event, poll=0.05)
    ours = [(what, job["key"]) for job in (one, other) for what in ("start", "done")]
    assert events == [("elsewhere", "2-work"), *ours, ("kept", "2-work")]
    assert WORK.locked(theirs) == "kept"


def test_a_stop_ends_the_workers_and_frees_the_locks(tmp_path, monkeypatch):
    started = []

    def stop(what, job):
        started.append(job)
        if len(started) > 1:  # and again when it is told of the first that was stopped
            raise KeyboardInterrupt

    monkeypatch.setattr(processes, "_child", _sleep)
    start = time.time()
    with pytest.raises(KeyboardInterrupt):
        run_processes(WORK, jobs(tmp_path, "work", "work"), [None, None], 1, stop)
    assert time.time() - start < 60 and not list((tmp_path / "locks").iterdir())


def test_a_portion_ends_in_time_and_the_next_one_has_the_rest(tmp_path, monkeypatch):
    made, events = jobs(tmp_path, "work", "work", "work"), []
    result(made[0]).write_text("from before")
    child = processes._child
    monkeypatch.setattr(processes, "_child", _sleep)
    start = time.monotonic()

    def on_event(what, job):
        events.append((what, job["key"]))

    run_processes(WORK, made, [None], 1, on_event, poll=0.05, until=start + 1)
    assert events == [("kept", "0-work"), ("start", "1-work"), ("stopped", "1-work")]
    assert time.monotonic() - start < 60 and not list((tmp_path / "locks").iterdir())
    assert not list(tmp_path.glob("*.error"))
    monkeypatch.setattr(processes, "_child", child)
    run_processes(WORK, made, [None], 1, on_event, poll=0.05, until=time.monotonic() + 600)
    assert [e for e in events[3:] if e[0] != "kept"] == [(w, f"{i}-work") for i in (1, 2) for w in ("start", "done")]


def _sleep(work, job):
    time.sleep(300)


def test_slots_share_cores_and_gpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert slots("cpu", None, 1, 100) == ([None] * 8, 1)
    assert slots("cpu", 2, 1, 100) == ([None] * 2, 4) and slots("cpu", None, 1, 4) == ([None] * 4, 2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert slots("cuda", None, 2, 100) == (["5", "7", "5", "7"], 2)
    assert slots("cuda", 3, 2, 100)[0] == ["5", "7", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert slots("cuda", None, 1, 100) == (["0", "1"], 4)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UserError, match="no CUDA device"):
        slots("cuda", None, 1, 100)


class FakeSubmitit(types.ModuleType):
    """What `run_slurm` uses of submitit, run at once."""

    def __init__(self):
        super().__init__("submitit")
        self.said = {}
        outer = self

        class Job:
            def __init__(self, value):
                self.value = value

            def done(self):
                return True

            def result(self):
                if isinstance(self.value, Exception):
                    raise self.value
                return self.value

        class AutoExecutor:
            def __init__(self, folder):
                outer.said["folder"] = folder

            def update_parameters(self, **values):
                if "nonsense" in values:
                    raise NameError("nonsense")
                outer.said.update(values)

            def map_array(self, function, jobs):
                return [Job(RuntimeError("out of time") if j["does"] == "late" else function(j)) for j in jobs]

        self.AutoExecutor = AutoExecutor


def test_slurm_goes_through_submitit(tmp_path, monkeypatch):
    fake = FakeSubmitit()
    monkeypatch.setitem(sys.modules, "submitit", fake)
    made, events = jobs(tmp_path, "late", "work", "raise"), []
    run_slurm(
        WORK, made, tmp_path, {"slurm_partition": "gpu"}, 3, lambda what, job: events.append((what, job["key"])), 0.01
    )
    assert {key: what for what, key in events if what != "start"} == {
        "0-late": "failed",
        "1-work": "done",
        "2-raise": "failed",
    }
    assert "out of time" in result(made[0], "error").read_text()
    assert result(made[2], "error").read_text() == "no such luck"
    assert fake.said["slurm_partition"] == "gpu" and fake.said["slurm_array_parallelism"] == 3
    with pytest.raises(UserError, match="--slurm: submitit does not take"):
        run_slurm(WORK, made, tmp_path, {"nonsense": 1}, None, lambda *a: None)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="pip install submitit"):
        run_slurm(WORK, made, tmp_path, {}, None, lambda *a: None)
