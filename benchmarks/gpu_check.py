"""Everything that needs a GPU, in one command and one JSON file.

    make gpu-check
    python benchmarks/gpu_check.py --out benchmarks/results/gpu.json

From the source tree; needs torch, timm and pytest and installs nothing. Parts, in this order: measured copy bandwidth;
the whole step of the published recipe at batch 8 and 64, on mask shapes that are new at every step, ours and the
reference; the tests of TESTS on CUDA, a pytest process per file, several at a time, so that a crash takes one file
along; the op benchmarks. Every part has a time limit, and all of them together `--budget` seconds: what a part has left
over, another one does not get, and one that runs out is recorded with ``ran_out`` and with what it had found. One that
fails is recorded with its last lines and the next one runs. The file is written after each. Exit code: 0, 1 if anything
failed, 2 without CUDA.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed

ROOT = pathlib.Path(__file__).resolve().parent.parent
_SLOW = ("latent", "block_masks", "patchify", "saliency", "rope", "norm")  # first, so that none is waited for alone
_OPS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests" / "ops").glob("test_*.py"))
TESTS = (
    *(f"tests/ops/test_{name}.py" for name in _SLOW),
    "tests/kernels/test_aot.py",
    *(p for p in _OPS if not any(p.endswith(f"test_{name}.py") for name in _SLOW)),
    "tests/objectives/test_goldens.py",
    "tests/models/test_goldens.py",
    "tests/layers/test_attention.py",
    "tests/layers/test_attention_pinned.py",
    "tests/trainer/test_captured_gpu.py",
)
LIMITS = {"copy_bandwidth": 30, "step": 200, "tests": 120, "ops": 110}  # seconds
BUDGET = 470  # for all of it: 8 minutes with the start and the end
STEP = (
    *("bench", "step", "--device", "cuda", "--full-size", "--batches", "8,64", "--shapes", "new"),
    *("--providers", "vjepa_fast,reference", "--warmup", "3", "--repeats", "3"),
)
LOST = 3  # exit code of bench_ops.py where an error took the GPU away from the process; others may still use it
TAIL = 30  # lines of a failed part that are kept
_running: set[subprocess.Popen] = set()


def say(text: str) -> None:
    print(text, flush=True)


def run(command: list[str], limit: float, env: dict[str, str] | None = None) -> tuple[int | None, str]:
    """(exit code, None where the time limit ended it; output). The children of the process end with it."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env or environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        _running.add(process)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        end(process)
        process.wait()
        _running.discard(process)
        output.seek(0)
        return code, output.read().decode(errors="replace")


def end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def stop(signum: int, frame: object) -> None:
    """What a signal does: nothing is left running on the GPU. The file has what was known."""
    for process in list(_running):
        end(process)
    say("gpu-check: interrupted")
    os._exit(128 + signum)


def environment() -> dict[str, str]:
    """Of the processes: this source tree first, kernels compiled, backends and debug checks as they are by default."""
    dropped = ("TRITON_INTERPRET", "VJEPA_FAST_BACKEND", "VJEPA_FAST_DEBUG", "PYTEST_ADDOPTS")
    kept = {k: v for k, v in os.environ.items() if k not in dropped}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
    }


def tail(output: str) -> list[str]:
    return output.splitlines()[-TAIL:]


def outcome(code: int | None, limit: float) -> str:
    return f"stopped after {limit:.0f} s" if code is None else f"exit code {code}"


NO_TIME = "not begun: no time was left"


def ran_out(found: dict) -> bool:
    """Whether it was time that a part lacked, or a file of tests, an op or a provider in it."""
    inner = [*found.get("files", {}).values(), *found.get("rows", ())]
    if isinstance(found.get("failures"), dict):
        inner += found["failures"].values()
    texts = [part.get("error") or "" for part in (found, *inner)]
    return any(text.startswith(("stopped after", "not begun", "time limit")) for text in texts)


def clock() -> float:
    return time.monotonic()


