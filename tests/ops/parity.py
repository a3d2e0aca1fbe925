"""The bound that every backend of an op is held to, and the list of backends to try.

    max abs(backend - exact) <= 2 x max abs(eager - exact) + atol

``exact`` is eager code on float64 copies of the same inputs, ``eager`` the same code in the dtype under test. Outputs
and gradients are compared one by one; a second run must give the same bits. Triton's interpreter, one thread that runs
one program after another, is not asked twice.
"""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch

from vjepa_fast import ops
from vjepa_fast.ops import _cpp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEVICES = sorted({"cpu", DEVICE})
_HAS_TRITON = importlib.util.find_spec("triton") is not None
KERNELS = [  # on the CPU Triton is interpreted
    pytest.param("cpp", marks=pytest.mark.skipif(not _cpp.LOADED, reason=_cpp.REASON or "-")),
    pytest.param("triton", marks=pytest.mark.skipif(not _HAS_TRITON, reason="triton is not installed")),
]
BACKENDS = ["eager", *KERNELS]


def pairwise(*axes):
    """Cases, few of them, in which every value of every axis meets every value of every other axis."""
    cases = list(itertools.product(*axes))
    meetings = {case: {(i, case[i], j, case[j]) for i in range(len(case)) for j in range(i)} for case in cases}
    wanted, chosen = set().union(*meetings.values()), []
    while wanted:
        chosen.append(max(cases, key=lambda case: len(meetings[case] & wanted)))
        wanted -= meetings[chosen[-1]]
    return chosen


def crossed(backends, *axes):
    """(backend, value, ...) for parametrize: all cases, and of Triton where it is interpreted those of `pairwise`."""
    few = set(pairwise(*axes)) if DEVICE == "cpu" else None
    found = []
    for backend in backends:
        name, marks = (backend, ()) if isinstance(backend, str) else (backend.values[0], backend.marks)
        cases = [case for case in itertools.product(*axes) if name != "triton" or few is None or case in few]
        found += [pytest.param(name, *case, marks=marks) for case in cases]
    return found


def device_for(backend: str) -> str:
    """Where the inputs of ``backend`` must live: C++ kernels run on the CPU, everything else is tried on the GPU."""
    return "cpu" if backend == "cpp" else DEVICE


def moved(x: torch.Tensor, device: str) -> torch.Tensor:
    """``x`` on ``device`` with its strides; ``.to`` closes the gaps of a tensor that has some."""
    if x.device.type == device:
        return x
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return memory.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def run(fn, args, *, dtype, backend, wrt=(), cotangents=None, device="cpu"):
    """Outputs of ``fn(*args)`` and gradients of the arguments numbered in ``wrt``, as float64 on the CPU.

    Floating arguments are cast to ``dtype``. ``cotangents``: one per output; random, not 1, unless given.
    """
    ready = []
    for n, a in enumerate(args):
        if isinstance(a, torch.Tensor):
            a = moved(a, device)
            if a.is_floating_point():
                a = a.to(dtype).detach().requires_grad_(n in wrt)
        ready.append(a)
    with ops.use_backend(backend):
        out = fn(*ready)
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        grads = []
        if wrt:
            g = torch.Generator().manual_seed(7)
            cotangents = cotangents or [torch.randn(o.shape, generator=g, dtype=torch.float64) for o in outs]
            live = [(o, c.to(o.device, o.dtype)) for o, c in zip(outs, cotangents) if o.requires_grad]
            grads = torch.autograd.grad([o for o, _ in live], [ready[n] for n in wrt], [c for _, c in live])
    return [x.detach().double().cpu() for x in (*outs, *grads)]


def assert_parity(fn, args, *, backend, dtype=torch.float32, wrt=(), atol=1e-6):
    """Hold ``backend`` to the bound at the top of this file; inputs are rounded to ``dtype`` before all three runs."""
    args = [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    exact = run(fn, args, dtype=torch.float64, backend="eager", wrt=wrt)
    eager = run(fn, args, dtype=dtype, backend="eager", wrt=wrt)
    device = device_for(backend)
    ours = run(fn, args, dtype=dtype, backend=backend, wrt=wrt, device=device)
    interpreted = backend == "triton" and device == "cpu"
    again = ours if interpreted else run(fn, args, dtype=dtype, backend=backend, wrt=wrt, device=device)
    assert len(exact) == len(eager) == len(ours)
    for n, (x, e, o, o2) in enumerate(zip(exact, eager, ours, again)):
        assert x.shape == o.shape, f"output {n}: shape {list(o.shape)}, expected {list(x.shape)}"
        assert torch.equal(torch.nan_to_num(o), torch.nan_to_num(o2)), f"output {n}: a second run gave other bits"
        if not x.numel():
            continue
        assert not o.isnan().any(), f"output {n}: NaN"
        bound = 2 * (e - x).abs().max().item() + atol
        error = (o - x).abs().max().item()
        assert error <= bound, f"output {n}: error {error:.3g} over the bound {bound:.3g} ({backend}, {dtype})"
