"""A process that dies, hangs or fails: all others end with one line that names it, and code 2."""

import os
import signal
import time

import pytest

from vjepa_fast import config as configs
from vjepa_fast.trainer import peers
from vjepa_fast.trainer.peers import Seen, Sign, verdict

from .. import forks
from .ranks import environment, free_port, small

TIMEOUT = 15.0  # seconds; a part of a step takes less, however busy the machine


def seen(heard=100.0, moved=100.0, **fields):
    return Seen(Sign("here", 7, **fields), heard, moved)


def test_nobody_is_named_while_all_go_on():
    assert verdict({0: seen(step=3), 1: seen(step=3, doing="data")}, 104.0, 5.0) == ""
    left = seen(heard=0.0, moved=0.0, left=True)  # it has done its part
    assert verdict({0: seen(step=3), 1: left}, 104.0, 5.0) == ""


def test_who_is_silent_is_gone():
    line = verdict({0: seen(step=3), 1: seen(heard=94.0, step=3, doing="backward")}, 100.0, 5.0)
    assert line.startswith("rank 1 (pid 7 on here) is gone: no sign of it for 6 s, last at step 3, backward")


def test_the_longest_silence_is_named():
    slow = {0: seen(heard=99.0), 1: seen(heard=95.0), 2: seen(heard=80.0), 3: seen(heard=95.5)}
    assert verdict(slow, 100.0, 600.0, lost=True).startswith("rank 2")


def test_a_lost_connection_shortens_the_wait():
    others = {0: seen(step=3, lost=True), 1: seen(heard=95.0)}
    assert verdict(others, 100.0, 600.0).startswith("rank 1")
    others[0].sign.lost = False
    assert verdict(others, 100.0, 600.0) == ""


def test_who_is_behind_is_stuck_and_not_who_waits_for_it():
    waiting = seen(moved=90.0, step=3, doing="backward", marks=20)
    line = verdict({0: waiting, 1: seen(moved=92.0, step=3, doing="data", marks=25), 2: waiting}, 100.0, 5.0)
    assert line.startswith("rank 1 (pid 7 on here) is stuck: 8 s at step 3, data, the others wait for it")
    behind = seen(moved=90.0, step=2, doing="backward", marks=19)
    assert verdict({0: waiting, 1: waiting, 2: behind}, 100.0, 5.0).startswith("rank 2")
    going = seen(moved=99.0, step=3)
    assert verdict({0: waiting, 1: waiting, 2: going}, 100.0, 5.0) == ""  # they wait for one that is at work


def test_who_failed_says_why():
    failed = seen(step=4, doing="data", failed="a.mp4: no frames")
    assert verdict({0: seen(), 1: failed}, 101.0, 5.0) == ""  # the others may be about to say so themselves
    line = verdict({0: seen(heard=104.9, moved=104.9), 1: failed}, 105.0, 600.0)
    assert line == "rank 1 (pid 7 on here) failed at step 4, data: a.mp4: no frames"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("shapes [1] and [2] do not fit"), False),
        (ValueError("gloo"), False),
    ],
)
def test_what_is_an_error_of_a_connection(error, kind):
    assert peers._of_a_connection(error) is kind


def run(tmp_path, **runtime):
    cfg = small(
        tmp_path,
        optimization={"epochs": 1000, "ipe": 100},
        runtime={"timeout": TIMEOUT, "save_every": 5, "log_every": 5, **runtime},
    )
    (tmp_path / "run.yaml").write_text(configs.dump_yaml(cfg))
    port, processes = free_port(), []
    for rank in range(2):
        env = {**os.environ, **environment(rank, 2, port)}
        processes.append(forks.Forked("-m", "vjepa_fast", "train", str(tmp_path / "run.yaml"), env=env))
    rows = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 200
    while not (rows.exists() and rows.stat().st_size) and time.monotonic() < end:
        assert all(p.poll() is None for p in processes), [p.communicate()[1] for p in processes]
        time.sleep(0.2)
    return processes


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [1, 0])  # the first has the store that all others ask
def test_all_others_end_and_name_who_is_gone(victim, number, tmp_path):
    processes = run(tmp_path)
    other = processes[1 - victim]
    try:
        processes[victim].send_signal(number)
        began = time.monotonic()
        error = other.communicate(timeout=TIMEOUT + 60)[1]
        assert time.monotonic() - began < TIMEOUT + 40
    finally:
        for p in processes:
            p.kill()
    assert other.returncode == 2, error
    (line,) = (x for x in error.splitlines() if x.startswith("error: "))
    assert f"rank {victim} (pid {processes[victim].pid} on " in line and " is gone: " in line and "step " in line
    assert "Traceback" not in error and "gloo" not in line