# -- the tests ---------------------------------------------------------------------------------------------------------
def read_report(path: str) -> dict | None:
    """Counts and names of what failed, from a JUnit file; None where pytest did not get so far as to write it."""
    try:
        cases = list(xml.etree.ElementTree.parse(path).getroot().iter("testcase"))
    except (OSError, xml.etree.ElementTree.ParseError):
        return None
    found = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    for case in cases:
        kinds = {child.tag: child for child in case}
        broken = kinds.get("failure", kinds.get("error"))
        if broken is not None:
            found["failed"] += 1
            name = f"{case.get('classname', '')}::{case.get('name', '')}"
            found["failures"].append({"name": name, "message": (broken.get("message") or "")[:1000]})
        else:
            found["skipped" if "skipped" in kinds else "passed"] += 1
    return found


def read_output(output: str) -> dict:
    """The same from what ``pytest -v`` printed before it was ended."""
    said = re.findall(r"^(\S+::.+) (PASSED|FAILED|ERROR|SKIPPED)\b", output, re.MULTILINE)
    failures = [{"name": name, "message": ""} for name, word in said if word in ("FAILED", "ERROR")]
    counts = {word: sum(w == word for _, w in said) for word in ("PASSED", "SKIPPED")}
    return {"passed": counts["PASSED"], "failed": len(failures), "skipped": counts["SKIPPED"], "failures": failures}


