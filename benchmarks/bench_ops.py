"""Every op against the published algorithm, our eager code and torch.compile.

    make bench                                                 # all of them, or
    python benchmarks/bench_ops.py --json ops.json             # a table of all ops, batch 8 on a CPU, 32 on a GPU
    python benchmarks/bench_ops.py --ops latent_loss,rope3d --providers reference,fused
    python benchmarks/bench_ops.py --ops gelu_linear --providers reference,triton,quack,torch,inductor
    python benchmarks/bench_ops.py --show benchmarks/results/ops_cpu.json
    python -m pytest benchmarks/bench_ops.py --benchmark-only  # the same functions under pytest-benchmark

Outputs and gradients of the providers are compared first. ``ops/`` says what each computes,
``vjepa_fast/bench/timing.py`` how it is measured. A provider that fails, or computes something else than the first, has
a row with ``error``; the rest goes on. Exit code: 0, 1 if any row has an error, 3 if an error left the GPU unusable for
this process: the ops without rows were not begun then.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterable

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from benchmarks.ops import CASES, ON_GPU, Case, Inputs  # noqa: E402
from benchmarks.ops._inputs import record  # noqa: E402
from vjepa_fast.bench import errors, memory, results, timing  # noqa: E402

PROVIDERS = ("reference", "eager", "compiled", "fused")
WAYS = ("triton", "quack", "torch", "inductor")  # that some ops have beside; only measured where asked for
LOST = 3  # exit code
Functions = dict[str, Callable[[], object]]


def modes(case: Case) -> list[str]:
    return ["forward", "backward", "full"] if case.leaves else ["forward"]


def functions(case: Case, mode: str, providers: Iterable[str], failed: dict[str, str] | None = None) -> Functions:
    """Provider -> what to time in this mode. ``failed`` gets the error of one that cannot be built; None: raised."""
    found: Functions = {}
    for name in providers:
        try:
            fn = compiled(case) if name == "compiled" else case.functions.get(name)
        except Exception as error:
            if failed is None:
                raise
            failed[name] = errors.error_text(error)
            continue
        if fn is not None:
            found[name] = in_mode(fn, case, mode)
    return found


def compiled(case: Case) -> Callable[[], object] | None:
    if case.compile_ is None:
        return None
    if case.compiled is None:
        args = case.leaves if case.recorded else []
        fn = torch.compile(record(case.compile_, args) if case.recorded else case.compile_, dynamic=False)
        case.compiled = lambda: fn(*args)
    return case.compiled


def in_mode(fn, case, mode):
    if mode == "forward":

        def forward():
            with torch.no_grad():
                return fn()

        return forward
    keep: list = []

    def backward():
        if not keep:
            out = fn()
            keep.extend((out, cotangent(out)))
        return torch.autograd.grad(keep[0], case.leaves, keep[1], retain_graph=True)

    def full():
        out = fn()
        if not keep:
            keep.append(cotangent(out))
        return torch.autograd.grad(out, case.leaves, keep[0])

    return backward if mode == "backward" else full


def cotangent(out: torch.Tensor) -> torch.Tensor:
    """Random, for an output of ones would make some gradients 0; 2 for a loss."""
    if not out.dim():
        return torch.full_like(out, 2.0)
    g = torch.Generator(out.device).manual_seed(5)
    return torch.randn(out.shape, generator=g, device=out.device).to(out.dtype)


def check(case: Case, fns: Functions) -> dict[str, str]:
    """Errors of the providers that raise, or whose result is not the first one's: their times would compare nothing."""
    failed: dict[str, str] = {}
    if not case.compare or len(fns) < 2:
        return failed
    first, want = "", []
    for name, fn in fns.items():
        try:
            result = _tensors(fn())
            if not first:
                first, want = name, result
            elif (off := _difference(want, result, case.atol)) is not None:
                failed[name] = f"differs from {first} by {off:.3g} of the largest value"
        except Exception as error:
            failed[name] = errors.error_text(error)
    return failed


def _difference(want: list[torch.Tensor], got: list[torch.Tensor], atol: float) -> float | None:
    """The largest, over the largest value of the tensor, where more than one number in a million is off by ``atol``.

    Such a one may be: the slope of an absolute value where rounding decides the sign.
    """
    for a, b in zip(want, got):
        scale = a.double().abs().max().clamp(min=1e-12)
        off = (a.double() - b.double()).abs() / scale
        if (~(off <= atol)).sum() > 1e-6 * off.numel():
            return off.max().item()
    return None


def _tensors(x) -> list[torch.Tensor]:
    return [x] if isinstance(x, torch.Tensor) else list(x)


