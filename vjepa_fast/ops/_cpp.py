"""Loads the CPU kernels of csrc/, which register themselves under ``torch.ops.vjepa_fast_cpp``.

``LOADED`` tells whether they are there and ``REASON`` why not.
"""

from __future__ import annotations

import ctypes
import hashlib
import pathlib

import torch  # first: the library takes its symbols from the libtorch that this loads

PATH = pathlib.Path(__file__).resolve().parent.parent / "_C.so"
SOURCES = PATH.parent.parent / "csrc"  # in a checkout


def fingerprint(folder: pathlib.Path) -> str:
    """Digest of the C++ sources; setup.py compiles the same into the library."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _load(path: pathlib.Path) -> str:
    """Returns why the library cannot serve; empty if it can."""
    if not path.is_file():
        return "vjepa_fast/_C.so was not built (no C++ compiler, not Linux, or VJEPA_FAST_BUILD=0)"
    try:
        library = ctypes.CDLL(str(path))
        built_from = library.vjepa_fast_sources
        built_from.restype = ctypes.c_char_p
        if SOURCES.is_dir() and built_from().decode() != fingerprint(SOURCES):
            return "vjepa_fast/_C.so is older than csrc/; build it again: pip install -e ."
        failed = library.vjepa_fast_register()
    except (OSError, AttributeError) as e:
        return f"vjepa_fast/_C.so does not load: {str(e).splitlines()[0]}"
    if failed:
        return "vjepa_fast/_C.so could not register its ops (another copy is loaded, or torch is older than 2.11)"
    return ""


REASON = _load(PATH)
LOADED = not REASON


def objections(*tensors: torch.Tensor) -> list[str]:
    """Why the kernels cannot serve these tensors; without arguments, why they cannot serve at all."""
    reasons = [] if LOADED else [REASON]
    if any(t.device.type != "cpu" for t in tensors):
        reasons.append("cpp serves tensors on the CPU only")
    return reasons


def status() -> str:
    """One line for people: is the extension there, and if not, why."""
    return f"C++ extension: {'in use, ' + str(PATH) if LOADED else 'not in use, eager PyTorch serves: ' + REASON}"