def test_file(path: str, limit: float) -> dict:
    """Run one file of tests. ``error``: what no test of the file reports (a crash, an import, the time limit)."""
    began = clock()
    if limit < 1:
        return {**read_output(""), "error": NO_TIME, "tail": [], "seconds": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        report = os.path.join(folder, "report.xml")
        plugins = ["-p", "no:cacheprovider", "-p", "no:randomly"]  # in the order of the file: what it ended at is known
        command = [sys.executable, "-m", "pytest", "-v", *plugins, f"--junitxml={report}", path]
        code, output = run(command, limit, {**environment(), "OMP_NUM_THREADS": "2"})
        found = read_report(report) or read_output(output)
    if code not in (0, 1) or code == 1 and not found["failed"]:
        found.update(error=outcome(code, limit), tail=tail(output))
    return {**found, "seconds": round(clock() - began, 1)}


vars(test_file)["__test__"] = False  # for pytest: not a test


def run_tests(paths: Iterable[str], limit: float, jobs: int, report: Callable[[dict], None]) -> dict:
    """All files, ``jobs`` at a time; ``report`` gets what is known after each."""
    deadline = clock() + limit
    total = {"ok": False, "passed": 0, "failed": 0, "skipped": 0, "failures": [], "files": {}}
    with ThreadPoolExecutor(jobs) as pool:
        tasks = {pool.submit(lambda path=path: test_file(path, deadline - clock())): path for path in paths}
        for task in as_completed(tasks):
            path, found = tasks[task], task.result()
            for key in ("passed", "failed", "skipped", "failures"):
                total[key] += found[key]
            total["files"][path] = {k: v for k, v in found.items() if k != "failures"}
            say(
                f"  {path}: {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped, "
                f"{found['seconds']} s{', ' + found['error'] if 'error' in found else ''}"
            )
            report(total)
    broken = [path for path, found in total["files"].items() if "error" in found]
    if broken:
        total["error"] = f"no full report of {', '.join(broken)}"
    total["ok"] = not total["failed"] and not broken and total["passed"] > 0
    return total


# -- the benchmarks ----------------------------------------------------------------------------------------------------
def rows_of(command: list[str], limit: float) -> dict:
    """{ok, rows} of a benchmark that writes a JSON list of rows to ``--json PATH``; rows made before it broke count."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rows.json")
        code, output = run([*command, "--json", path], limit)
        try:
            rows = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            rows = []
    found = {"ok": code == 0 and bool(rows), "rows": rows}
    if not found["ok"]:
        found.update(error=outcome(code, limit) if code != 0 else "wrote no rows", exit_code=code, tail=tail(output))
    return found


def wrong_rows(rows: Iterable[dict]) -> dict[str, str]:
    """What failed -> its error, of rows that have one."""
    keys = ("op", "mode", "provider", "batch")
    return {" ".join(str(r[k]) for k in keys if k in r): r["error"] for r in rows if r.get("error")}


def rows_of_step(command: list[str], limit: float) -> dict:
    """`rows_of` the step benchmark; where some of its rows have errors, ``error`` says which."""
    found = rows_of([*command, "--budget", f"{0.9 * limit:.0f}"], limit)
    if wrong := wrong_rows(found["rows"]):
        texts = [f"{name}: {error}" for name, error in wrong.items()]
        found["error"] = "; ".join([*([found["error"]] if found.get("exit_code") is None else []), *texts])
    return found


def rows_of_ops(command: list[str], names: list[str], limit: float, report: Callable[[dict], None]) -> dict:
    """{ok, rows, failures} of ``command --ops NAMES``.

    Where an op breaks it, or takes the GPU away from its process, the ops after that one are run anew. An op some of
    whose providers have failed counts as a failure and has its rows.
    """
    deadline, total = clock() + limit, {"ok": False, "rows": [], "failures": {}}
    while names and (left := deadline - clock()) > 1:
        found = rows_of([*command, "--ops", ",".join(names)], left)
        total["rows"] += found["rows"]
        done = {row["op"] for row in found["rows"]}
        for name, error in wrong_rows(found["rows"]).items():
            total["failures"].setdefault(name.split()[0], {"error": f"{name}: {error}", "tail": []})
        names = [name for name in names if name not in done]
        if names and not (done and found.get("exit_code") == LOST):  # the first of these is where it ended
            broken, *names = names
            total["failures"][broken] = {"error": found.get("error", "no rows"), "tail": found.get("tail", [])}
            say("\n  | ".join([f"  {broken}: {found.get('error', 'no rows')}", *found.get("tail", [])]))
        report(total)
    for name in names:
        total["failures"][name] = {"error": NO_TIME, "tail": []}
    if total["failures"]:
        have = {row["op"] for row in total["rows"]}
        none, some = ([name for name in total["failures"] if (name in have) == yes] for yes in (False, True))
        parts = (("no rows of", none), ("errors in", some))
        total["error"] = ", ".join(f"{words} {', '.join(those)}" for words, those in parts if those)
    total["ok"] = not total["failures"] and bool(total["rows"])
    return total


def over_bandwidth(rows: list[dict], bytes_per_s: float | None) -> None:
    """Adds ``of_copy_bandwidth`` to rows that have the number of bytes they cannot avoid moving."""
    for row in rows:
        floor, ms = row.get("floor_bytes"), row.get("median_ms")
        if floor and ms and bytes_per_s:
            row["of_copy_bandwidth"] = round(floor / (1e-3 * ms) / bytes_per_s, 4)


_COPY = "import torch; from vjepa_fast.bench import timing; print(timing.copy_bandwidth(torch.device('cuda')))"


def copy_bandwidth(limit: float, code: str = _COPY) -> dict:
    """Bytes per second, read and written, of ``copy_`` on a tensor of 1 GiB, in a process of its own."""
    status, output = run([sys.executable, "-c", code], limit)
    if status != 0:
        return {"ok": False, "error": outcome(status, limit), "tail": tail(output)}
    return {"ok": True, "bytes_per_s": float(output.split()[-1])}


# -- all of it ---------------------------------------------------------------------------------------------------------
def about() -> dict:
    """The machine and the versions."""
    import importlib.metadata

    import torch

    from vjepa_fast.trainer.run_folder import git_commit

    def version(name: str) -> str | None:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
        return None

    return {
        "device": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "torch": str(torch.__version__),
        "triton": version("triton"),
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "commit": git_commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def driver() -> str | None:
    """The version of the NVIDIA driver, as nvidia-smi gives it."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        )
        return done.stdout.split()[0] if done.stdout.split() else None
    return None


class Results:
    """The JSON file, written anew whenever something is known."""

    def __init__(self, path: pathlib.Path):
        self.path, self.found, self.began = path, {}, clock()

    def add(self, **parts) -> None:
        self.found.update(parts)
        self.found["seconds"] = round(clock() - self.began, 1)
        from vjepa_fast.files import write_json

        write_json(self.path, self.found)

    def part(self, name: str, work: Callable[[], dict]) -> dict:
        """Do ``work`` and keep its result; what it raises is its result too."""
        say(f"{name} ...")
        began = clock()
        try:
            result = work()
        except Exception as error:
            result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        if not result.get("ok") and ran_out(result):
            result["ran_out"] = True
        self.add(**{name: result})
        state = "ok" if result.get("ok") else f"FAILED {result.get('error', '')}"
        say(f"{name}: {state}, {clock() - began:.0f} s")
        for line in result.get("tail", []):
            say(f"  | {line}")
        return result


def parts(args: argparse.Namespace, results: Results) -> dict[str, Callable[[], dict]]:
    """Name -> what to do, in order; each within its limit and what is left of the budget of all."""

    def ops(limit: float) -> dict:
        sys.path.insert(0, str(ROOT))
        from benchmarks.ops import CASES

        def known(total: dict) -> None:
            over_bandwidth(total["rows"], results.found.get("copy_bandwidth", {}).get("bytes_per_s"))
            results.add(ops=total)

        command = [sys.executable, "benchmarks/bench_ops.py", "--device", "cuda", "--budget", "0.5"]
        return rows_of_ops(command, list(CASES), limit, known)

    work: dict[str, Callable[[float], dict]] = {
        "copy_bandwidth": copy_bandwidth,
        "step": lambda limit: rows_of_step([sys.executable, "-m", "vjepa_fast", *STEP], limit),
        "tests": lambda limit: run_tests(args.tests, limit, args.jobs, lambda total: results.add(tests=total)),
        "ops": ops,
    }

    def within(name: str) -> dict:
        left = args.budget - (clock() - results.began)
        limit = min(getattr(args, f"limit_{name}"), left)
        return work[name](limit) if limit >= 1 else {"ok": False, "error": NO_TIME}

    return {name: functools.partial(within, name) for name in work}


def check(results: Results, work: dict[str, Callable[[], dict]]) -> int:
    """Do all parts, whatever becomes of them; 0 if all are well, else 1."""
    results.add(complete=False)
    failed = [name for name, do in work.items() if not results.part(name, do).get("ok")]
    results.add(complete=True, failed=failed)
    for failure in results.found.get("tests", {}).get("failures", []):
        say(f"  failed: {failure['name']}")
    say(f"{results.path}: {'failed: ' + ', '.join(failed) if failed else 'all is well'}, {results.found['seconds']} s")
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks/results/gpu.json", metavar="PATH")
    parser.add_argument("--skip", action="append", default=[], choices=list(LIMITS), help="leave a part out")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="FILE", help="these files of tests alone")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), help="test files at a time")
    for name, limit in LIMITS.items():
        option = f"--limit-{name.replace('_', '-')}"
        parser.add_argument(option, type=float, default=limit, metavar="S", help=f"seconds (default {limit})")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, metavar="S", help=f"seconds for all parts (default {BUDGET})"
    )
    args = parser.parse_args(argv)
    try:
        import torch
    except ImportError as error:
        say(f"gpu-check: torch does not import: {error}")
        return 2
    if not torch.cuda.is_available():
        say(f"gpu-check: torch {torch.__version__} finds no CUDA device here")
        return 2
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    results = Results(args.out)
    results.add(**about())
    say(
        f"{results.found['device']}, torch {results.found['torch']}, Triton {results.found['triton']}, "
        f"commit {results.found['commit']}; results go to {args.out}"
    )
    return check(results, {name: do for name, do in parts(args, results).items() if name not in args.skip})


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    sys.exit(main())
