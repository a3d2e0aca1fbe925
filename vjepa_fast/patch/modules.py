"""`vjepa2`: what is looked for in a training module, and what takes its place."""

from __future__ import annotations

import keyword
import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.errors import UserError
from vjepa_fast.patch.compare import once
from vjepa_fast.patch.forms import Found, Names, look, nested_loss
from vjepa_fast.patch.forms import loss as loss_of
from vjepa_fast.patch.masks import collator

_log = logging.getLogger("vjepa_fast")
_DOES = {
    "MaskCollator": "draws the same masks, all samples at once",
    "apply_masks": "gathers without an index as large as the features",
    "loss": "is ops.latent_loss: gather, distance and mean in one pass",
}


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
      Those two may be variables of the module too. Functions of that name that take other arguments or use other
      variables stay. The function around it, ``main``, remains the same object, so names that others have for it are
      patched too; a call of it that is under way is not.

    Args:
        module: changed in place.
        loss: name of the loss function; None leaves it.
        masks: name of the variable that has the masks in a loss without such an argument, or of the argument.
        loss_exp: name of the variable that has the exponent.

    Returns:
        What was replaced, in words, one for each; also told to the logger ``vjepa_fast``.

    Raises:
        UserError: the module has none of these, was patched already, or all its losses are of another kind, or several
            inside functions are of a known one; nothing was changed then. Later, from the first call of what was
            replaced: it says something else than the original.
    """
    for argument, value in (("loss", loss), ("masks", masks), ("loss_exp", loss_exp)):
        if value is not None and (not value.isidentifier() or keyword.iskeyword(value)):
            raise UserError(f"{argument}: expected the name of a variable, got {value!r}")
    names = None if loss is None else Names(loss, masks, loss_exp)
    makers: dict[str, Callable[..., Any]] = {"MaskCollator": collator, "apply_masks": _gather}
    there = {name: getattr(module, name) for name in makers if callable(getattr(module, name, None))}
    losses = look(module, names) if names else Found()
    wanted = [*makers, *([loss] if loss else [])]
    if not there and not losses.objects:
        raise UserError(
            f"{module.__name__}: has none of {', '.join(wanted)}; is it a training module of V-JEPA 2's kind?"
        )
    if patched := [name for name, x in {**there, **losses.objects}.items() if hasattr(x, "vjepa_fast_original")]:
        raise UserError(f"{module.__name__}: {patched[0]} was patched already; call vjepa2 once")
    losses.raise_unless_any(module)
    if loss and losses.attribute:
        makers[loss], there[loss] = loss_of, losses.attribute
    # all is made before anything is changed
    put = nested_loss(losses.nested, module, names) if losses.nested and names else None
    made = {name: makers[name](original, f"{module.__name__}.{name}") for name, original in there.items()}
    for name, replacement in made.items():
        replacement.vjepa_fast_original = there[name]
        setattr(module, name, replacement)
    said = {name: name for name in made}
    if put and losses.nested and loss:
        put()
        said[loss] = losses.nested.where if loss not in there else f"{loss} and {losses.nested.where}"
    lines = [
        f"{what} {_DOES.get(name, _DOES['loss'])}; compared with the original at its first use"
        for name, what in said.items()
    ]
    for name in wanted:
        if name not in said:
            inside = " nor defined inside its functions" if name == loss else ""
            lines.append(f"{name}: {'neither' if inside else 'not'} an attribute of the module{inside}, so it stays")
    lines += [f"{other}; it stays" for other in losses.others]
    for line in lines:
        _log.info("%s: %s", module.__name__, line)
    return lines


def _gather(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    def apply_masks(x: Tensor, masks: Sequence[Tensor], concat: bool = True) -> Tensor | list[Tensor]:
        parts = [x.gather(1, mask.unsqueeze(-1).expand(-1, -1, x.shape[-1])) for mask in masks]
        return torch.cat(parts) if concat else parts

    return once(apply_masks, original, name)
