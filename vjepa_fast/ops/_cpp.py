"""Loads the CPU kernels of csrc/, which register themselves under ``torch.ops.vjepa_fast_cpp``.

``LOADED`` says whether they are there, ``REASON`` why not.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import pathlib

import torch  # first: the library takes its symbols from the libtorch that this loads

from vjepa_fast.ops import _check

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
    """Why the library cannot be used; empty if it can."""
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
FLOATS = (torch.float32, torch.bfloat16)  # the dtypes that the kernels read and write


@functools.cache
@torch.inference_mode(False)
def nothing() -> torch.Tensor:
    """[0,0], in the place of a tensor that is not there; plain, whatever mode or device the first call is under."""
    return torch.empty(0, 0, device="cpu")


def objections(*tensors: torch.Tensor) -> list[str]:
    """Why the kernels cannot run on these tensors; without arguments, why they cannot run at all."""
    reasons = [] if LOADED else [REASON]
    if any(t.device.type != "cpu" for t in tensors):
        reasons.append("cpp supports tensors on the CPU only")
    return reasons


def dtype_objections(x: torch.Tensor) -> list[str]:
    """Why the kernels cannot run on the dtype of ``x``."""
    return [] if x.dtype in FLOATS else [f"cpp supports {_check.names(FLOATS)}, got {_check.names((x.dtype,))}"]


def status() -> str:
    """One line for people: is the extension there, and if not, why."""
    return f"C++ extension: {'in use, ' + str(PATH) if LOADED else 'not in use, eager PyTorch runs instead: ' + REASON}"
