"""Launch every Triton kernel through the real JIT launcher, with a driver that stops short of the GPU.

    python tests/kernels/launches.py          # without TRITON_INTERPRET; a line of JSON: kernel -> builds

The interpreter skips the binding and specialisation of arguments and the compiler; ``benchmarks/aot.py`` compiles
signatures that were written down by hand. Here an op is called as a training step calls it, forward and backward, on
CPU tensors: Triton binds the arguments, specialises on their values, compiles for sm_90 and hands them to the launcher,
which is ours: it compares them with the compiled signature instead of launching. Results are never written.

The first build of all is compiled to PTX, and so is the first one of each kernel that differs from what
``benchmarks/results/aot.json`` was recorded of, or of any under another Triton; the others are compiled to Triton's own
language, where all that depends on the launch is decided. What follows takes nine tenths of the time, and
``benchmarks/aot.py`` does it for every variant.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from benchmarks.aot import all_variants, digest

ROOT = Path(__file__).parents[2]
_DTYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
_MOST = (2**31 - 1, 65535, 65535)  # programs along the axes of a grid
_launched: list[tuple[str, int]] = []  # kernel, compiled build


def _problem(kind, value) -> bool:
    """Whether ``value`` is not what the compiled kernel takes for a parameter of the type ``kind``."""
    if kind == "constexpr":
        return False
    if kind.startswith("tensordesc"):
        shown = f"tensordesc<{_DTYPES[value.base.dtype]}{value.block_shape}>"
        return kind.replace(" ", "") != shown.replace(" ", "")
    if kind.startswith("*"):
        return not isinstance(value, torch.Tensor) or kind != "*" + _DTYPES[value.dtype]
    if kind in ("i32", "i64"):
        return type(value) is not int or not -(2 ** (int(kind[1:]) - 1)) <= value < 2 ** (int(kind[1:]) - 1)
    return kind != "fp32" or type(value) is not float


class Launcher:
    def __init__(self, src, metadata):
        self.src, self.metadata = src, metadata

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *args):
        name = self.src.fn.__name__
        signature = self.src.signature
        assert len(args) == len(signature), f"{name}: {len(args)} arguments for {len(signature)} parameters"
        for (parameter, kind), value in zip(signature.items(), args):
            assert not _problem(kind, value), f"{name}: {parameter} is {kind}, got {value!r}"
        key = str(self.src.constants)  # part of the key of Triton's cache on disk
        assert " object at 0x" not in key, f"{name}: a cache key that no other process makes: {key}"
        for value in self.src.constants.values():
            for item in value if isinstance(value, tuple) else ():
                stale = isinstance(item, triton.JITFunction) and item.cache_key not in key
                assert not stale, f"{name}: an edited {item} would be taken from the cache on disk"
        for axis, size in enumerate((x, y, z)):
            assert type(size) is int and 0 < size <= _MOST[axis], f"{name}: grid {(x, y, z)}"
        _launched.append((name, id(self)))


class Backend(CUDABackend):
    """Triton's own, less what `main` leaves out."""

    whole: set[str] = set()  # kernels of which a build was compiled to the end, here or when it was recorded

    def add_stages(self, stages, options, language):
        """Decide after the first stage whether the others follow."""
        super().add_stages(stages, options, language)
        follow = {name: stages[name] for name in ("ttgir", "llir", "ptx")}
        left_out = set[str]()

        def first(module, metadata):
            name = module.get_entry_func_name()
            if name in Backend.whole and _launched:
                left_out.update(("llir", "ptx") if "tensordesc" in str(module) else follow)  # which ttgir describes
            Backend.whole.add(name)
            metadata.update(name=name, shared=0, tmem_size=0, tensordesc_meta=[])
            return module

        ttir = stages["ttir"]
        stages["ttir"] = lambda module, metadata: first(ttir(module, metadata), metadata)
        for name, stage in follow.items():
            stages[name] = lambda module, metadata, name=name, stage=stage: (
                module if name in left_out else stage(module, metadata)
            )
        stages["cubin"] = lambda *_: b""  # ptxas is for benchmarks/aot.py


class Driver:
    launcher_cls = Launcher
    utils = types.SimpleNamespace(
        load_binary=lambda *args: (object(), object(), 0, 0, 1024),
        unload_module=lambda module: None,
        get_device_properties=lambda device: {"max_shared_mem": 232448},  # of an H100
    )

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


GRID = (8, 14, 14)
TOKENS = GRID[0] * GRID[1] * GRID[2]


def _masked(batch, kept, start=0):
    """[B,K] tokens that make pairs and columns: places start.. of every time step."""
    places = GRID[1] * GRID[2]
    return torch.tensor([t * places + start + i for t in range(GRID[0]) for i in range(kept)]).expand(batch, -1)


