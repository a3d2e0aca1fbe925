"""The losses that are known, at the top of a module and inside its functions: which one is to be replaced, by what."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor

from vjepa_fast.errors import UserError
from vjepa_fast.patch.losses import Loss
from vjepa_fast.patch.nested import Nested, find, settled, state

_LINE = "use ops.latent_loss(zij, hi, mij, loss_exp=...) in it, or leave it by loss=None"
_V2, _V21 = ("z", "h"), ("z", "h", "masks_to_apply", "cls_loss", "d_weights")


@dataclass(frozen=True)
class Names:
    """Of the loss function, and of the variables with masks and exponent."""

    loss: str
    masks: str
    loss_exp: str


@dataclass
class Found:
    """What a module has of that name.

    Attributes:
        attribute: the loss of the module's namespace, if it is a known one.
        nested: the known one inside a function.
        others: what stays, and why: a line of text for each.
        objects: all that could have been changed, by name.
    """

    attribute: Callable[..., Any] | None = None
    nested: Nested | None = None
    others: list[str] = field(default_factory=list)
    objects: dict[str, Any] = field(default_factory=dict)

    def raise_unless_any(self, module: ModuleType) -> None:
        """Raise UserError if there are losses of that name, and none is known."""
        if self.others and not self.attribute and not self.nested:
            raise UserError(f"{module.__name__}: {'; '.join(self.others)}; {_LINE}")


def look(module: ModuleType, names: Names) -> Found:
    """The losses of a module.

    Raises:
        UserError: several known ones are inside functions.
    """
    found, known = Found(), list[Nested]()
    attribute = getattr(module, names.loss, None)
    if callable(attribute):
        found.objects[names.loss] = attribute
        objection = _objection(attribute, names)
        if objection:
            found.others.append(f"{names.loss}: {objection}")
        else:
            found.attribute = attribute
    for nested in find(module, names.loss):
        found.objects |= {owner.__name__: owner for owner in nested.owners}
        objection = _nested_objection(nested, names)
        if objection:
            found.others.append(f"{nested.where}: {objection}")
        else:
            known.append(nested)
    if len(known) > 1:
        places = ", ".join(nested.where for nested in known)
        raise UserError(f"{module.__name__}: several functions are named {names.loss} ({places}); rename all but one")
    found.nested = known[0] if known else None
    return found


def _objection(original: Callable[..., Any], names: Names) -> str | None:
    """Why a loss of the module's namespace is not a known one."""
    wanted = ["z", "h", names.masks, names.loss_exp]
    expected = f"expected a function of ({', '.join(wanted)})"
    try:
        function, parameters = inspect.unwrap(original), inspect.signature(original).parameters
    except (TypeError, ValueError):  # a builtin
        return expected
    kinds = {p.kind for p in parameters.values()}
    if not isinstance(function, FunctionType) or kinds != {inspect.Parameter.POSITIONAL_OR_KEYWORD}:
        return expected
    if list(parameters) not in (wanted, wanted[:3]):
        return expected
    around = zip(function.__code__.co_freevars, function.__closure__ or ())
    variables = [name for name, cell in around if not settled(cell.cell_contents)]
    return _other({*variables, *state(function.__code__, function.__globals__)})


def _nested_objection(nested: Nested, names: Names) -> str | None:
    """Why a loss inside a function is not a known one."""
    if not nested.plain or nested.parameters not in (_V2, _V21):
        return f"expected a function of ({', '.join(_V2)}) or ({', '.join(_V21)})"
    around, top = set(nested.code.co_freevars), state(nested.code, nested.owner.__globals__)
    wanted = _variables(nested, names)
    for key, name in wanted.items():
        if name not in around | top:
            place = "the functions around it or of the module"
            return f"uses no variable {name} of {place}; if it has another name, give it as {key}="
    known = set(wanted.values())
    return _other((around - known | top - (known - around)) - {"apply_masks"})


def _variables(nested: Nested, names: Names) -> dict[str, str]:
    """Argument of `vjepa2` -> name of the variable that it stands for."""
    if nested.parameters == _V21:
        return {"loss_exp": names.loss_exp}
    return {"masks": names.masks, "loss_exp": names.loss_exp}


def _other(variables: set[str]) -> str | None:
    return f"uses {min(variables)} as well, so it is another loss" if variables else None


def loss(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    """In place of a loss of the module's namespace."""
    signature = inspect.signature(original)
    checked = Loss(name)

    @functools.wraps(original)
    def loss_fn(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        z, h, chosen, *exponent = given.arguments.values()
        return checked(lambda z, h: original(z, h, chosen, *exponent), z, h, chosen, exponent[0] if exponent else 1.0)

    return loss_fn


def nested_loss(nested: Nested, module: ModuleType, names: Names) -> Callable[[], None]:
    """What replaces a loss inside a function, when it is called."""
    checked = Loss(f"{module.__name__}.{nested.owner.__name__}: {nested.where}")
    v21 = nested.parameters == _V21

    def hook(arguments: tuple[Any, ...], around: dict[str, Any], original: FunctionType) -> Tensor:
        z, h, *rest = arguments
        chosen, *more = rest if v21 else (around[names.masks],)
        return checked(lambda z, h: original(z, h, *rest), z, h, chosen, around[names.loss_exp], *more)

    return nested.prepare(hook, list(_variables(nested, names).values()))
