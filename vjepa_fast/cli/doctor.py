"""``vjepa-fast doctor``: what is on this machine, which backend runs each op here, what can be named, and why not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vjepa_fast.cli._arguments import add_json
from vjepa_fast.cli._console import say
from vjepa_fast.cli._doctor_warm import compute_capability, warm

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

HELP = "report what this machine has, which backend runs each op, what can be used by name, and why others cannot"

WIDTH = 100
PACKAGES = {  # distribution names -> what it is for
    ("torch",): "everything",
    ("triton", "pytorch-triton", "triton-windows"): "the fused kernels on CUDA devices",
    ("av",): "reading videos",
    ("timm",): "the encoders under timm's names (timm.create_model)",
    ("xformers",): "the attention backend xformers",
    ("nvidia-cuda-runtime-cu12",): "libcudart.so.12, which the library of xformers asks for",
    ("flash-attn-4",): "the attention backend fa4",
    ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110"): "the decoder dali",
    ("torchcodec",): "the decoders torchcodec and torchcodec-cuda",
}
SHOWN = {"nvidia-dali-cuda130": "DALI", "nvidia-cuda-runtime-cu12": "CUDA 12 runtime", "av": "PyAV"}
VARIABLES = {  # ours -> what reads it
    "VJEPA_FAST_BACKEND": "forces the backend of every op",
    "VJEPA_FAST_BUILD": "read by setup.py only",
    "VJEPA_FAST_DEBUG": "1 checks token indices on every device, which waits for it",
    "VJEPA_FAST_REPOSITORY": "read by setup.py only",
    "VJEPA_FAST_PLUGINS": "modules that are imported to register what they add",
}
THEIRS = ("TRITON_INTERPRET", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "XDG_CACHE_HOME")
CODECS = ("h264", "hevc", "av1", "vp9", "vp8", "mpeg4", "mjpeg")
ATTENTION = (
    "implementation",
    "on_device",
    "graph",
    "whole_graph",
    "capture",
    "deterministic",
)  # what a backend of attention declares
KERNELS = {
    "any": "what torch chooses",
    "cudnn": "cuDNN",
    "flash": "FlashAttention 2",
    "fa3": "FlashAttention 3",
    "fa4": "FlashAttention 4",
    "triton": "Triton kernels of this package",
}
DEVICES = {"cpu": {"triton": "supports CUDA tensors only"}, "cuda": {"cpp": "supports tensors on the CPU only"}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_json(parser, "everything")
    parser.add_argument(
        "--warm",
        nargs="*",
        metavar="CONFIG [KEY=VALUE]",
        help="report nothing; compile the Triton kernels of a recipe, file or run folder (none: the defaults) ahead",
    )
    parser.add_argument(
        "--arch", type=compute_capability, metavar="SM", help="with --warm: for this GPU, such as sm_90, not that here"
    )


def run(args: argparse.Namespace) -> int:
    """Print the report, and write it where asked; or compile kernels ahead."""
    if args.warm is not None:
        return warm(args.warm, args.arch)
    from vjepa_fast.files import write_json

    report = examine()
    if args.json:
        write_json(args.json, report)
    say(*text(report)[1:])
    return 0


def examine() -> dict[str, Any]:
    """The report: plain values, as --json writes them. A part that cannot be looked at holds its ``error`` instead."""
    report: dict[str, Any] = {"system": system(), "packages": packages()}
    parts = {"cuda": cuda, "extension": extension, "ops": backends, "attention": attention, "kinds": kinds}
    for name, look in {**parts, "decoders": decoders, "graphs": graphs}.items():
        try:
            report[name] = look()
        except Exception as error:  # a broken installation is what this command is for
            report[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    report["environment"] = environment()
    report["advice"] = advice(report)
    return report


def system() -> dict[str, Any]:
    """Versions, processor and memory."""
    import os
    import platform
    import sys
    from pathlib import Path

    from vjepa_fast import __version__

    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="ignore") as f:
            name = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), name)
    except OSError:
        pass
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))  # of a container
    except (OSError, ValueError):
        limit = None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "vjepa_fast": __version__,
        "folder": str(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "executable": sys.executable,
        "os": platform.platform(),
        "cpu": name,
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "memory_bytes": memory,
        "memory_limit_bytes": limit,
    }


def packages() -> dict[str, Any]:
    """Name -> {version or None, gives}."""
    import contextlib
    from importlib import metadata

    found = {}
    for names, gives in PACKAGES.items():
        version = None
        for name in names:
            with contextlib.suppress(metadata.PackageNotFoundError):
                version = version or metadata.version(name)
        found[SHOWN.get(names[0], names[0])] = {"version": version, "gives": gives}
    return found


def cuda() -> dict[str, Any]:
    """Driver, devices, and what torch was built for."""
    import torch

    devices = []
    for n in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        d = torch.cuda.get_device_properties(n)
        devices.append({"name": d.name, "capability": f"{d.major}.{d.minor}", "memory_bytes": d.total_memory})
    return {
        "torch_built_for": torch.version.cuda,
        "driver": driver(),
        "devices": devices,
        "torch_cpu_instructions": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
    }


def driver() -> str | None:
    """Version of NVIDIA's driver; None if there is none or it does not answer."""
    import subprocess

    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, text=True, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.split() if done.returncode == 0 else []
    return lines[0] if lines else None


