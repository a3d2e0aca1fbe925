"""Cold start: the kernels of a run built in parallel, before its first step and while its models are made.

Our Triton kernels are found by a *rehearsal*: the Python of a step, with few layers and the shapes of the recipe, on
the meta device, so that no kernel, width or dtype is listed twice. It runs in a process of its own, which needs no GPU,
and compiles into Triton's cache on disk in as many processes as there are cores. The graphs of ``torch.compile`` cannot
be rehearsed: they come with the first step, from Inductor's own cache if it has them, and `inductor_workers` starts the
processes that compile their kernels beforehand.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vjepa_fast import config as configs
from vjepa_fast import kernels, ops
from vjepa_fast.config.schema import Config
from vjepa_fast.data.loader import ClipGroup
from vjepa_fast.errors import UserError
from vjepa_fast.files import write_text
from vjepa_fast.layers import attention, fused_block
from vjepa_fast.layers.attention.base import Backend
from vjepa_fast.layers.block import Attention
from vjepa_fast.objectives import LatentState, ObjectiveOutput
from vjepa_fast.ops import _builds
from vjepa_fast.trainer.prefetch import Staged
from vjepa_fast.trainer.step import TrainStep

_META, _CPU = torch.device("meta"), torch.device("cpu")
_LIMIT_S = 300.0  # after which a run goes on without


# -- rehearsal ---------------------------------------------------------------------------------------------------------
class _Autocast(TorchFunctionMode):
    """What autocast does on CUDA, for tensors on the meta device, which has none."""

    LOW = (
        F.linear,
        F.scaled_dot_product_attention,
        torch.matmul,
        torch.bmm,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
    )

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __enter__(self) -> TorchFunctionMode:
        self.token = fused_block.REHEARSED.set(self.dtype)
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        fused_block.REHEARSED.reset(self.token)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dtype = self.dtype if func in self.LOW else torch.float32 if func is F.layer_norm else None
        if dtype is not None:
            args = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        return func(*args, **(kwargs or {}))


def _our_attention() -> Backend:
    """Our own kernels as a backend for the meta device."""
    return type("Rehearsed", (type(attention.BACKENDS["triton"]),), {"cuda": False})()


class _Rehearsal(TrainStep):
    """A step on the meta device that takes the ways of one on CUDA."""

    def losses(
        self, batch: Any, index: int, weights: Tensor | None = None, drawn: dict[str, Tensor] | None = None
    ) -> tuple[ObjectiveOutput, LatentState]:
        """Random numbers come from the CPU, as the meta device has none."""
        drawn = {name: x.to(_META) for name, x in self.plan.draw(self.at(batch, index), _CPU).items()}
        return super().losses(batch, index, weights, drawn)

    def autocast(self, cache: bool = True) -> AbstractContextManager[object]:
        return contextlib.nullcontext() if self.dtype == torch.float32 else _Autocast(self.dtype)


def rehearse(cfg: Config, dtype: torch.dtype, arch: int) -> dict[str, _builds.Build]:
    """The Triton builds of a step of ``cfg`` on a GPU of compute capability ``arch`` / 10, by key.

    Raises:
        RuntimeError: this process interprets Triton or has none; see `_builds.objections`.
    """
    if reasons := _builds.objections():
        raise RuntimeError("; ".join(reasons))
    model = cfg.model
    less = {"depth": model.levels, "pred_depth": min(2, model.pred_depth), "use_activation_checkpointing": False}
    run = replace(cfg.runtime, compile=False, cuda_graphs=False, fp8=False, attention="sdpa", capacity_quantum=0)
    step = _Rehearsal(replace(cfg, model=replace(model, **less), runtime=run), device=_META, dtype=dtype)
    exact = cfg.runtime.capacity_quantum == 0 and not cfg.runtime.pad_to_multiple
    groups = _groups(cfg)
    drawn = [step._sampler(g).draw(g.clip, **step._keys(g, n, 0)) for n, g in enumerate(groups)]  # pyright: ignore[reportPrivateUsage]  # our own class
    # `auto` measures our own attention kernels, whatever it takes then
    models = step.encoder, step.predictor, step.target
    step.scaler = None  # which reads the gradients
    layers = [m for model in models for m in model.modules() if isinstance(m, Attention)]
    ours, calls = _our_attention(), {attention.Call(_META, dtype, m.proj.in_features // m.num_heads) for m in layers}
    wanted = cfg.runtime.attention in ("auto", "triton") and not any(map(ours.objections, calls))
    backends: list[Backend] = [attention.SDPA, ours] if wanted else [attention.SDPA]
    with _builds.recorded(arch) as builds:
        for n, (group, masks) in enumerate(zip(groups, drawn)):
            on_meta = group.clip.to(_META)
            with contextlib.suppress(NotImplementedError):  # ends where lengths go to the host
                step._sampler(group).draw(on_meta, **step._keys(group, n, 0))  # pyright: ignore[reportPrivateUsage]  # our own class
            for quantum in (0,) if exact else (0, None):
                for backend in backends:
                    for layer in layers:
                        layer.backend = backend
                    sides = tuple([m.to(_META) for m in side] for side in masks.wait(quantum))
                    ready = cast(Any, SimpleNamespace(wait=lambda quantum, sides=sides: sides, masks=masks.masks))
                    step(Staged([replace(group, clip=on_meta)], 0, [ready]), 0)
        _optimiser(cfg)
    return builds


def _groups(cfg: Config) -> list[ClipGroup]:
    """A group of clips for each length, as many as a step has."""
    lengths, side = dict.fromkeys(cfg.data.dataset_fpcs), cfg.data.crop_size
    shapes = [(max(1, cfg.data.batch_size // len(lengths)), frames, side, "video") for frames in lengths]
    if cfg.img_data is not None:
        shapes.append((cfg.img_data.batch_size, 1, cfg.img_data.crop_size, "image"))
    groups: list[ClipGroup] = []
    for size, frames, side, modality in shapes:
        clip = torch.zeros(size, 3, frames, side, side, dtype=torch.uint8, device=_CPU)
        none = torch.zeros(size, dtype=torch.int64, device=_CPU)
        groups.append(ClipGroup(clip, none, none, [""] * size, frames, modality, 0))
    return groups


def _optimiser(cfg: Config) -> None:
    """The step of AdamW with its average, clipped or not."""
    p, grad, first, second, target = ([torch.zeros(64, device=_CPU)] for _ in range(5))
    low = [torch.zeros(64, dtype=torch.bfloat16, device=_CPU)]
    rule = ops.Rule(1e-3, 0.9, 0.999, 1e-8, 0.04, 1, 0.01)
    scale = torch.ones((), device=_CPU) if cfg.optimization.clip_grad else None
    ops.adamw_ema_(p, grad, first, second, rule, targets=target, lows=low, scale=scale)


# -- in a process of its own -------------------------------------------------------------------------------------------
def main(path: str, arch: int, dtype: str, jobs: int) -> int:
    """Rehearse and build the configuration in the file ``path``; a line of JSON of all kernels, then one per build."""
    cfg = configs.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    builds = rehearse(cfg, getattr(torch, dtype), arch)
    print(json.dumps({"expected": [b.kernel for b in builds.values()]}), flush=True)
    _builds.make(builds, jobs, lambda built: print(json.dumps(built._asdict()), flush=True))
    return 0


class Summary(NamedTuple):
    """What became of the builds of a run; ``error`` where the process itself ended with one."""

    builds: int
    compiled: int
    failed: list[_builds.Built]
    seconds: float
    error: str = ""

    def __str__(self) -> str:
        if self.error:
            return f"kernels are built as they are met: {self.error}"
        failed = f", {len(self.failed)} failed ({self.failed[0].kernel}: {self.failed[0].error})" if self.failed else ""
        return f"{self.builds} kernels ready in {self.seconds:.1f} s, {self.compiled} of them compiled now{failed}"


class Warming:
    """The Triton kernels of a run being built by another process, from now on.

    Args:
        cfg, dtype, arch: of the run; see `rehearse`.
        jobs: processes; None: as many as there are cores for this one.
        on_kernel: called from a thread with each kernel of which all builds are there: (its name, them).
    """

    def __init__(
        self,
        cfg: Config,
        dtype: torch.dtype,
        arch: int,
        *,
        jobs: int | None = None,
        on_kernel: Callable[[str, list[_builds.Built]], None] = lambda name, builds: None,
    ):
        self.began, self.on_kernel = time.perf_counter(), on_kernel
        self.made: list[_builds.Built] = []
        self.expected: Counter[str] = Counter()  # builds of each kernel, once they are known
        self.file = tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8")  # noqa: SIM115  # until `finish`
        json.dump(configs.to_dict(cfg), self.file)
        self.file.flush()
        jobs = jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        numbers = str(arch), str(dtype).removeprefix("torch."), str(jobs)
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # no memory of the GPU for it
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vjepa_fast.trainer.warm", self.file.name, *numbers],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.errors = threading.Thread(target=self._read_errors, daemon=True)
        self.last_error = ""
        self.reader.start()
        self.errors.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if "expected" in row:
                    self.expected.update(row["expected"])
                else:
                    self.made.append(built := _builds.Built(**row))
                    mine = [b for b in self.made if b.kernel == built.kernel]
                    if len(mine) == self.expected[built.kernel]:
                        self.on_kernel(built.kernel, mine)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.last_error = line.strip() or self.last_error

    def finish(self, limit_s: float = _LIMIT_S) -> Summary:
        """Wait until all are built, or have failed; a build that fails is left to the launch that needs it."""
        error = ""
        try:
            code = self.process.wait(max(0.0, self.began + limit_s - time.perf_counter()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            code, error = self.process.wait(), f"not done within {limit_s:.0f} s"
        for thread in (self.reader, self.errors):
            thread.join(5)
        self.stop()
        if code and not error:
            error = self.last_error or f"the process ended with {code}"
        failed = [b for b in self.made if b.error]
        compiled = sum(not b.found and not b.error for b in self.made)
        return Summary(len(self.made), compiled, failed, time.perf_counter() - self.began, error)

    def stop(self) -> None:
        """End the process if it runs; without effect after `finish`."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.file.close()


