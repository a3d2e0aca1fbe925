"""Everything that needs a GPU, in one command and one JSON file: ``make gpu-check``, or

    python benchmarks/gpu_check.py --out benchmarks/results/gpu.json

From the source tree; needs torch, timm and pytest and installs nothing. Parts, in this order: measured copy bandwidth,
the tests of TESTS on CUDA (a pytest process per file, several at a time, so that a crash takes one file along), the op
benchmarks, the step benchmark. Every part has a time limit; one that fails is recorded with its last lines and the next
one runs. The file is written after each. Exit code: 0, 1 if anything failed, 2 without CUDA.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parent.parent
TESTS = (  # those that take longest first
    "tests/ops/test_latent_backends.py", "tests/ops/test_block_masks_backends.py", "tests/ops/test_patchify_backends.py",
    "tests/ops/test_saliency_backends.py", "tests/ops/test_rope_backends.py", "tests/ops/test_norm_backends.py",
    "tests/kernels/test_aot.py", "tests/ops/test_distance.py", "tests/ops/test_patchify.py", "tests/ops/test_backend.py",
    "tests/ops/test_debug_checks.py", "tests/ops/test_norm.py", "tests/ops/test_rope.py",
    "tests/objectives/test_goldens.py", "tests/models/test_goldens.py", "tests/models/test_segments.py",
)
LIMITS = {"tests": 240, "ops": 150, "step": 60}  # seconds; with the rest under 8 minutes
TAIL = 30  # lines of a failed part that are kept


def say(text: str) -> None:
    print(text, flush=True)


def run(command: list[str], limit: float, env: dict[str, str] | None = None) -> tuple[int | None, str]:
    """(exit code, None where the time limit ended it; output). The children of the process end with it."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=ROOT, env=env or environment(), stdout=output, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            code = process.wait(max(0.1, limit))
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also when interrupted
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return code, output.read().decode(errors="replace")


def environment() -> dict[str, str]:
    """Of the processes: this source tree first, kernels compiled, backends and debug checks as they are by default."""
    dropped = ("TRITON_INTERPRET", "VJEPA_FAST_BACKEND", "VJEPA_FAST_DEBUG", "PYTEST_ADDOPTS")
    kept = {k: v for k, v in os.environ.items() if k not in dropped}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH")))),
            "PYTHONUNBUFFERED": "1"}


def tail(output: str) -> list[str]:
    return output.splitlines()[-TAIL:]


def outcome(code: int | None, limit: float) -> str:
    return f"stopped after {limit:.0f} s" if code is None else f"exit code {code}"


# -- the tests ---------------------------------------------------------------------------------------------------------
def read_report(path: str) -> dict:
    """Counts and names of what failed, from a JUnit file; {} where pytest did not get so far as to write it."""
    try:
        cases = list(xml.etree.ElementTree.parse(path).getroot().iter("testcase"))
    except (OSError, xml.etree.ElementTree.ParseError):
        return {}
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


def test_file(path: str, limit: float) -> dict:
    """Run one file of tests. ``error`` tells of what no test of the file says: a crash, an import, the time limit."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = os.path.join(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--junitxml={report}", path]
        code, output = run(command, limit, {**environment(), "OMP_NUM_THREADS": "2"})
        found = {"passed": 0, "failed": 0, "skipped": 0, "failures": [], **read_report(report)}
    if code not in (0, 1) or code == 1 and not found["failed"]:
        found.update(error=outcome(code, limit), tail=tail(output))
    return {**found, "seconds": round(time.monotonic() - began, 1)}


def run_tests(paths: tuple[str, ...], limit: float, jobs: int, report: Callable[[dict], None]) -> dict:
    """All files, ``jobs`` at a time; ``report`` gets what is known after each."""
    deadline, total = time.monotonic() + limit, {"passed": 0, "failed": 0, "skipped": 0, "failures": [], "files": {}}

    def one(path: str) -> dict:
        return test_file(path, deadline - time.monotonic())

    with ThreadPoolExecutor(jobs) as pool:
        for path, found in zip(paths, pool.map(one, paths)):
            for key in ("passed", "failed", "skipped", "failures"):
                total[key] += found[key]
            total["files"][path] = {k: v for k, v in found.items() if k != "failures"}
            say(f"  {path}: {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped, "
                f"{found['seconds']} s{', ' + found['error'] if 'error' in found else ''}")
            report(total)
    total["ok"] = not total["failed"] and not any("error" in f for f in total["files"].values()) and total["passed"] > 0
    return total


# -- the benchmarks ----------------------------------------------------------------------------------------------------
def rows_of(command: list[str], limit: float) -> dict:
    """{ok, rows} of a benchmark that writes a JSON list of rows to ``--json PATH``; rows made before it broke count."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "rows.json")
        code, output = run([*command, "--json", path], limit)
        try:
            rows = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            rows = []
    found = {"ok": code == 0 and bool(rows), "rows": rows, "seconds": round(time.monotonic() - began, 1)}
    if not found["ok"]:
        found.update(error=outcome(code, limit) if code != 0 else "wrote no rows", tail=tail(output))
    return found