def extension() -> dict[str, Any]:
    """Whether the C++ library is loaded, why not, and sources that are newer than it."""
    from vjepa_fast.ops import _cpp

    sources = (_cpp.PATH.parent.parent / "csrc").glob("*")  # there in a checkout only
    built = _cpp.PATH.stat().st_mtime if _cpp.PATH.is_file() else float("inf")
    newer = sorted(s.name for s in sources if s.stat().st_mtime > built)
    return {"loaded": _cpp.LOADED, "path": str(_cpp.PATH), "reason": _cpp.REASON, "newer_sources": newer}


def backends() -> dict[str, Any]:
    """The choice in force and, by op and device, the backend that it takes (None: refused) and why not the others."""
    import torch

    from vjepa_fast import ops
    from vjepa_fast.errors import UserError
    from vjepa_fast.ops import _backend, _triton

    try:
        choice, error = ops.current_backend(), ""
    except UserError as e:
        choice, error = "auto", str(e)
    table: dict[str, dict[str, Any]] = {}
    with ops.use_backend(choice):
        report = ops.backend_report()
        for device in DEVICES if torch.cuda.is_available() else ("cpu",):
            for op, row in report.items():
                limits = {} if _triton.interpreted() else DEVICES[device]
                why = {backend: reason or limits.get(backend, "") for backend, reason in row.items()}
                free = [backend for backend in _backend.BACKENDS if not why[backend]]
                taken = next((b for b in free if choice in ("auto", b)), None)
                table.setdefault(op, {})[device] = {
                    "backend": taken,
                    "why_not": {b: reason for b, reason in why.items() if reason},
                }
    return {"choice": choice, "choice_error": error, "table": table}


def attention() -> dict[str, Any]:
    """Backends of attention by name, with what each declares, and what ``auto`` has measured, by environment."""
    from vjepa_fast.layers.attention import BACKENDS
    from vjepa_fast.layers.attention.table import Table, path

    call = _attention_call()
    found = {
        name: {
            "why_not": backend.objections(call),
            "version": backend.version(),
            **{key: getattr(backend, key) for key in ATTENTION},
        }
        for name, backend in BACKENDS.items()
    }
    return {"backends": found, "table": {"path": str(path()), "environments": Table().environments()}}


def graphs() -> dict[str, Any]:
    """What of a step with default settings is captured as a CUDA graph here, and why not more."""
    from vjepa_fast.config import from_dict
    from vjepa_fast.trainer.preflight import check

    how, reasons = check(from_dict({})).graphs
    return {"how": how, "why_not": reasons}


def kinds() -> dict[str, Any]:
    """Kind -> name -> {from: module, why_not: reasons against it here}, or {error} where a kind cannot be asked."""
    from vjepa_fast.registry import KINDS, registry_of

    found: dict[str, Any] = {}
    for kind in KINDS:
        try:
            entries = registry_of(kind).items()
            found[kind] = {name: {"from": _origin(e), "why_not": _why_not(kind, e)} for name, e in entries}
        except Exception as error:  # a plugin that cannot be imported, say
            found[kind] = {"error": f"{error}".splitlines()[0] if str(error) else type(error).__name__}
    return found


def _origin(entry: object) -> str:
    return getattr(entry, "__module__", None) or type(entry).__module__


def _why_not(kind: str, entry: Any) -> list[str]:
    """What an entry objects to being used here: its ``objections``, if it has any."""
    if not hasattr(entry, "objections"):
        return []
    return entry.objections(_attention_call()) if kind == "attention backend" else entry.objections()


def _attention_call() -> Any:
    """A call such as training makes on this machine."""
    import torch

    from vjepa_fast.layers.attention import Call

    gpu = torch.cuda.is_available()
    return Call(torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float32, head_dim=64)


