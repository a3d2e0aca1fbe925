"""The optimisers, over every trainable module with the published parameter groups, and the average that follows them.

``update`` is one step: clipping, optimiser and moving average; with AdamW one pass over memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vjepa_fast import ops
from vjepa_fast.config.schema import OptimizationConfig
from vjepa_fast.errors import CheckpointError, ConfigError
from vjepa_fast.metrics.profile import phase
from vjepa_fast.models.ema import LowCopy
from vjepa_fast.models.parts import is_cut, like, local
from vjepa_fast.ops import _capture
from vjepa_fast.trainer.sharding import norm
from vjepa_fast.trainer.signals import weights_change

# torch's batched kernels have no public names
_lerp = torch._foreach_lerp_  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]  # no public twin
_copy = torch._foreach_copy_  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]  # no public twin

Group = dict[str, Any]  # of parameters, as torch.optim has it


def parameter_groups(modules: Mapping[str, nn.Module], weight_decay: float) -> list[Group]:
    """Two groups per module that has parameters: first all that decay, then all that do not (biases and 1-d).

    The order (encoder, predictor, heads; then the same without decay) is that of the published optimiser.
    """
    decayed: list[Group] = []
    excluded: list[Group] = []
    for name, module in modules.items():
        split: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for key, p in module.named_parameters():
            if p.requires_grad:
                split["bias" in key or p.ndim <= 1].append(p)
        if split[0]:
            decayed.append({"params": split[0], "name": name, "WD_exclude": False, "weight_decay": weight_decay})
        if split[1]:
            excluded.append({"params": split[1], "name": name, "WD_exclude": True, "weight_decay": 0.0})
    return decayed + excluded


class Average:
    """The moving average: target <- momentum * target + (1 - momentum) * source, and ``low`` follows the target.

    ``low`` is the copy of the target in the dtype that it computes in, or None.
    """

    def __init__(self, source: nn.Module, target: nn.Module, low: LowCopy | None = None):
        self.source, self.target, self.low = source, target, low
        self.pairs: dict[Tensor, Tensor] = dict(zip(source.parameters(), target.parameters(), strict=True))
        self.lows: dict[Tensor, Tensor] = dict(zip(low.full, low.low)) if low is not None else {}

    @torch.no_grad()
    def follow(self, momentum: float | Tensor, done: AbstractSet[Tensor] = frozenset()) -> None:
        """The update of parameters that are not among ``done`` (of all, or those without gradient), and of buffers.

        ``momentum`` may be a 0-d tensor on their device.
        """
        pace = 1.0 - momentum
        rest = [(local(target), local(source)) for source, target in self.pairs.items() if source not in done]
        if rest:
            targets, sources = [t for t, _ in rest], [s for _, s in rest]
            _lerp(targets, sources, [pace.to(t.dtype) for t in targets] if isinstance(pace, Tensor) else pace)
            wide = [t for t in targets if t in self.lows]
            if wide:
                _copy([self.lows[t] for t in wide], wide)
        for a, b in zip(self.target.buffers(), self.source.buffers()):
            a.copy_(b)


class Bucket(NamedTuple):
    """Parameters of one group that have made as many steps, and so share the numbers of the next."""

    group: Group
    step: int  # the one to come, from 1
    params: list[Tensor]

    def rule(self, momentum: float) -> ops.Rule:
        """The numbers of the step to come."""
        g, (beta1, beta2) = self.group, self.group["betas"]
        return ops.Rule(g["lr"], beta1, beta2, g["eps"], g["weight_decay"], self.step, 1.0 - momentum)


class AdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` (same groups, same state dict) whose step is `ops.adamw_ema_`.

    Steps are counted on the host, so that no value has to come from the device or go there.
    """

    def __init__(self, groups: list[Group], **kwargs: Any):
        super().__init__(groups, **kwargs)
        self.counts: dict[Tensor, int] = {}

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's overloads for closures
        self,
        closure: Callable[[], float] | None = None,
        *,
        average: Average | None = None,
        momentum: float = 1.0,
        scale: Tensor | None = None,
        on_device: bool = False,
        go: Tensor | None = None,
        follow: Tensor | None = None,
    ) -> None:
        """One step over all parameters that have a gradient, multiplied by ``scale`` (0-d) first.

        ``average``: its target moves by ``1 - momentum`` towards the new parameters, those without gradient included.
        ``on_device``: the numbers of the step are put there and read there, see `work`. ``go``, ``follow``: see `work`.
        """
        if closure is not None:
            raise ValueError("AdamW.step: a closure is not supported")
        buckets = self.buckets([p for p in self.counted if p.grad is not None])
        numbers = None
        if on_device and buckets:
            rows = torch.tensor([b.rule(momentum).changing for b in buckets], dtype=torch.float64, device="cpu")
            numbers = _capture.constant(rows, buckets[0].params[0].device)
        self.count(buckets)
        given: dict[str, Any] = {"numbers": numbers, "go": go, "follow": follow}
        self.work(buckets, average=average, momentum=momentum, scale=scale, **given)

    @property
    def counted(self) -> list[Tensor]:
        """All parameters, in order."""
        return [p for group in self.param_groups for p in group["params"]]

    def buckets(self, params: Iterable[Tensor]) -> list[Bucket]:
        """These parameters, as their next step takes them together."""
        wanted, found = set(params), list[Bucket]()
        for group in self.param_groups:
            by_count: dict[int, list[Tensor]] = {}
            for p in group["params"]:
                if p in wanted:
                    by_count.setdefault(self.counts.get(p, 0) + 1, []).append(p)
            found += [Bucket(group, step, params) for step, params in by_count.items()]
        return found

    def count(self, buckets: list[Bucket]) -> None:
        """What the host keeps of the step: its count, and at the first one of a parameter its moments."""
        for bucket in buckets:
            for p in bucket.params:
                if not (state := self.state[p]):
                    state["step"] = torch.zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                self.counts[p] = bucket.step

    @torch.no_grad()
    def work(
        self,
        buckets: list[Bucket],
        *,
        average: Average | None,
        momentum: float,
        scale: Tensor | None,
        numbers: Tensor | None,
        go: Tensor | None = None,
        follow: Tensor | None = None,
    ) -> None:
        """What the device does in a step.

        Args:
            buckets: counted already.
            average: see `step`.
            momentum: of the average.
            scale: see `step`.
            numbers: float64 [buckets, 4] on the parameters' device, `ops.Rule.changing` of each bucket: with these no
                other number of the step is read, and the work can be captured. ``momentum`` is then in each row.
            go: bool [] there; where it is false nothing changes.
            follow: [] there, 1 where ``go`` is false and the average's target moves all the same, else 0.
        """
        targets, lows = (average.pairs, average.lows) if average is not None else ({}, {})
        done: set[Tensor] = set()
        rows = [None] * len(buckets) if numbers is None else numbers.unbind()
        for bucket, row in zip(buckets, rows):
            grads = [p.grad for p in bucket.params if p.grad is not None]
            first, second = ([self.state[p][key] for p in bucket.params] for key in ("exp_avg", "exp_avg_sq"))
            behind = [targets.get(p) for p in bucket.params]
            low = [None if t is None else lows.get(t) for t in behind]
            lists, rule = (bucket.params, grads, first, second), bucket.rule(momentum)
            if is_cut(grads[0]):
                self._work_on_parts(lists, rule, behind, scale, go)
            else:
                ops.adamw_ema_(*lists, rule, targets=behind, lows=low, scale=scale, numbers=row, go=go)
            done.update(bucket.params)
        if average is not None:
            pace = momentum if numbers is None else 1.0 - numbers[0, 3]
            average.follow(pace if go is None else torch.where(go, pace, 1.0), done)
            if follow is not None:
                average.follow(1.0 - (1.0 - pace) * follow)

    def _work_on_parts(
        self,
        lists: tuple[list[Tensor], ...],
        rule: ops.Rule,
        follow: list[Tensor | None],
        scale: Tensor | None,
        go: Tensor | None,
    ) -> None:
        """The same on the own parts of tensors that are cut, some of which may be empty."""
        held = [n for n, p in enumerate(lists[0]) if local(p).numel()]
        params, grads, first, second = ([local(tensors[n]) for n in held] for tensors in lists)
        targets = [None if (t := follow[n]) is None else local(t) for n in held]
        if held:
            ops.adamw_ema_(params, grads, first, second, rule, targets=targets, scale=scale, go=go)

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.AdamW`` has it."""
        for p, count in self.counts.items():
            self.state[p]["step"] = torch.tensor(float(count))
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what an AdamW of torch or this one saved."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).cpu()
        self.counts = {p: int(state["step"]) for p, state in self.state.items()}


def check(cfg: OptimizationConfig) -> None:
    """Refuse an optimiser that is not installed.

    Raises:
        ConfigError: Muon is asked for and the installed timm has none.
    """
    if cfg.name == "muon":
        import timm
        import timm.optim

        if not hasattr(timm.optim, "Muon"):
            raise ConfigError(
                f"optimization.name: muon needs timm 1.0.21 or later, this is {timm.__version__}; "
                "upgrade timm or use adamw"
            )


def build_optimizer(
    modules: Mapping[str, nn.Module], cfg: OptimizationConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101), or by ``optimization.name`` Muon for the matrices of the blocks.

    Raises:
        ConfigError: Muon is asked for and the installed timm has none.
    """
    groups = parameter_groups(modules, cfg.weight_decay)
    check(cfg)
    if cfg.name == "muon":
        return _muon(modules, groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps)
    fused = device.type in ("cpu", "cuda") or None  # what torch's own does with the state that we save
    return AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=fused)


