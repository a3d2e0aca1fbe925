"""`vjepa2`: what is looked for in a training module, and what takes its place."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.errors import UserError
from vjepa_fast.patch.compare import once
from vjepa_fast.patch.losses import Loss
from vjepa_fast.patch.masks import collator
from vjepa_fast.patch.nested import Nested, find

_log = logging.getLogger("vjepa_fast")
_DOES = {
    "MaskCollator": "draws the same masks, all samples at once",
    "apply_masks": "gathers without an index as large as the features",
    "loss": "is ops.latent_loss: gather, distance and mean in one pass",
}
_LINE = "use ops.latent_loss(zij, hi, mij, loss_exp=...) in it, or leave it by loss=None"
_V21 = ("z", "h", "masks_to_apply", "cls_loss", "d_weights")


def vjepa2(
    module: ModuleType, *, loss: str | None = "loss_fn", masks: str = "masks_pred", loss_exp: str = "loss_exp"
) -> list[str]:
    """Replace mask collator, mask gathering and loss of a training module in the manner of V-JEPA 2's ``train.py``.

    Call it after the module was imported and before its ``main`` runs. Looked for are:

    - ``MaskCollator(cfgs_mask, dataset_fpcs, crop_size, patch_size, tubelet_size)``, called with a list of samples
      whose last entry is the clips' frame indices: replaced by one that draws the same masks from the same random
      numbers, all samples at once.
    - ``apply_masks(x, masks, concat=True)``: gathers without an index as large as the features.
    - ``loss_fn``, by `ops.latent_loss`. Lists by group of clips, and of ``z`` and the masks by mask as well; h [B,N,D],
      z [B,K,D]. It is an attribute of the module, ``loss_fn(z, h, masks_pred, loss_exp)``, or is defined inside one of
      its functions, at any depth: ``loss_fn(z, h)`` (V-JEPA 2) with ``masks_pred`` and ``loss_exp`` of the functions
      around it, or ``loss_fn(z, h, masks_to_apply, cls_loss, d_weights)`` (V-JEPA 2.1) with ``loss_exp`` of those.
      The function around it, ``main``, remains the same object, so names that others have for it are patched too;
      a call of it that is under way is not.

    Args:
        module: changed in place.
        loss: name of the loss function; None leaves it.
        masks: name of the variable that has the masks in a loss without such an argument, or of the argument.
        loss_exp: name of the variable that has the exponent.

    Returns:
        What was replaced, in words, one for each; also told to the logger ``vjepa_fast``.

    Raises:
        UserError: the module has none of these, was patched already, or has a loss of another kind. Later, from the
            first call of what was replaced: it says something else than the original.
    """
    makers: dict[str, Callable[..., Any]] = {"MaskCollator": collator, "apply_masks": _gather}
    if loss is not None:
        makers[loss] = lambda original, name: _loss(original, name, masks)
    there = {name: getattr(module, name) for name in makers if callable(getattr(module, name, None))}
    nested = None if loss is None else find(module, loss)
    if not there and not nested:
        raise UserError(
            f"{module.__name__}: has none of {', '.join(makers)}; is it a training module of V-JEPA 2's kind?"
        )
    originals: dict[str, Any] = {**there, **({nested.owner.__name__: nested.owner} if nested else {})}
    if patched := [name for name, original in originals.items() if hasattr(original, "vjepa_fast_original")]:
        raise UserError(f"{module.__name__}: {patched[0]} was patched already; call vjepa2 once")
    hook = nested and _nested_loss(nested, f"{module.__name__}.{nested.owner.__name__}", masks, loss_exp)
    made = {name: makers[name](original, f"{module.__name__}.{name}") for name, original in there.items()}
    for name, replacement in made.items():
        replacement.vjepa_fast_original = there[name]
        setattr(module, name, replacement)
    said = {name: name for name in made}
    if nested and hook:
        nested.replace(hook)
        said[nested.code.co_name] = nested.where if loss not in there else f"{loss} and {nested.where}"
    lines = [
        f"{what} {_DOES.get(name, _DOES['loss'])}; compared with the original at its first use"
        for name, what in said.items()
    ]
    for name in makers:
        if name not in said:
            inside = " nor defined inside its functions" if name == loss else ""
            lines.append(f"{name}: {'neither' if inside else 'not'} an attribute of the module{inside}, so it stays")
    for line in lines:
        _log.info("%s: %s", module.__name__, line)
    return lines


def _gather(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    def apply_masks(x: Tensor, masks: Sequence[Tensor], concat: bool = True) -> Tensor | list[Tensor]:
        parts = [x.gather(1, mask.unsqueeze(-1).expand(-1, -1, x.shape[-1])) for mask in masks]
        return torch.cat(parts) if concat else parts

    return once(apply_masks, original, name)


# -- loss --------------------------------------------------------------------------------------------------------------
def _loss(original: Callable[..., Any], name: str, masks: str) -> Callable[..., Any]:
    signature = inspect.signature(original)
    wanted = ["z", "h", masks]
    if list(signature.parameters)[:3] != wanted or len(signature.parameters) > 4:
        raise UserError(f"{name}: expected a function of ({', '.join(wanted)}, loss_exp); {_LINE}")
    checked = Loss(name)

    def loss_fn(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        z, h, chosen, *exponent = given.arguments.values()
        return checked(lambda z, h: original(z, h, chosen, *exponent), z, h, chosen, exponent[0] if exponent else 1.0)

    return loss_fn


def _nested_loss(nested: Nested, module: str, masks: str, loss_exp: str) -> Callable[..., Any]:
    """What is called in place of the inner function."""
    name = f"{module}: {nested.where}"
    v21 = nested.parameters == _V21
    if not nested.plain or nested.parameters not in (("z", "h"), _V21):
        raise UserError(f"{name}: expected a function of (z, h) or ({', '.join(_V21)}); {_LINE}")
    variables = {loss_exp: "loss_exp"} if v21 else {masks: "masks", loss_exp: "loss_exp"}
    free = set(nested.code.co_freevars)
    if missing := [x for x in variables if x not in free]:
        raise UserError(
            f"{name}: uses no variable {missing[0]} of the functions around it; if it has another name, "
            f"give it as {variables[missing[0]]}=; {_LINE}"
        )
    if other := sorted(free - {*variables, "apply_masks"}):
        raise UserError(f"{name}: uses {other[0]} as well, so it is another loss; {_LINE}")
    checked = Loss(name)

    def hook(arguments: tuple[Any, ...], around: dict[str, Any], original: FunctionType) -> Tensor:
        z, h, *rest = arguments
        chosen, *more = rest if v21 else (around[masks],)
        return checked(lambda z, h: original(z, h, *rest), z, h, chosen, around[loss_exp], *more)

    return hook