def decoders() -> dict[str, Any]:
    """What reads videos and images: {version, formats}, or {error}."""
    found: dict[str, Any] = {}
    try:
        import av

        formats = [c for c in CODECS if c in av.codecs_available]
        found["videos"] = {"by": f"PyAV {av.__version__}", "formats": formats}
    except Exception as error:
        found["videos"] = {"error": f"PyAV does not import: {error}".splitlines()[0]}
    try:
        import PIL
        from PIL import features

        formats = ["png", *(f for f, name in (("jpeg", "jpg"), ("webp", "webp")) if features.check(name))]
        found["images"] = {"by": f"Pillow {PIL.__version__}", "formats": formats}
    except Exception as error:
        found["images"] = {"error": f"Pillow does not import: {error}".splitlines()[0]}
    return found


def environment() -> dict[str, str]:
    """The variables in force that matter here."""
    import os

    return {k: v for k, v in sorted(os.environ.items()) if k.startswith("VJEPA_FAST_") or k in THEIRS}


def advice(report: Mapping[str, Any]) -> list[str]:
    """What a user can do about the things found."""
    import shutil

    said: list[str] = []
    gpu, built, choice = report["cuda"], report["extension"], report["ops"]
    broken = [part["error"] for part in (gpu, built, choice) if "error" in part]
    said += [f"reinstall torch and vjepa-fast: {error}" for error in dict.fromkeys(broken)]
    if gpu.get("driver") and not gpu["devices"]:
        why = "torch is a build without CUDA, install one with it"
        if built_for := gpu["torch_built_for"]:
            why = f"the driver may be too old for CUDA {built_for}, or CUDA_VISIBLE_DEVICES hides it"
        said.append(f"there is an NVIDIA driver, but torch finds no device: {why}")
    if gpu.get("devices"):
        if not report["packages"]["triton"]["version"]:
            said.append("install triton: without it the ops run eager PyTorch on the GPU")
        elif not any(shutil.which(c) for c in ("cc", "gcc", "clang")):
            said.append("install a C compiler (gcc): triton needs one to start its kernels")
    if not built.get("loaded", True):
        said.append("for the C++ kernels: install g++ or clang++, then run pip install again (-v shows its messages)")
    if built.get("newer_sources"):
        names = ", ".join(built["newer_sources"])
        said.append(f"{names} changed after the C++ extension was built: run pip install -e . again")
    if choice.get("choice_error"):
        said.append(choice["choice_error"])
    refused = sorted(op for op, row in choice.get("table", {}).items() if not all(d["backend"] for d in row.values()))
    if refused:
        said.append(f"the forced backend {choice['choice']} refuses {', '.join(refused)}; unset VJEPA_FAST_BACKEND")
    said += [
        f"{name} is set, but nothing reads a variable of that name"
        for name in report["environment"]
        if name.startswith("VJEPA_FAST_") and name not in VARIABLES
    ]
    if "error" not in report["kinds"]:
        said += dict.fromkeys(entries["error"] for entries in report["kinds"].values() if "error" in entries)
    if "error" in report["decoders"].get("videos", report["decoders"]):
        said.append("videos cannot be read: pip install av")
    return said


def text(report: Mapping[str, Any]) -> list[str]:
    """The report for people, lines of at most WIDTH characters."""
    built, found = report["extension"], report["decoders"]
    lines = _section("System", _system(report["system"], report["cuda"]))
    rows = [(n, p["version"] or f"not installed; it is for: {p['gives']}") for n, p in report["packages"].items()]
    lines += _section("Packages", rows)
    lines += _section("CUDA", [*_cuda(report["cuda"]), ("graphs", _graphs(report["graphs"]))])
    state = f"in use, {built['path']}" if built.get("loaded") else f"not in use: {built.get('reason')}"
    lines += _section("C++ extension", [("", built.get("error", state))])
    lines += _ops(report["ops"])
    lines += _section("Attention", _attention(report["attention"]))
    lines += _section("Usable by name", _kinds(report["kinds"]))
    readers = {"": found} if "error" in found else found
    rows = [(name, d.get("error") or f"{d['by']}: {', '.join(d['formats'])}") for name, d in readers.items()]
    lines += _section("Decoders", rows)
    read_by = {name: f" ({reader})" for name, reader in VARIABLES.items()}
    rows = [(name, value + read_by.get(name, "")) for name, value in report["environment"].items()]
    lines += _section("Environment", rows or [("", "no variable of vjepa-fast is set")])
    return lines + _section("Advice", [("", a) for a in report["advice"]] or [("", "none")])


