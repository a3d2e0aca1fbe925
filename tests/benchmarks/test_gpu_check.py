"""What ``make gpu-check`` records of parts that work, fail, crash, hang or raise; without a GPU."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu_check

FILE = """
import os, pytest, time
def test_good(): pass
def test_skipped(): pytest.skip("no")
{}
"""


@pytest.fixture
def write(tmp_path):
    """A file of tests that begins with a good and a skipped one."""

    def make(name, more=""):
        path = tmp_path / f"test_{name}.py"
        path.write_text(FILE.format(more))
        return str(path)

    return make


def counts(found):
    return found["passed"], found["failed"], found["skipped"]


def test_files_of_tests_are_counted_and_kept_apart(write):
    good = write("good")
    bad = write("bad", "@pytest.mark.parametrize('x', [1, 2])\ndef test_bad(x): assert x == 1, 'no such luck'")
    crash = write("crash", "def test_crash(): os.abort()")
    broken = write("broken", "import nowhere_to_be_found")
    known = []
    found = gpu_check.run_tests([good, bad, crash, broken], 300, 2, lambda total: known.append(total["passed"]))
    assert not found["ok"] and counts(found) == (4, 2, 3)  # the import error counts as a failed test
    named = {f["name"].split("::")[1] or f["name"]: f["message"] for f in found["failures"]}
    assert "no such luck" in named["test_bad[2]"]
    assert "error" not in found["files"][bad] and found["files"][bad]["failed"] == 1
    assert counts(found["files"][crash]) == (1, 0, 1)  # from what was printed before
    assert found["files"][crash]["error"] == f"exit code {-signal.SIGABRT}" and found["files"][crash]["tail"]
    assert "nowhere_to_be_found" in "\n".join(found["files"][broken]["tail"])
    assert crash in found["error"] and good not in found["error"]
    assert len(known) == 4


def test_all_passed_is_ok_and_nothing_passed_is_not(write):
    assert gpu_check.run_tests([write("good")], 300, 1, lambda total: None)["ok"]
    assert not gpu_check.run_tests([], 300, 1, lambda total: None)["ok"]


def test_a_file_that_hangs_is_ended_with_its_children(write, tmp_path):
    pid = tmp_path / "pid"
    hang = write(
        "hang",
        "def test_hang():\n    import subprocess\n    p = subprocess.Popen(['sleep', '600'])\n"
        f"    open({str(pid)!r}, 'w').write(str(p.pid))\n    time.sleep(600)",
    )
    found = gpu_check.test_file(hang, 8)
    assert found["error"] == "stopped after 8 s" and counts(found) == (1, 0, 1)
    assert "test_hang" in found["tail"][-1]
    assert not running(int(pid.read_text()))
    assert gpu_check.test_file(hang, 0)["error"] == "not begun: no time was left"


def running(pid):
    for _ in range(50):  # it is gone once its new parent has waited for it
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii") as f:
                if f.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return False
        except OSError:
            return False
        time.sleep(0.1)
    return True


BENCH = """
import json, sys, time
ops = sys.argv[sys.argv.index("--ops") + 1].split(",") if "--ops" in sys.argv else ["step"]
rows = []
for op in ops:
    print("at", op, flush=True)
    if op == "bad":
        sys.exit("bad differs from reference")
    if op == "slow":
        time.sleep(600)
    error = {"half": "RuntimeError: no compiler", "lost": "illegal access"}.get(op)
    rows.append({"op": op, "mode": "full", "provider": "compiled", "median_ms": 2.0, "error": error,
                 "floor_bytes": 1000 if op == "a" else None})
    json.dump(rows, open(sys.argv[sys.argv.index("--json") + 1], "w"))
    if op == "lost":
        sys.exit(3)