def hidden_matrices(modules: Mapping[str, nn.Module]) -> set[Tensor]:
    """Weights [O,I] of the linear layers of transformer blocks, of those modules that have blocks."""
    from vjepa_fast.layers.block import Block

    blocks = [block for module in modules.values() for block in module.modules() if isinstance(block, Block)]
    return {p for block in blocks for p in block.parameters() if p.ndim == 2 and p.requires_grad}


def _muon(
    modules: Mapping[str, nn.Module], groups: list[Group], *, lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """Timm's Muon (Jordan et al., 2024; step sizes as in arXiv:2502.16982); AdamW for all but the hidden matrices."""
    import timm.optim

    hidden = hidden_matrices(modules)
    split: list[Group] = []
    for group in groups:
        for muon in (True, False):
            params = [p for p in group["params"] if (p in hidden) == muon]
            if params:
                own = {"nesterov": True, "use_muon": True} if muon else {"eps": eps, "use_muon": False}
                split.append({**group, "params": params, **own})
    return timm.optim.Muon(  # pyright: ignore[reportPrivateImportUsage]  # timm does not list it as exported
        split, lr=lr, betas=betas, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )


def set_schedule(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set the learning rate of all groups, and the weight decay of those that decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if not group["WD_exclude"]:
            group["weight_decay"] = weight_decay


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """All parameters in the optimiser's order, which is the same in every process."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def load_state(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: object) -> None:
    """Take over the state that an optimiser of the same parameters saved; its moments are other tensors then.

    Raises:
        CheckpointError: it is of other parameters; names ``path``.
    """
    try:
        _check_state(optimizer, state)
        optimizer.load_state_dict(_cut(optimizer, state))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: optimiser state does not fit this recipe ({error})") from None


def _cut(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state with its moments cut as their parameters are."""
    own = [p for group in optimizer.param_groups for p in group["params"]]
    order = [n for group in state["param_groups"] for n in group["params"]]
    if not any(is_cut(p) for p in own):
        return state
    found: dict[int, Any] = dict(state["state"])
    for p, n in zip(own, order):
        if n in found:
            found[n] = {key: like(x, p) if isinstance(x, Tensor) else x for key, x in found[n].items()}
    return {**state, "state": found}


_READ = ("lr", "betas", "eps", "weight_decay", "WD_exclude")  # by every step, of each group


def _check_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """ValueError where moments have another shape than their parameters, or settings are of another kind."""
    for own, group in zip(optimizer.param_groups, state["param_groups"]):
        held = {n: state["state"][n] for n in group["params"] if n in state["state"]}
        names = {name for moments in held.values() for name in moments}
        mixed = "use_muon" in names  # Muon keeps other moments of matrices than of the rest
        for n, param in zip(group["params"], own["params"]):
            for name in (held[n] if mixed else names) if n in held else ():
                value = held[n].get(name)
                if isinstance(value, bool):
                    continue
                if name != "step" and (not isinstance(value, Tensor) or value.shape != param.shape):
                    found = list(value.shape) if isinstance(value, Tensor) else value
                    raise ValueError(f"{name} of parameter {n} is {found}, the parameter {list(param.shape)}")
                if name == "step" and (value is None or torch.as_tensor(value).numel() != 1):
                    raise ValueError(f"step of parameter {n} is {value}, not a count")
    for own, group in zip(optimizer.param_groups, state["param_groups"]):
        if lost := [key for key in _READ if key in own and key not in group]:
            raise ValueError(f"param_groups: no {lost[0]}")
        for key, value in own.items():
            if key in group and key != "params" and _kind(group[key]) != _kind(value):
                raise ValueError(f"param_groups: {key} is {group[key]!r}, here {value!r}")


def _kind(value: Any) -> Any:
    """What a setting may be replaced by: a number by a number, a pair by a pair."""
    if isinstance(value, (list, tuple)):
        return [_kind(v) for v in value]
    if isinstance(value, Tensor):
        return "number" if value.numel() == 1 else "tensor"
    switch = value is None or isinstance(value, bool)  # fused=None on another device
    return "switch" if switch else "number" if isinstance(value, (int, float)) else type(value).__name__


def load_moments(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], path: object) -> None:
    """Take over the moments alone that another run's AdamW saved, this package's or the published code's: rates, decay
    and what groups are called stay those of this optimiser.

    Raises:
        CheckpointError: they are of other parameters; names ``path``.
    """
    own, saved = optimizer.state_dict(), list(state.get("param_groups", ()))
    sizes, theirs = ([len(g["params"]) for g in groups] for groups in (own["param_groups"], saved))
    if sizes != theirs:
        raise CheckpointError(
            f"{path}: opt: groups of {theirs} parameters, of {sizes} here; set init.optimizer=false for weights alone"
        )
    shapes = [p.shape for p in parameters(optimizer)]
    order = [number for group in saved for number in group["params"]]
    for shape, number in zip(shapes, order):
        found = state["state"].get(number, {}).get("exp_avg")
        if found is not None and found.shape != shape:
            raise CheckpointError(
                f"{path}: opt: moments of {list(found.shape)} for a parameter of {list(shape)}; "
                "set init.optimizer=false for weights alone"
            )
    groups = [{**mine, "params": group["params"]} for mine, group in zip(own["param_groups"], saved)]
    load_state(optimizer, {"state": state["state"], "param_groups": groups}, path)


def gradient_norm(params: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm over all gradients, a 0-d tensor on their device (no sync)."""
    return norm([p.grad for p in params if p.grad is not None])


def clip_scale(norm: Tensor, limit: float | None) -> Tensor | None:
    """What gradients of this norm are multiplied by (0-d), as ``clip_grads_with_norm_`` does; None without a limit."""
    return None if limit is None else torch.clamp(limit / (norm + 1e-6), max=1.0)


def update(
    optimizer: torch.optim.Optimizer,
    average: Average | None,
    momentum: float,
    norm: Tensor,
    limit: float | None,
    *,
    on_device: bool = False,
    factor: float | None = None,
    go: Tensor | None = None,
    follow: Tensor | None = None,
) -> None:
    """Clip gradients of this ``norm`` to the ``limit`` (None: do not), step, and let the average follow.

    ``factor``: AdamW multiplies gradients by it first; ``norm`` is that afterwards.
    ``on_device``: AdamW reads the numbers of the step there, as it does in a graph.
    ``go``: bool [] on the device; where it is false nothing changes. On CUDA AdamW does so without a wait, and its
    count of steps goes on; Muon waits. ``follow``: [] there, 1 where the average follows all the same, else 0.
    """
    waits = not isinstance(optimizer, AdamW)
    if go is not None and (waits or go.device.type == "cpu"):
        if not go:
            if average is not None and follow is not None and follow:
                weights_change()
                average.follow(momentum)
            return
        go = follow = None
    weights_change()
    scale = clip_scale(norm, limit)
    if factor is not None:
        scale = torch.full_like(norm, factor) if scale is None else scale * factor
    if isinstance(optimizer, AdamW):
        with phase("optimiser"):  # and the average, in the same pass
            given: dict[str, Any] = {"on_device": on_device, "go": go, "follow": follow}
            optimizer.step(average=average, momentum=momentum, scale=scale, **given)
        return
    with phase("optimiser"):
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters(optimizer), limit, norm)
        optimizer.step()
    if average is not None:
        with phase("ema"):
            average.follow(momentum)
