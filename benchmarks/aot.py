"""Compile every Triton kernel for GPUs that need not be here; registers, spills and shared memory go to a JSON file.

    python benchmarks/aot.py                       # table, sm_80 sm_90 sm_100; fails on spills
    python benchmarks/aot.py --json PATH           # also write the rows
    python benchmarks/aot.py --check PATH          # also fail where a build needs more than PATH says
    python benchmarks/aot.py --check PATH --changed    # compile what differs from what PATH was recorded of, and a few

Each module of ``kernels/`` lists its kernels in ``variants()``. Needs Triton and no GPU; run without TRITON_INTERPRET.
A build is compared with one recorded by the same Triton only; by another one, spills are all that is looked at. Every
row has a digest of what was compiled (the kernel with all that it calls, types, constants, options, architecture):
under the same Triton the same digest compiles to the same code.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import pkgutil
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triton.compiler import ASTSource

ARCHS = (80, 90, 100)
SLACK = {"registers": 8, "shared": 1024}  # by which a build may grow unnoticed
SPREAD = 25  # with --changed, every so many'th build is compiled though nothing changed


@functools.cache
def all_variants() -> dict[str, dict]:
    """Name -> {fn, signature, constexprs, num_warps, num_stages, maxnreg, aligned}, over the modules of ``kernels``.

    ``arch``: the only one that it is for. ``least``: the first.
    """
    from vjepa_fast import kernels

    found = {}
    for module in pkgutil.iter_modules(kernels.__path__):
        if not module.name.startswith("_"):
            variants = importlib.import_module(f"vjepa_fast.kernels.{module.name}").variants
            # the latent losses take the device functions that the objectives bring along
            arguments = [device_functions()] if module.name == "latent" else []
            for name, variant in variants(*arguments).items():
                found[f"{module.name}.{name}"] = variant
    return found


def device_functions() -> dict:
    """Key -> Triton device function, of every row function that the objectives define."""
    from vjepa_fast.objectives import build_objectives
    from vjepa_fast.ops._latent_kernels import device_function
    from vjepa_fast.ops.latent import functions

    for spec in (
        {"pred": {}, "delta": {}, "ltc": {}, "velgate": {}, "spectral": {}, "kinematic": {}},
        {"pred": {"loss_exp": 2}, "kinematic": {"type": "huber"}},
        {"pred": {"loss_exp": 1.5}},
    ):
        plan = build_objectives(spec, levels=4, embed_dim=8, target_grad=True)
        for term in plan.terms.values():
            term.lower(plan.ctx)
    return {key: device_function(key) for key in functions()}


def source_of(name: str, arch: int) -> tuple[ASTSource, dict]:
    """What Triton compiles for a variant, and with which options."""
    from triton.compiler import ASTSource

    v = all_variants()[name]
    fn, constexprs = v["fn"], v["constexprs"]
    names = list(fn.arg_names)
    unknown = set(names) ^ (set(v["signature"]) | set(constexprs))
    if unknown:
        raise SystemExit(f"{name}: variants() and the kernel's arguments differ in {sorted(unknown)}")
    source = ASTSource(
        fn,
        {n: "constexpr" if n in constexprs else v["signature"][n] for n in names},
        {(names.index(n),): value for n, value in constexprs.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in v.get("aligned", ())},
    )
    bound = v.get("maxnreg")
    bound = bound(arch) if callable(bound) else bound
    return source, {"num_warps": v.get("num_warps", 4), "num_stages": v.get("num_stages", 3), "maxnreg": bound}


def digest(name: str, arch: int) -> str:
    """Of all that decides the code of a build but the version of Triton."""
    source, options = source_of(name, arch)
    return hashlib.sha256(f"{source.hash()} {sorted(options.items())} {arch}".encode()).hexdigest()[:16]


def compile_one(name: str, arch: int) -> dict:
    """Registers, spills and shared memory of one variant, as ptxas reports them."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    source, options = source_of(name, arch)
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)

    def number(pattern: str) -> int:
        found = re.search(pattern, log.getvalue())
        return int(found[1]) if found else 0

    registers = number(r"Used (\d+) registers")
    if not registers:
        raise SystemExit(f"{name}: ptxas reported no register count for sm_{arch}")
    return {
        "kernel": name,
        "arch": arch,
        "digest": digest(name, arch),
        "num_warps": options["num_warps"],
        "registers": registers,
        "spill_stores": number(r"(\d+) bytes spill stores"),
        "spill_loads": number(r"(\d+) bytes spill loads"),
        "shared": compiled.metadata.shared,
    }