def _system(s: Mapping[str, Any], gpu: Mapping[str, Any]) -> list[tuple[str, str]]:
    cores = f"{s['cores']} cores" + (f", {s['usable_cores']} usable" if s["usable_cores"] != s["cores"] else "")
    if "error" not in gpu:
        cores += f", {gpu['torch_cpu_instructions']}, torch uses {gpu['torch_threads']} threads"
    limit = f", of which this container may use {_gib(s['memory_limit_bytes'])}" if s["memory_limit_bytes"] else ""
    return [
        ("vjepa-fast", f"{s['vjepa_fast']} in {s['folder']}"),
        ("Python", f"{s['python']}, {s['executable']}"),
        ("OS", s["os"]),
        ("CPU", f"{s['cpu']}, {cores}"),
        ("memory", _gib(s["memory_bytes"]) + limit),
    ]


def _cuda(gpu: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "error" in gpu:
        return [("", gpu["error"])]
    built = gpu["torch_built_for"]
    rows = [("torch", f"built for CUDA {built}" if built else "a build without CUDA")]
    rows.append(("driver", gpu["driver"] or "none"))
    for n, d in enumerate(gpu["devices"]):
        rows.append((f"cuda:{n}", f"{d['name']}, capability {d['capability']}, {_gib(d['memory_bytes'])}"))
    return rows if gpu["devices"] else [*rows, ("devices", "none")]


def _graphs(found: Mapping[str, Any]) -> str:
    captured = {"step": "of the whole step", "target": "of the target's forward", "off": "none"}
    return found.get("error") or "; ".join([captured[found["how"]], *found["why_not"]])


def _attention(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A row per backend, and the rows of the table of measurements."""
    if "error" in found:
        return [("", found["error"])]
    rows: list[tuple[str, str]] = []
    for name, entry in found["backends"].items():
        kernels = KERNELS.get(entry["implementation"], entry["implementation"])
        able = "available" if not entry["why_not"] else f"not here: {'; '.join(entry['why_not'])}"
        rows.append((name, f"runs {kernels}" + (f" ({entry['version']})" if entry["version"] else "") + f"; {able}"))
    table = found["table"]
    shapes = [(env, shape, row) for env, of in table["environments"].items() for shape, row in of.items()]
    rows.append(("measured for auto", f"{len(shapes)} shapes in {table['path']}"))
    for environment, shape, row in shapes:
        times = (f"{name} {'failed' if t is None else f'{t:.3f}'}" for name, t in row["ms"].items())
        rows.append(("", f"{environment}: {shape}: {row['backend']} (ms: {', '.join(times)})"))
    return rows


def _kinds(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A row per kind: its names, where those from elsewhere come from, and why some cannot be used here."""
    if "error" in found:
        return [("", found["error"])]
    rows: list[tuple[str, str]] = []
    for kind, entries in found.items():
        if "error" in entries:
            rows.append((kind, entries["error"]))
            continue
        words: list[str] = []
        for name, entry in entries.items():
            notes = [] if entry["from"].split(".")[0] == "vjepa_fast" else [f"from {entry['from']}"]
            if entry["why_not"]:  # those of attention have a section of their own
                notes.append("not here" if kind == "attention backend" else f"not here: {', '.join(entry['why_not'])}")
            words.append(name + (f" ({'; '.join(notes)})" if notes else ""))
        rows.append((kind, ", ".join(words) or "none"))
    return rows


def _ops(found: Mapping[str, Any]) -> list[str]:
    """A table of op and backend by device, then for each device the reasons against the other backends."""
    if "error" in found:
        return _section("Ops", [("", found["error"])])
    table = found["table"]
    devices = list(next(iter(table.values())))
    title = "Ops, and the backend that " + ("auto takes" if found["choice"] == "auto" else f"{found['choice']} gives")
    lines = ["", f"{title:<45} " + "".join(f"{d.upper():<10}" for d in devices)]
    lines += [
        f"  {op:<43} " + "".join(f"{row[d]['backend'] or 'refused':<10}" for d in devices) for op, row in table.items()
    ]
    for device in devices:
        why: dict[tuple[str, str], list[str]] = {}
        for op, row in table.items():
            for backend, reason in row[device]["why_not"].items():
                reason = "no implementation" if reason == f"{op} has no {backend} implementation" else reason
                why.setdefault((backend, reason), []).append(op)
        if why:
            rows = []
            for (backend, reason), names in sorted(why.items()):
                rows.append((backend, f"{reason}: {'every op' if len(names) == len(table) else ', '.join(names)}"))
            lines += _section(f"Not on {device.upper()}, and why", rows)
    return [line.rstrip() for line in lines]


def _section(title: str, rows: list[tuple[str, str]]) -> list[str]:
    """A blank line, a heading, and a wrapped entry for each (label, text)."""
    import textwrap

    lines = ["", title]
    for label, value in rows:
        indent = f"  {label:<18} " if label else "  "
        lines += textwrap.wrap(
            value, WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent), break_on_hyphens=False
        )
    return lines


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
