"""Make a step again that was not finite (`bundle`), in any dtype, and name the module where it begins.

In the forward pass that is the first module whose output is not finite; in the backward pass the first whose inputs get
a gradient that is not finite from outputs whose gradients are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vjepa_fast.config.schema import Config
from vjepa_fast.errors import ConfigError, UserError
from vjepa_fast.models import interop
from vjepa_fast.trainer import bundle, checkpoint
from vjepa_fast.trainer.levjepa import LevjepaStep
from vjepa_fast.trainer.methods import METHODS
from vjepa_fast.trainer.step import TrainStep, resolve_device

DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Stats:
    """What is in a tensor."""

    shape: tuple[int, ...]
    dtype: str
    bad: int  # values that are not finite
    largest: float  # of the absolute values of the others

    @classmethod
    def of(cls, x: Tensor) -> Stats:
        """Of a floating tensor."""
        x = x.detach()
        finite = torch.isfinite(x)
        rest = x[finite].abs().double()
        return cls(
            tuple(x.shape),
            str(x.dtype).removeprefix("torch."),
            int(x.numel() - finite.sum()),
            float(rest.max()) if rest.numel() else 0.0,
        )

    def __str__(self) -> str:
        shape = ",".join(map(str, self.shape))
        bad = f"{self.bad} values not finite, the others" if self.bad else "all finite,"
        return f"{self.dtype} [{shape}]: {bad} up to {self.largest:.3g}"


@dataclasses.dataclass(frozen=True)
class Finding:
    """Where values stop being finite."""

    module: str  # encoder.blocks.3.attn; or a parameter
    inputs: tuple[Stats, ...]
    outputs: tuple[Stats, ...]


@dataclasses.dataclass(frozen=True)
class Replay:
    """A step made again."""

    dtype: str
    values: dict[str, float]  # loss, terms and gradient norm
    weights: str  # the first weight that is not finite; empty if none
    forward: Finding | None
    backward: Finding | None

    @property
    def fails(self) -> bool:
        """Whether the loss or the gradients are not finite."""
        values = torch.tensor([self.values["loss"], self.values["grad_norm"]], dtype=torch.float64)
        return not bool(torch.isfinite(values).all())


class Watch:
    """Looks at what goes into and out of all modules of a step, in the forward and in the backward pass."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        self.forward: Finding | None = None
        self.backward: Finding | None = None
        self.grads: dict[str, dict[str, list[Stats]]] = {}  # by module and side, as they come
        self.around: tuple[Finding, int] | None = (
            None  # a module in which, unless the next event is more exact; address
        )
        self.handles: list[Any] = []
        seen: set[nn.Module] = set()
        for root, module in modules.items():
            for name, part in module.named_modules():
                if part in seen:
                    continue
                seen.add(part)
                where = f"{root}.{name}" if name else root
                self.handles.append(part.register_forward_pre_hook(self._before(where), with_kwargs=True))
                self.handles.append(part.register_forward_hook(self._after(where), with_kwargs=True))
            for name, p in module.named_parameters():
                if p.requires_grad and p.is_leaf:
                    self.handles.append(p.register_hook(self._parameter(f"{root}.{name}")))

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        if self.around is not None:
            self._settle(self.around[0])

    def _before(self, where: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            for x in _floats((args, kwargs)):
                if x.requires_grad:
                    x.register_hook(lambda g: self._gradient(where, "in", g))

        return hook

    def _after(self, where: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            found = list(_floats(out))
            if self.forward is None and not all(torch.isfinite(x).all() for x in found):
                inputs = tuple(map(Stats.of, _floats((args, kwargs))))
                self.forward = Finding(where, inputs, tuple(map(Stats.of, found)))
            for x in found:
                if x.requires_grad:
                    x.register_hook(lambda g: self._gradient(where, "out", g))

        return hook

    def _gradient(self, where: str, side: str, grad: Tensor) -> None:
        """Of what goes in, or comes out. Gradients come from the last module to the first; that of a tensor first as of
        what came out of one module, then as of what went into the next.
        """
        if self.backward is not None:
            return
        stats, same = Stats.of(grad), grad.data_ptr()
        self.grads.setdefault(where, {"in": [], "out": []})[side].append(stats)
        if side == "in" and stats.bad and self._sound(where):
            self._settle(Finding(where, tuple(self.grads[where]["out"]), (stats,)))
        elif self.around is not None and same != self.around[1]:
            self._settle(self.around[0])
        elif side == "out" and stats.bad and self.around is None:
            parts = where.split(".")
            outer = [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
            if found := next(filter(self._sound, outer), ""):
                self.around = Finding(found, tuple(self.grads[found]["out"]), (stats,)), same

    def _sound(self, where: str) -> bool:
        """Whether gradients of what comes out of a module have come, and are finite."""
        got = self.grads.get(where, {"out": []})["out"]
        return bool(got) and not any(s.bad for s in got)

    def _settle(self, finding: Finding) -> None:
        self.backward = self.backward or finding

    def _parameter(self, where: str) -> Any:
        def hook(grad: Tensor) -> None:
            if self.backward is None and not torch.isfinite(grad).all():
                self._settle(self.around[0] if self.around else Finding(where, (), (Stats.of(grad),)))

        return hook


def _floats(value: Any) -> Iterator[Tensor]:
    """The floating tensors in nested values."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _floats(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _floats(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            with suppress(AttributeError):  # a state has what its terms need
                yield from _floats(getattr(value, field.name))


def read(path: str | Path, device: str = "cpu") -> tuple[dict[str, Any], Config]:
    """A bundle, and its configuration for ``device``, without compilation and graphs, which hide modules."""
    content, cfg = bundle.load(path)
    plain: dict[str, Any] = {"device": device, "compile": False, "cuda_graphs": False, "epilogues": False}
    run = dataclasses.replace(cfg.runtime, **plain, threads=0, dtype="auto")
    return content, dataclasses.replace(cfg, runtime=run)


def replay(content: Mapping[str, Any], cfg: Config, dtype: str) -> Replay:
    """Make the step of a bundle again.

    Args:
        content, cfg: of `read`.
        dtype: one of `DTYPES`; 16 bits by autocast as in training, float16 with the scale of the loss at the time.

    Raises:
        ConfigError: dtype or device cannot be used.
        CheckpointError: the weights do not fit the configuration.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: unknown value {dtype!r}; accepted: {', '.join(DTYPES)}")
    device = resolve_device(cfg.runtime.device)
    kind = getattr(torch, dtype)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if device.type == "cuda" else []):
        with_autocast = torch.float32 if kind == torch.float64 else kind
        step = METHODS[cfg.method](cfg, device=device, dtype=with_autocast)
        modules = take_weights(step, content)
        if kind == torch.float64:
            for module in modules.values():
                module.double()
        if content.get("rng"):
            checkpoint.set_rng_state(content["rng"], device)
        batches = [bundle.unpack(batch, device) for batch in content["batches"]]
        weights = next(
            (f"{root}.{name}" for root, m in modules.items() for name, p in m.state_dict().items() if _bad(p)), ""
        )
        with Watch(modules) as watch:
            out = step(batches, content["step"] - 1)
    values = {"loss": out.loss, **out.terms, "grad_norm": out.grad_norm}
    return Replay(dtype, {k: float(v) for k, v in values.items()}, weights, watch.forward, watch.backward)


def take_weights(step: TrainStep | LevjepaStep, content: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Load the weights of a bundle; the modules that compute with them, by name."""
    heads = step.plan if isinstance(step, TrainStep) else step.projector
    for name in ("encoder", "target_encoder", *(["predictor"] if isinstance(step, TrainStep) else [])):
        interop.load_weights(getattr(step, name), content[name], f"bundle: {name}")
    interop.load_weights(heads, content["heads"], "bundle: heads")
    modules: dict[str, nn.Module] = {"encoder": step.encoder}
    if isinstance(step, TrainStep):
        if step.low is not None:
            step.low.refresh()
        if step.scaler is not None:
            step.scaler.load_state_dict(content.get("scaler") or None)
        modules |= {"target_encoder": step.target, "predictor": step.predictor}
    return modules | {"heads" if isinstance(step, LevjepaStep) else "objectives": heads}


def _bad(x: Tensor) -> bool:
    return x.is_floating_point() and not bool(torch.isfinite(x).all())


def report(content: Mapping[str, Any], found: Replay) -> list[str]:
    """Lines for a person."""
    values = ", ".join(f"{k}={v:.4g}" for k, v in found.values.items())
    again = "fails again" if found.fails else "does not fail"
    lines = [f"{found.dtype}: step {content['step']} {again}: {values}"]
    if found.weights:
        lines.append(f"  weights: {found.weights} is not finite before the step")
    for pass_, finding, names in (
        ("forward", found.forward, ("input", "output")),
        ("backward", None if found.forward else found.backward, ("gradient in", "gradient out")),
    ):
        if finding is None:
            continue
        lines.append(f"  {pass_}: first not finite at {finding.module}")
        lines += [f"    {name} {s}" for name, part in zip(names, (finding.inputs, finding.outputs)) for s in part]
    return lines


def about(content: Mapping[str, Any]) -> str:
    """What a bundle is of."""
    values = ", ".join(f"{k}={v}" for k, v in content["values"].items())
    behind, step = content["weights_step"], content["step"]
    weights = f"weights of step {behind}"
    if behind != step - 1:
        weights += f", since those of step {step - 1} were gone: it may not fail with these"
    return f"step {step} of a run in {content['dtype']}: {values}; {weights}"


def run(path: str | Path, dtypes: list[str], device: str = "cpu") -> tuple[str, list[Replay], list[str]]:
    """(what the bundle is of, replays, lines) in its own dtype and those of ``dtypes``."""
    content, cfg = read(path, device)
    own = str(content["dtype"])
    found: list[Replay] = []
    lines = [about(content)]
    for dtype in dict.fromkeys([own, *(dtypes or ["float32"])]):
        try:
            made = replay(content, cfg, dtype)
        except (RuntimeError, NotImplementedError) as error:
            raise UserError(f"{path}: cannot be made again in {dtype} ({str(error).splitlines()[0][:160]})") from error
        found.append(made)
        lines += report(content, made)
    return lines[0], found, lines