def over_bandwidth(rows: list[dict], bytes_per_s: float | None) -> None:
    """Adds ``of_copy_bandwidth`` to rows that tell how many bytes they cannot avoid moving."""
    for row in rows:
        floor, ms = row.get("floor_bytes"), row.get("median_ms")
        if floor and ms and bytes_per_s:
            row["of_copy_bandwidth"] = round(floor / (1e-3 * ms) / bytes_per_s, 4)


def copy_bandwidth(size: int = 1 << 30, repeats: int = 20) -> float:
    """Bytes per second, read and written, of ``copy_`` on a tensor of ``size`` bytes: the median."""
    import torch

    source, target = (torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    times = []
    for n in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        if n >= 3:
            times.append(1e-3 * begin.elapsed_time(end))
    del source, target
    torch.cuda.empty_cache()  # the parts to come are processes of their own
    return 2 * size / statistics.median(times)


# -- all of it ---------------------------------------------------------------------------------------------------------
def about() -> dict:
    """The machine and the versions."""
    import importlib.metadata

    import torch

    sys.path.insert(0, str(ROOT))
    from vjepa_fast.trainer.run_folder import git_commit

    def version(name: str) -> str | None:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
        return None

    return {
        "device": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability()),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory, "driver": driver(),
        "cuda": torch.version.cuda, "torch": str(torch.__version__), "triton": version("triton"),
        "numpy": version("numpy"), "python": platform.python_version(), "commit": git_commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def driver() -> str | None:
    """The version of the NVIDIA driver, as nvidia-smi gives it."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], check=True,
                              capture_output=True, text=True, timeout=30)
        return done.stdout.split()[0] if done.stdout.split() else None
    return None


class Results:
    """The JSON file, written anew whenever something is known."""

    def __init__(self, path: pathlib.Path):
        self.path, self.found, self.began = path, {}, time.monotonic()

    def add(self, **parts) -> None:
        self.found.update(parts)
        self.found["seconds"] = round(time.monotonic() - self.began, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        new.replace(self.path)  # whole, or not at all

    def part(self, name: str, work: Callable[[], dict]) -> dict:
        """Do ``work`` and keep its result; what it raises is its result too."""
        say(f"{name} ...")
        began = time.monotonic()
        try:
            result = work()
        except Exception as error:
            result = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        self.add(**{name: result})
        state = "ok" if result.get("ok") else f"FAILED {result.get('error', '')}"
        say(f"{name}: {state}, {time.monotonic() - began:.0f} s")
        for line in result.get("tail", []):
            say(f"  | {line}")
        return result


def check(args: argparse.Namespace) -> int:
    """All parts; 0 if all are well, else 1."""
    results = Results(args.out)
    results.add(complete=False, **about())
    say(f"{results.found['device']}, torch {results.found['torch']}, Triton {results.found['triton']}, "
        f"commit {results.found['commit']}; results go to {args.out}")

    def bandwidth() -> dict:
        return {"ok": True, "bytes_per_s": copy_bandwidth()}

    def tests() -> dict:
        return run_tests(args.tests, args.limit_tests, args.jobs, lambda known: results.add(tests=known))

    def benchmark(*command: str, limit: float) -> dict:
        found = rows_of([sys.executable, *command], limit)
        over_bandwidth(found["rows"], results.found["copy_bandwidth"].get("bytes_per_s"))
        return found

    work = {
        "copy_bandwidth": bandwidth,
        "tests": tests,
        "ops": lambda: benchmark("benchmarks/bench_ops.py", "--device", "cuda", limit=args.limit_ops),
        "step": lambda: benchmark("-m", "vjepa_fast.cli", "bench", "step", "--device", "cuda", limit=args.limit_step),
    }
    done = {name: results.part(name, do) for name, do in work.items() if name not in args.skip}
    failed = [name for name, result in done.items() if not result["ok"]]
    results.add(complete=True, failed=failed)
    for failure in done.get("tests", {}).get("failures", []):
        say(f"  failed: {failure['name']}")
    say(f"{args.out}: {'failed: ' + ', '.join(failed) if failed else 'all is well'}, {results.found['seconds']:.0f} s")
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results" / "gpu.json", metavar="PATH")
    parser.add_argument("--skip", action="append", default=[], choices=["copy_bandwidth", "tests", "ops", "step"])
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="FILE", help="these files of tests alone")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="test files at a time (%(default)s)")
    for name, seconds in LIMITS.items():
        parser.add_argument(f"--limit-{name}", type=float, default=seconds, metavar="S", help="seconds (%(default)s)")
    args = parser.parse_args(argv)
    try:
        import torch
    except ImportError as error:
        say(f"gpu-check: torch does not import: {error}")
        return 2
    if not torch.cuda.is_available():
        say(f"gpu-check: torch {torch.__version__} finds no CUDA device here")
        return 2
    return check(args)


if __name__ == "__main__":
    sys.exit(main())