@contextlib.contextmanager
def ahead(cfg: Config, device: torch.device, dtype: torch.dtype, notes: list[str]) -> Generator[None]:
    """Builds what a run on this device will launch while the body makes its models; adds one line to ``notes``.

    Nothing on a CPU, where Triton cannot run, in processes of one machine other than its first, or under another method
    than V-JEPA, whose step is not rehearsed.
    """
    if device.type == "cuda" and cfg.runtime.compile is not False:
        inductor_workers()
    unwanted = device.type != "cuda" or device.index or ops.current_backend() not in ("auto", "triton")
    if unwanted or cfg.method != "vjepa" or _builds.objections():
        yield
        return
    arch = capability(device)
    stamp = _stamp(cfg, dtype, arch)
    if stamp.exists():
        yield
        return
    try:
        warming = Warming(cfg, dtype, arch)
    except OSError as error:
        notes.append(f"kernels are not built ahead: {error}")
        yield
        return
    try:
        yield
        notes.append(str(summary := warming.finish()))
        if not summary.error and not summary.failed:
            with contextlib.suppress(UserError):
                write_text(stamp, str(summary))
    finally:
        warming.stop()


def _stamp(cfg: Config, dtype: torch.dtype, arch: int) -> Path:
    """A file beside Triton's builds that is there when those of such a run are: none has to be looked for again."""
    import triton
    from triton import knobs

    digest = hashlib.sha256(json.dumps([configs.to_dict(replace(cfg, folder="x")), str(dtype), arch]).encode())
    digest.update(f"{triton.__version__} {torch.__version__}".encode())
    for folder in (Path(__file__).parents[1], Path(str(kernels.__path__[0]))):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    return Path(knobs.cache.dir) / f"vjepa_fast-{digest.hexdigest()[:32]}"


def capability(device: torch.device) -> int:
    """10 times the compute capability, as 90 for sm_90."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def inductor_workers() -> threading.Thread:
    """Import Inductor, which starts its processes, while something else is done; the first compiled call finds both."""

    def load() -> None:
        with contextlib.suppress(Exception):  # the first compiled call will say why
            from torch._inductor.async_compile import AsyncCompile

            AsyncCompile.warm_pool()

    thread = threading.Thread(target=load, name="inductor", daemon=True)
    thread.start()
    return thread


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
