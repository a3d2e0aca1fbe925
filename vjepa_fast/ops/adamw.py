"""AdamW, and the moving average that follows the parameters, in one pass over memory.

Not a custom op as the others are: it changes lists of tensors in place, nothing differentiates it or compiles it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vjepa_fast.ops import _backend, _capture, _check, _cpp, _triton

_FUSED = ("cpu", "cuda")  # devices for which torch has its fused AdamW
_torch: Any = torch  # whose functions of many tensors have no public names


class Rule(NamedTuple):
    """Numbers of a step, the same for all its parameters. ``step`` counts from 1; ``follow`` is 1 - momentum."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    follow: float = 0.0

    @property
    def bias1(self) -> float:
        """1 - beta1**step: what the first moment is divided by."""
        return 1.0 - self.beta1**self.step

    @property
    def bias2(self) -> float:
        """1 - beta2**step: what the second moment is divided by."""
        return 1.0 - self.beta2**self.step

    @property
    def changing(self) -> tuple[float, float, float, float]:
        """What differs from step to step, as kernels use it: 1 - lr*decay, lr/bias1, bias2**-0.5, follow."""
        return 1.0 - self.lr * self.weight_decay, self.lr / self.bias1, self.bias2**-0.5, float(self.follow)


Lists = tuple[
    list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor | None], list[Tensor | None]
]  # parameters, gradients, first and second moments, targets, copies


def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    rule: Rule,
    *,
    targets: Sequence[Tensor | None] | None = None,
    lows: Sequence[Tensor | None] | None = None,
    scale: Tensor | None = None,
    numbers: Tensor | None = None,
    go: Tensor | None = None,
) -> None:
    """One step of AdamW (arXiv:1711.05101), then ``target <- lerp(target, param, follow)``, all in place.

    Args:
        params: floating tensors on one device; ``grads`` and the moments are of the same shapes.
        rule: what is the same for all of them.
        targets: per parameter the tensor that follows it (V-JEPA, arXiv:2404.08471), or None.
        lows: per parameter a copy of its target in another dtype, to be brought up to date, or None.
        scale: float32 [] on their device, by which gradients are multiplied first (clipping); eager code leaves the
            product in the gradients, the others do not touch them.
        numbers: float64 [4] on their device, `Rule.changing` of the step. Then of ``rule`` only betas and eps are read,
            and the work is the same at every step: it can be part of a captured CUDA graph.
        go: bool [] on their device; where it is false nothing changes, whatever the gradients hold.

    Raises:
        ValueError: lists of different lengths, tensors of different shapes, or a copy without its target.

    Floor, in bytes per float32 parameter: 16 read and 12 written; with a target 20 and 16, with a bfloat16 copy of it 2
    more. Backends agree with ``torch.optim.AdamW`` and ``torch.lerp`` to 4 units in the last place per step, of the
    largest number that went into an element.
    """
    n = len(params)
    none: list[Tensor | None] = [None] * n
    targets, lows = (none if x is None else list(x) for x in (targets, lows))
    lists: Lists = list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), targets, lows
    shapes = [p.shape for p in lists[0]]
    for name, values in zip(("grads", "exp_avgs", "exp_avg_sqs", "targets", "lows"), lists[1:]):
        _check.require(len(values) == n, "adamw_ema_", name, f"{n} tensors, one per parameter", len(values))
        for shape, x in zip(shapes, values):
            if x is not None and x.shape != shape:
                _check.require(False, "adamw_ema_", name, f"the shape {list(shape)}", x)
    for target, low in zip(targets, lows):
        if low is not None and target is None:
            _check.require(False, "adamw_ema_", "lows", "None where there is no target", low)
    _check.require(rule.step >= 1, "adamw_ema_", "rule.step", "at least 1", rule.step)
    if numbers is not None:
        ok = numbers.shape == (4,) and numbers.dtype == torch.float64
        _check.require(ok, "adamw_ema_", "numbers", "float64 [4]", numbers)
    if n:
        _backend.call("adamw_ema", lists, rule, scale, numbers, go)