def problems(rows: list[dict], triton_version: str, recorded: dict | None, partial: bool = False) -> list[str]:
    """Spills, and what differs for the worse from the recorded run of the same Triton.

    ``partial``: not every kernel was built, so that recorded ones may be missing.
    """
    found = [
        f"{_build(r)}: spills {r['spill_stores']}+{r['spill_loads']} bytes"
        for r in rows
        if r["spill_stores"] or r["spill_loads"]
    ]
    if not recorded or recorded["triton"] != triton_version:
        return found
    before = {_build(r): r for r in recorded["rows"]}
    for r in rows:
        old = before.pop(_build(r), None)
        if old is None:
            found.append(f"{_build(r)}: not recorded; run benchmarks/aot.py --json again")
            continue
        found += [
            f"{_build(r)}: {key} {r[key]}, recorded {old[key]}"
            for key, slack in SLACK.items()
            if r[key] > old[key] + slack
        ]
    return found + [
        f"{build}: recorded, but no kernel of that name; run benchmarks/aot.py --json again"
        for build in before
        if not partial
    ]


def unchanged(builds: list[tuple[str, int]], recorded: dict, spread: int = SPREAD) -> dict[tuple[str, int], dict]:
    """The recorded rows of the builds whose digest is the recorded one, but every ``spread``'th."""
    rows = {(r["kernel"], r["arch"]): r for r in recorded["rows"]}
    same = [b for b in builds if b in rows and rows[b].get("digest") == digest(*b)]
    return {b: rows[b] for number, b in enumerate(same) if number % spread}


def _build(row: dict) -> str:
    return f"{row['kernel']} sm_{row['arch']}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", help="compute capability x 10; default 80, 90 and 100")
    parser.add_argument("--only", default="", help="part of a kernel's name")
    parser.add_argument("--changed", action="store_true", help="with --check: compile what changed, and a few builds")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--check", metavar="PATH")
    args = parser.parse_args()
    recorded = None
    if args.check:
        with open(args.check, encoding="utf-8") as f:
            recorded = json.load(f)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # else Triton 3.9 warns that the default will change
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        import triton
        from triton import knobs

        if knobs.runtime.interpret:
            parser.error("TRITON_INTERPRET is set; without it kernels are compiled")
        every = all_variants()  # here, so that the workers inherit them
        builds = [
            (n, arch)
            for n in every
            for arch in args.arch or ARCHS
            if args.only in n and arch == every[n].get("arch", arch) and arch >= every[n].get("least", arch)
        ]
        known = {}
        if args.changed and recorded and recorded["triton"] == triton.__version__:
            known = unchanged(builds, recorded)
        with ProcessPoolExecutor(args.jobs) as pool:
            tasks = {build: pool.submit(compile_one, *build) for build in builds if build not in known}
            compiled = {build: task.result() for build, task in tasks.items()}
        rows = [known.get(build) or compiled[build] for build in builds]
    for r in compiled.values():
        print(
            f"{r['kernel']:<48} sm_{r['arch']:<4} {r['num_warps']} warps  {r['registers']:>3} registers  "
            f"{r['spill_stores']}+{r['spill_loads']} B spilled  {r['shared']} B shared"
        )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump({"triton": triton.__version__, "rows": rows}, f, indent=1)
            f.write("\n")
    bad = problems(rows, triton.__version__, recorded, partial=bool(args.only or args.arch))
    if recorded and recorded["triton"] != triton.__version__:  # another compiler: what it spills is not our change
        print("\n".join(bad))
        print(f"recorded by Triton {recorded['triton']}, this is {triton.__version__}: all compile")
        bad = []
    more = f", {len(known)} of them as recorded" if known else ""
    print("\n".join(bad) if bad else f"{len(rows)} builds, no spills{more}")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