sys.exit(any(row["error"] for row in rows))
"""


def test_ops_after_a_broken_one_are_measured():
    known = []
    found = gpu_check.rows_of_ops([sys.executable, "-c", BENCH], ["a", "bad", "b"], 300, lambda t: known.append(t))
    assert [row["op"] for row in found["rows"]] == ["a", "b"] and not found["ok"]
    assert found["failures"]["bad"]["error"] == "exit code 1" and found["error"] == "no rows of bad"
    assert found["failures"]["bad"]["tail"] == ["at a", "at bad", "bad differs from reference"]
    assert len(known) == 2
    assert gpu_check.rows_of_ops([sys.executable, "-c", BENCH], ["a", "b"], 300, lambda t: None)["ok"]


def test_an_op_with_a_failed_provider_keeps_its_rows_and_one_that_lost_the_gpu_does_not_stop_the_others():
    names = ["half", "lost", "a"]
    found = gpu_check.rows_of_ops([sys.executable, "-c", BENCH], names, 300, lambda t: None)
    assert [row["op"] for row in found["rows"]] == names and not found["ok"]
    assert found["failures"]["half"]["error"] == "half full compiled: RuntimeError: no compiler"
    assert set(found["failures"]) == {"half", "lost"} and found["error"] == "errors in half, lost"
    assert not gpu_check.ran_out(found)


def test_the_step_names_what_failed_and_is_given_a_budget(monkeypatch):
    asked = []

    def rows_of(command, limit):
        asked.append((command, limit))
        return {"ok": False, "rows": rows, "error": "exit code 1", "exit_code": 1}

    row = {"op": "train_step", "mode": "step", "provider": "reference", "batch": 64}
    rows = [{**row, "error": "OutOfMemoryError: no"}, {**row, "provider": "vjepa_fast", "error": None}]
    monkeypatch.setattr(gpu_check, "rows_of", rows_of)
    found = gpu_check.rows_of_step(["x"], 200)
    assert asked == [(["x", "--budget", "180"], 200)]
    assert found["error"] == "train_step step reference 64: OutOfMemoryError: no" and not gpu_check.ran_out(found)
    rows[0]["error"] = "not begun: the time of --budget was over"
    assert gpu_check.ran_out(gpu_check.rows_of_step(["x"], 200))


def test_ops_without_time_are_named():
    found = gpu_check.rows_of_ops([sys.executable, "-c", BENCH], ["a", "slow", "b"], 3, lambda t: None)
    assert [row["op"] for row in found["rows"]] == ["a"]
    assert found["failures"]["slow"]["error"].startswith("stopped after")
    assert found["failures"]["b"]["error"] == "not begun: no time was left" and gpu_check.ran_out(found)


def test_rows_of_a_benchmark():
    assert gpu_check.rows_of([sys.executable, "-c", BENCH], 60)["rows"][0]["op"] == "step"
    nothing = gpu_check.rows_of([sys.executable, "-c", "print('hm')"], 60)
    assert not nothing["ok"] and nothing["error"] == "wrote no rows" and nothing["tail"] == ["hm"]


def test_bandwidth_of_rows_and_of_copies():
    rows = [{"op": "a", "median_ms": 2.0, "floor_bytes": 1000}, {"op": "b", "median_ms": 1.0, "floor_bytes": None}]
    gpu_check.over_bandwidth(rows, None)
    assert "of_copy_bandwidth" not in rows[0]
    gpu_check.over_bandwidth(rows, 1e6)
    assert rows[0]["of_copy_bandwidth"] == 0.5 and "of_copy_bandwidth" not in rows[1]
    code = "import torch; from vjepa_fast.bench import timing; assert timing.copy_bandwidth; print(5e9)"
    assert gpu_check.copy_bandwidth(60, code) == {"ok": True, "bytes_per_s": 5e9}
    failed = gpu_check.copy_bandwidth(60, "raise SystemExit('out of memory')")
    assert not failed["ok"] and failed["tail"] == ["out of memory"]


def test_every_part_is_tried_and_the_file_is_written_after_each(tmp_path, capsys):
    path = tmp_path / "deep" / "gpu.json"
    seen = []

    def part(result):
        def do():
            seen.append(json.loads(path.read_text()))
            if isinstance(result, Exception):
                raise result
            return result

        return do

    work = {
        "copy_bandwidth": part({"ok": True, "bytes_per_s": 1.0}),
        "tests": part(RuntimeError("lost the device")),
        "ops": part({"ok": False, "rows": [], "error": "exit code 1", "tail": ["why"]}),
        "step": part({"ok": True}),
    }
    assert gpu_check.check(gpu_check.Results(path), work) == 1
    found = json.loads(path.read_text())
    assert found["complete"] and found["failed"] == ["tests", "ops"] and found["seconds"] >= 0
    assert found["tests"] == {"ok": False, "error": "RuntimeError: lost the device"}
    assert [sorted(s) for s in seen][:2] == [["complete", "seconds"], ["complete", "copy_bandwidth", "seconds"]]
    assert not seen[3]["complete"] and "ops" in seen[3]
    printed = capsys.readouterr().out
    assert "ran_out" not in found["ops"]
    assert "tests: FAILED RuntimeError: lost the device" in printed and "| why" in printed
    assert gpu_check.check(gpu_check.Results(path), {"step": part({"ok": True})}) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_without_cuda_it_says_so_and_writes_nothing(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path / "gpu.json")]) == 2
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "finds no CUDA device" in printed
    assert not list(tmp_path.iterdir())


def test_the_parts_are_those_that_have_limits_and_the_tests_exist(tmp_path):
    parser_free = type("Args", (), {})()
    assert list(gpu_check.parts(parser_free, gpu_check.Results(tmp_path / "x"))) == list(gpu_check.LIMITS)
    assert sum(gpu_check.LIMITS.values()) <= gpu_check.BUDGET < 480
    assert all((gpu_check.ROOT / path).is_file() for path in gpu_check.TESTS)
    assert len(gpu_check.TESTS) == len(set(gpu_check.TESTS)) and "tests/ops/test_distance.py" in gpu_check.TESTS


def test_no_part_takes_more_than_is_left_of_the_budget(tmp_path, monkeypatch):
    """Time is what the parts say that they took; the JSON says which of them ran out of it."""
    now, given = [0.0], {}

    def part(name, took, result):
        def do(limit, *_):
            given[name] = limit
            now[0] += min(took, limit)
            return result

        return do

    monkeypatch.setattr(gpu_check, "clock", lambda: now[0])
    monkeypatch.setattr(gpu_check, "copy_bandwidth", part("copy", 5, {"ok": True, "bytes_per_s": 1.0}))
    late = {"ok": False, "rows": [], "error": "stopped after 200 s"}
    monkeypatch.setattr(gpu_check, "rows_of_step", lambda command, limit: part("step", 900, late)(limit))
    monkeypatch.setattr(gpu_check, "run_tests", lambda files, *more: part("tests", 50, {"ok": True})(*more))
    monkeypatch.setattr(gpu_check, "rows_of_ops", lambda command, names, *more: part("ops", 9, {"ok": True})(*more))
    args = type("Args", (), {f"limit_{name}": limit for name, limit in gpu_check.LIMITS.items()})()
    args.budget, args.tests, args.jobs = 255.5, [], 1
    results = gpu_check.Results(tmp_path / "gpu.json")
    assert gpu_check.check(results, gpu_check.parts(args, results)) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert given == {"copy": 30, "step": 200, "tests": 50.5} and now[0] <= args.budget
    assert found["failed"] == ["step", "ops"] and found["step"]["ran_out"] and found["ops"]["ran_out"]
    assert found["ops"]["error"] == "not begun: no time was left" and found["tests"]["ok"] and found["complete"]


def test_the_step_is_the_whole_one_on_new_shapes():
    """Its command line is one that the command takes."""
    import argparse

    from vjepa_fast.cli import bench

    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    args = parser.parse_args(gpu_check.STEP[1:])
    assert args.full_size and args.batches == [8, 64] and args.shapes == "new" and args.device == "cuda"
    assert {"vjepa_fast", "reference"} <= set(args.providers)


def test_kernels_are_compiled_whatever_the_environment_says(monkeypatch):
    for name in ("TRITON_INTERPRET", "VJEPA_FAST_BACKEND", "VJEPA_FAST_DEBUG"):
        monkeypatch.setenv(name, "1")
    env = gpu_check.environment()
    assert not {"TRITON_INTERPRET", "VJEPA_FAST_BACKEND", "VJEPA_FAST_DEBUG"} & set(env)
    assert env["PYTHONPATH"].split(os.pathsep)[0] == str(gpu_check.ROOT)


def test_a_signal_ends_what_runs_on_the_gpu(tmp_path):
    pid = tmp_path / "pid"
    code = (
        "import signal, sys; from benchmarks import gpu_check as g; signal.signal(signal.SIGTERM, g.stop); "
        f"g.run(['sh', '-c', 'echo $$ > {pid}; sleep 600'], 600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=gpu_check.ROOT, stdout=subprocess.PIPE, text=True)
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM and "interrupted" in process.stdout.read()
    assert not running(int(pid.read_text()))