def objectives(dtype, h_dtype, normalized, spec, dim=3072):
    """Every term of ``spec`` as a training step calls it; K is 8 x 5 tokens, or 8 x 6, so that it is specialised."""
    from vjepa_fast.objectives import LatentState, build_objectives

    for batch, kept in ((2, 5), (2, 6), (1, 1)):
        seen, hidden = _masked(batch, kept), _masked(batch, 3, start=20)

        def features(k, dtype=dtype, grad=True, batch=batch):
            return torch.zeros(batch, k, dim, dtype=dtype, requires_grad=grad)

        state = LatentState(
            grids=[GRID],
            h=[features(TOKENS, h_dtype, normalized)],
            h_normalized=normalized,
            z=[[features(seen.shape[1])]],
            z_pred=[[features(hidden.shape[1])]],
            masks_enc=[[seen]],
            masks_pred=[[hidden]],
            z_context=[[features(seen.shape[1])]],
            step=10,
            total_steps=20,
            clips=[torch.zeros(batch, 3, 16, 224, 224, dtype=torch.uint8)],
        )
        plan = build_objectives(spec, levels=4, embed_dim=dim // 4, target_grad=normalized)
        plan(state).total.backward()


def clips():
    from vjepa_fast import ops

    for clip in (
        torch.zeros(2, 3, 16, 224, 224, dtype=torch.uint8),
        torch.zeros(2, 3, 16, 224, 224, dtype=torch.bfloat16),
        torch.zeros(2, 16, 210, 210, 3, dtype=torch.uint8).permute(0, 4, 1, 2, 3),
        torch.zeros(1, 1, 2, 14, 14, dtype=torch.uint8),
    ):
        patch = 16 if clip.shape[3] == 224 else 14
        grid = clip.shape[2] // 2, clip.shape[3] // patch, clip.shape[4] // patch
        idx = torch.zeros(clip.shape[0], 5, dtype=torch.int64)
        for kept in (idx, idx[:1], None):
            for dtype in (torch.float32, torch.bfloat16):
                ops.tubelet_patchify(clip, kept, 2, patch, *_stats(clip), out_dtype=dtype)
        ops.patch_mean(clip, 2, patch, *_stats(clip))
        for mode in ("trilinear", "area"):
            ops.motion_saliency(clip, grid, None, None, mode)
            ops.motion_saliency(clip[:1], grid, None, None, mode, "published")
    ops.motion_saliency(torch.zeros(2, 3, 7, 50, 61, dtype=torch.uint8), (3, 7, 5), mode="area")


def _stats(clip):
    return [0.5] * clip.shape[1], [0.25] * clip.shape[1]


def masks():
    from vjepa_fast import ops

    for specs in (
        [ops.BlockSpec(), ops.BlockSpec(num_blocks=2, spatial_scale=(0.7, 0.7), full_complement=True)],
        [ops.BlockSpec(motion_guided=True), ops.BlockSpec(motion_guided=True, inv_block=True)],
    ):
        for truncate in ("batch", "random", "none"):
            for dtype in (torch.float32, torch.bfloat16):
                ops.sample_block_masks(
                    3,
                    GRID,
                    specs,
                    torch.ones(3, *GRID, dtype=dtype),
                    seed=-5,
                    step=7,
                    first_sample=2**40,
                    truncate=truncate,
                )
    ops.sample_block_masks(1, (1, 4, 4), [ops.BlockSpec(spatial_scale=(0.3, 0.3))], seed=1, step=0)
    enc, pred = _masked(3, 50), _masked(3, 90, 60)
    ops.mask_distance(enc, pred, GRID)
    ops.mask_distance(enc[:, :1], pred[:, :1], GRID, offset=True)


def rope():
    from vjepa_fast import ops

    for heads, width, rotated, dtype in (
        (12, 64, 60, torch.bfloat16),
        (16, 104, 102, torch.float32),
        (3, 20, 18, torch.float16),
        (1, 2, 2, torch.float32),
    ):
        for b, k in ((2, 16), (2, 7), (1, 1)):
            for shape in ((k, 2, rotated), (b, k, 2, rotated)):
                qkv = torch.zeros(b, k, 3 * heads * width, dtype=dtype, requires_grad=True)
                ops.rope3d(qkv, torch.zeros(shape), heads).sum().backward()
                ops.rope3d_(qkv.detach(), torch.zeros(shape), heads)


def norm():
    from vjepa_fast import ops

    for channels, levels, dtype in (
        (3072, 4, torch.bfloat16),
        (6656, 4, torch.float32),
        (6656, 1, torch.float16),
        (24, 3, torch.float32),
        (1, 1, torch.float32),
    ):
        for tokens in (16, 7, 1):
            h = torch.zeros(1, tokens, channels, dtype=dtype, requires_grad=True)
            ops.target_norm(h, levels).sum().backward()


def blocks():
    """Two levels of two blocks, forward and backward and without gradient; products of every kind."""
    from torch import nn

    from vjepa_fast.layers import fused_block
    from vjepa_fast.layers.block import Block
    from vjepa_fast.ops import _fastest
    from vjepa_fast.ops import gelu as gelu_op

    norms = dict(enumerate(nn.LayerNorm(256) for _ in range(2)))
    stack = [Block(256, 4, 4.0, False, True).bfloat16() for _ in range(2)]
    real = _fastest.choose
    for number, tma in enumerate((True, False)):
        gelu_op._tma = lambda *_, tma=tma: tma
        _fastest.choose = lambda op, x, columns, ways, number=number: list(ways)[number]
        for tokens in (64, 7):
            x = torch.zeros(1, tokens, 256, dtype=torch.bfloat16, requires_grad=True)
            fused_block.apply(stack, norms, x, None, False, None).sum().backward()
            with torch.no_grad():
                fused_block.apply(stack, norms, x, None, False, None)
    _fastest.choose = real
    for block in stack:
        block.epilogues = "torch"
    fused_block.apply(stack, norms, x, None, False, None).sum().backward()


def packed_attention():
    """Streams and segments of any number, with tables of their own or not, make no builds; positions or none do."""
    from vjepa_fast import ops

    for b, k, segments in ((1, 300, 3), (2, 64, 1), (1, 16, 16)):
        qkv = torch.zeros(b, k, 3 * 2 * 16, dtype=torch.bfloat16, requires_grad=True)
        for table in (torch.zeros(k, 2, 10), torch.zeros(b, k, 2, 10)):
            ops.packed_attention(qkv, table, torch.zeros(segments + 1, dtype=torch.int32), 2).sum().backward()


def optimiser():
    """Decay, clipping, targets and their bfloat16 copies, or none of them; lr and step change and make no build."""
    from vjepa_fast import ops

    for scaled in (False, True):
        for target, low in ((False, False), (True, False), (True, True)):
            for step in (1, 2):

                def many(dtype=torch.float32):
                    return [torch.zeros(n, dtype=dtype) for n in (4096, 5, 1)]

                rule = ops.Rule(1e-3 / step, 0.9, 0.999, 1e-8, 0.04, step, 0.01 if target else 0.0)
                ops.adamw_ema_(
                    many(),
                    many(),
                    many(),
                    many(),
                    rule,
                    targets=many() if target else None,
                    lows=many(torch.bfloat16) if low else None,
                    scale=torch.ones(()) if scaled else None,
                )


PAIRS = {"fwm_static": {}, "delta": {}, "ltc": {}, "velgate": {}}
EVERYTHING = {
    "pred": {},
    "hw": {},
    "context": {"warmup": [0, 0], "weight_distance": True},
    "ld": {},
    **PAIRS,
    "hamiltonian": {},
    "spectral": {},
    "ac": {},
    "fwm_orth": {},
}
CASES = {
    "losses": lambda: objectives(torch.bfloat16, torch.bfloat16, False, EVERYTHING),
    "losses_fp32": lambda: objectives(torch.float32, torch.float32, False, {**PAIRS, "spectral": {}, "pred": {}}, 96),
    "losses_exponents": lambda: [
        objectives(torch.float16, torch.float32, False, {"pred": {"loss_exp": p}}, 96) for p in (1.5, 2)
    ],
    "losses_channel_split": lambda: objectives(
        torch.bfloat16, torch.bfloat16, False, {"fwm_static": {"split": "channel"}, "delta": {}}
    ),
    "losses_online": lambda: [
        objectives(torch.float32, torch.float32, True, {"kinematic": {"type": kind}}, 96) for kind in ("l1", "huber")
    ],
    "losses_narrow": lambda: objectives(torch.float32, torch.float32, False, {**PAIRS, "spectral": {}, "pred": {}}, 4),
    "clips": clips,
    "masks": masks,
    "rope": rope,
    "norm": norm,
    "blocks": blocks,
    "packed_attention": packed_attention,
    "optimiser": optimiser,
}


def recorded() -> set[str]:
    """Names of the kernels whose code is that of ``aot.json`` in every variant, compiled by this Triton."""
    found = json.loads((ROOT / "benchmarks" / "results" / "aot.json").read_text())
    if found["triton"] != triton.__version__:
        return set()
    rows = {row["kernel"]: row["digest"] for row in found["rows"] if row["arch"] == 90}
    every = {
        name: v["fn"].__name__
        for name, v in all_variants().items()
        if v.get("arch", 90) == 90 and v.get("least", 90) <= 90
    }
    return set(every.values()) - {kernel for name, kernel in every.items() if digest(name, 90) != rows.get(name)}


def main(names) -> None:
    from vjepa_fast import ops
    from vjepa_fast.ops import _backend

    Backend.whole |= recorded()
    triton.runtime.driver.set_active(Driver())
    backends = triton.backends.backends
    backends["nvidia"] = dataclasses.replace(backends["nvidia"], compiler=Backend)
    _backend._reasons = lambda *call: []  # CPU tensors will do
    with ops.use_backend("triton"):
        for name in names or CASES:
            CASES[name]()
    kernels = {}
    for name, build in _launched:
        kernels.setdefault(name, set()).add(build)
    if not names:
        forgotten = {v["fn"].__name__ for v in all_variants().values()} - set(kernels)
        assert not forgotten, f"no case launches {', '.join(sorted(forgotten))}"
    print(json.dumps({name: len(builds) for name, builds in sorted(kernels.items())}))


if __name__ == "__main__":
    main(sys.argv[1:])