def measure(name: str, inputs: Inputs, providers, repeats: int, budget_s: float) -> list[dict]:
    """The rows of one op: of every provider that it has in a mode, those that fail included."""
    where, cpu, rows = results.describe(inputs.device), torch.device("cpu"), []
    what: dict[str, object] = {"op": name, "dtype": str(inputs.dtype).split(".")[1]}
    try:
        case = CASES[name](inputs)
    except Exception as error:
        what.update(shape="", mode="forward", peak_bytes=None, clock=None, **where)
        return [results.row([], None, provider=p, error=errors.error_text(error), **what) for p in providers]
    for mode in modes(case):
        failed: dict[str, str] = {}
        fns = functions(case, mode, providers, failed)
        failed.update(check(case, fns))
        good = {provider: fn for provider, fn in fns.items() if provider not in failed}
        taken = timing.times(good, inputs.device, repeats, budget_s, host=case.on_host, failed=failed)
        for provider in (p for p in providers if p in fns or p in failed):
            floor = {"forward": case.floor_bytes, "full": case.floor_full}.get(mode)
            if mode == "backward" and case.floor_full:
                floor = case.floor_full - (case.floor_bytes or 0)
            at = cpu if provider in case.on_host else inputs.device
            peak = None
            if mode != "backward" and provider not in failed:
                try:
                    peak = memory.peak_bytes(fns[provider], at)
                except Exception as error:
                    failed[provider] = errors.error_text(error)
            rows.append(
                results.row(
                    taken.get(provider, []),
                    floor,
                    **what,
                    shape=case.shape,
                    provider=provider,
                    mode=mode,
                    peak_bytes=peak,
                    **{**where, "device": results.describe(at)["device"]},
                    clock="device" if at.type == "cuda" else "wall",
                    error=failed.get(provider),
                )
            )
    return rows


def unusable(device: torch.device) -> bool:
    """Whether an error has left the GPU without use for this process, as an illegal access does."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ops", default="", help=f"comma-separated, of {', '.join(CASES)}; default all")
    parser.add_argument(
        "--providers", default=",".join(PROVIDERS), help=f"also {', '.join(WAYS)}, where an op has them"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default float32 on a CPU, bfloat16 else")
    parser.add_argument("--batch", type=int, help="clips; default 8 on a CPU, 32 else")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--budget", type=float, default=2.0, metavar="S", help="seconds per function, about")
    parser.add_argument("--json", metavar="PATH", help="also write the rows as JSON")
    parser.add_argument("--show", metavar="PATH", help="measure nothing; print the table of rows written by --json")
    args = parser.parse_args()
    if args.show:
        print(results.table(json.loads(pathlib.Path(args.show).read_text(encoding="utf-8"))))
        return 0
    names = [n for n in args.ops.split(",") if n]
    names = names or [n for n in CASES if args.device != "cpu" or n not in ON_GPU]
    for given, known in ((names, CASES), (args.providers.split(","), PROVIDERS + WAYS)):
        for n in given:
            if n not in known:
                parser.error(f"{n!r} is unknown; accepted: {', '.join(known)}")
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    inputs = Inputs(args.batch or (32 if gpu else 8), device, dtype)
    print(f"copy bandwidth {timing.copy_bandwidth(device) / 1e9:.1f} GB/s", file=sys.stderr, flush=True)
    rows = []
    for name in names:
        rows += measure(name, inputs, args.providers.split(","), args.repeats, args.budget)
        print(f"{name} done", file=sys.stderr, flush=True)
        if args.json:
            results.write(args.json, rows)
        if unusable(device):
            print(f"the GPU is of no more use to this process after {name}", file=sys.stderr)
            return LOST
    print(results.table(rows))
    return 1 if any(row["error"] for row in rows) else 0


# -- under pytest-benchmark --------------------------------------------------------------------------------------------
@functools.lru_cache(1)
def _case(name: str) -> Case:
    return CASES[name](Inputs(8, torch.device("cpu"), torch.float32))


@pytest.mark.parametrize("provider", ["reference", "eager", "fused"])
@pytest.mark.parametrize("mode", ["forward", "full"])
@pytest.mark.parametrize("name", list(CASES))
def test_op(benchmark, name, mode, provider):
    case = _case(name)
    fns = functions(case, mode, [provider]) if mode in modes(case) else {}
    if not fns:
        pytest.skip(f"{name} has no {provider}, {mode}")
    benchmark.group = f"{name} {mode}"
    benchmark.pedantic(fns[provider], rounds=3, warmup_rounds=1)


if __name__ == "__main__":
    sys.exit(main())