@_backend.register("adamw_ema", "eager")
def _eager(lists: Lists, rule: Rule, scale: Tensor | None, numbers: Tensor | None, go: Tensor | None) -> None:
    """PyTorch's own kernels: its fused AdamW where it has one for the device, else its formula tensor by tensor."""
    if go is not None:
        changing = [x for values in (lists[0], *lists[2:]) for x in values if x is not None]
        before = [x.clone() for x in changing]
        _eager(lists, rule, scale, numbers, None)
        for x, old in zip(changing, before):
            torch.where(go, x, old, out=x)
        return
    params, grads, exp_avgs, exp_avg_sqs, targets, lows = lists
    keep, pace, root, follow = rule.changing if numbers is None else numbers.to(params[0].dtype).unbind()
    if scale is not None:
        _torch._foreach_mul_(grads, scale.to(params[0].device))
    if numbers is None and params[0].device.type in _FUSED:
        steps = [torch.full((), float(rule.step), device=params[0].device)] * len(params)
        given = {name: getattr(rule, name) for name in ("lr", "beta1", "beta2", "weight_decay", "eps")}
        _torch._fused_adamw_(*lists[:4], [], steps, **given, amsgrad=False, maximize=False)
    else:
        _torch._foreach_mul_(params, keep)
        _torch._foreach_lerp_(exp_avgs, grads, 1.0 - rule.beta1)
        _torch._foreach_mul_(exp_avg_sqs, rule.beta2)
        _torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1.0 - rule.beta2)
        roots = _torch._foreach_sqrt(exp_avg_sqs)
        _torch._foreach_mul_(roots, root)
        _torch._foreach_add_(roots, rule.eps)
        steps = _torch._foreach_div(exp_avgs, roots)
        _torch._foreach_mul_(steps, pace)
        _torch._foreach_sub_(params, steps)
    followed = [(t, p) for t, p in zip(targets, params) if t is not None]
    if followed:
        weight = follow if numbers is None else [follow] * len(followed)
        _torch._foreach_lerp_(*map(list, zip(*followed)), weight)
    copied = [(low, t) for low, t in zip(lows, targets) if low is not None]
    if copied:
        _torch._foreach_copy_(*map(list, zip(*copied)))


def _objections(backend: str, *args: Any) -> list[str]:
    machine = {"cpp": _cpp, "triton": _triton}[backend].objections
    reasons = machine(*(args[0][0] if args else ()))
    if reasons or not args:
        return reasons
    lists, _, scale, numbers, go = args
    wide = [x for values in lists[:5] for x in values if x is not None]
    narrow = [x for x in lists[5] if x is not None]
    if {x.dtype for x in wide} != {torch.float32}:
        reasons.append(f"{backend} supports float32 parameters, gradients and averages")
    if not {x.dtype for x in narrow} <= {torch.bfloat16}:
        reasons.append(f"{backend} keeps copies in bfloat16 only")
    if not all(x.is_contiguous() for x in (*wide, *narrow)):
        reasons.append(f"{backend} supports contiguous tensors only")
    if len({x.device for x in (*wide, *narrow, *(x for x in (scale, numbers, go) if x is not None))}) > 1:
        reasons.append(f"{backend} supports tensors on one device")
    if backend == "cpp" and numbers is not None:
        reasons.append("cpp reads the numbers of a step on the host")
    return reasons


def _addresses(lists: Lists) -> list[tuple[int, ...]]:
    """Per parameter: addresses of it, its gradient, averages, target (0: none), copy (0: none), and its elements."""
    rows = zip(*lists)
    return [(*(0 if x is None else x.data_ptr() for x in row), row[0].numel()) for row in rows]


@_backend.register("adamw_ema", "cpp", functools.partial(_objections, "cpp"))
def _cpp_adamw(lists: Lists, rule: Rule, scale: Tensor | None, numbers: None, go: Tensor | None) -> None:
    if go is not None and not go:
        return
    rows = torch.tensor(_addresses(lists), dtype=torch.int64, device="cpu")
    *constants, _, follow = rule  # lr, betas, eps, weight decay
    factor = torch.empty(0, device="cpu") if scale is None else scale.float()
    torch.ops.vjepa_fast_cpp.adamw_ema(rows, *constants, rule.bias1, rule.bias2, follow, factor)


@_backend.register("adamw_ema", "triton", functools.partial(_objections, "triton"))
def _triton_adamw(lists: Lists, rule: Rule, scale: Tensor | None, numbers: Tensor | None, go: Tensor | None) -> None:
    first = lists[0][0]
    if go is not None:  # to the kernel a scale below 0 says so
        scale = torch.where(go, 1.0 if scale is None else scale, -1.0)
    if numbers is None:
        numbers = _capture.constant(torch.tensor(rule.changing, dtype=torch.float64, device="cpu"), first.device)
    tables = _capture.constant, not _capture.capturing(first.device)
    _triton.launch("adamw", "adamw_ema", first, _addresses(lists), rule, scale, numbers, first.device, *tables)


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm over all elements of floating tensors on one device: a 0-d tensor there, nobody waits.

    Of their dtype; the C++ kernel adds up in float64. The norm of none is 0, on the CPU. Floor: each element read once.
    """
    return _backend.call("total_norm", list(tensors)) if tensors else torch.zeros((), device="cpu")


@_backend.register("total_norm", "eager")
def _eager_norm(tensors: list[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(tensors)


def _norm_objections(*args: Any) -> list[str]:
    reasons = _cpp.objections(*(args[0] if args else ()))
    if args and not all(x.dtype == torch.float32 and x.is_contiguous() for x in args[0]):
        reasons.append("cpp supports contiguous float32 tensors")
    return reasons


@_backend.register("total_norm", "cpp", _norm_objections)
def _cpp_norm(tensors: list[Tensor]) -> Tensor:
    out = torch.empty((), device="cpu")
    rows = torch.tensor([(x.data_ptr(), x.numel()) for x in tensors], dtype=torch.int64, device="cpu")
    torch.ops.vjepa_fast_cpp.total_norm(rows, out)
    return out
