"""A function that is defined inside another one, replaced from outside: its code is a constant of the outer code.

The outer function stays the same object with the same source lines; its code gets another constant. What stands in for
the inner function sees the same variables of the outer ones, and can make the original of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch

from vjepa_fast.errors import UserError

Hook = Callable[[tuple[Any, ...], dict[str, Any], FunctionType], Any]


@dataclass(frozen=True)
class Nested:
    """``code`` is defined somewhere inside ``owner``, a FunctionType."""

    owner: Any  # a field of type FunctionType is a method to type checkers
    code: CodeType

    @property
    def where(self) -> str:
        """For a line of text."""
        return f"{self.code.co_name} in {self.owner.__name__}, line {self.code.co_firstlineno}"

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the positional ones."""
        return self.code.co_varnames[: self.code.co_argcount]

    @property
    def plain(self) -> bool:
        """Whether it has no ``*args``, no keyword-only arguments, and neither yields nor awaits."""
        other = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE
        other |= inspect.CO_ASYNC_GENERATOR
        return not self.code.co_flags & other and not self.code.co_kwonlyargcount

    def replace(self, hook: Hook) -> None:
        """``hook(arguments, variables of the outer functions by name, the original)`` in place of the function."""
        owner, name = self.owner, f"_vjepa_fast_{self.code.co_name}"
        original = FunctionType(
            owner.__code__, owner.__globals__, owner.__name__, owner.__defaults__, owner.__closure__
        )
        original.__kwdefaults__ = owner.__kwdefaults__
        inner = self.code

        @torch.compiler.disable  # a compiled function breaks its graph here, as it has to for the first comparison
        def call(arguments: tuple[Any, ...], cells: FunctionType) -> Any:
            found = FunctionType(inner, owner.__globals__, inner.co_name, None, cells.__closure__)
            return hook(arguments, dict(zip(inner.co_freevars, cells())), found)

        owner.__code__ = _put(owner.__code__, inner, self._stand_in(name))
        owner.__globals__[name] = call
        owner.__dict__["vjepa_fast_original"] = original

    def _stand_in(self, hook: str) -> CodeType:
        """Code of the same name, parameters, variables and line that calls the global ``hook``."""
        free, given, name = self.code.co_freevars, "".join(f"{x}, " for x in self.parameters), self.code.co_name
        source = "\n" * (self.code.co_firstlineno - 2) + (
            f"def outer({', '.join(free)}):\n"
            f" def {name}({given}): return {hook}(({given}), lambda: ({''.join(f'{x}, ' for x in free)}))"
        )
        outer = compile(source, self.code.co_filename, "exec", dont_inherit=True)
        (made,) = inside(outer, name)
        assert made.co_freevars == free, (made.co_freevars, free)
        return made


def inside(code: CodeType, name: str) -> Iterator[CodeType]:
    """All functions of that name that are defined inside, in functions and classes, at any depth."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_name == name:
                yield constant
            yield from inside(constant, name)


def functions(module: ModuleType) -> list[FunctionType]:
    """The functions of the module's namespace that are written in it, without what decorates them."""
    found: dict[int, FunctionType] = {}
    for value in list(vars(module).values()):
        if callable(value) and not isinstance(value, type):
            try:
                value = inspect.unwrap(value)
            except ValueError:  # wraps itself
                continue
            if isinstance(value, FunctionType) and value.__globals__ is vars(module):
                found[id(value)] = value
    return list(found.values())


def find(module: ModuleType, name: str) -> Nested | None:
    """The one function of that name inside a function of the module.

    Raises:
        UserError: there are several.
    """
    found = [Nested(owner, code) for owner in functions(module) for code in inside(owner.__code__, name)]
    if len(found) > 1:
        places = ", ".join(sorted((one.where for one in found), key=lambda text: (len(text), text)))
        raise UserError(f"{module.__name__}: several functions are named {name} ({places}); rename all but one")
    return found[0] if found else None


def _put(code: CodeType, old: CodeType, new: CodeType) -> CodeType:
    constants = tuple(
        (new if x == old else _put(x, old, new)) if isinstance(x, CodeType) else x for x in code.co_consts
    )
    return code.replace(co_consts=constants)
