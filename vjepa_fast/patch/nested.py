"""A function that is defined inside another one, replaced from outside: its code is a constant of the outer code.

The outer function stays the same object with the same source lines; its code gets another constant. What stands in for
the inner function sees the same variables of the outer ones, and can make the original of them.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch

from vjepa_fast.errors import UserError

Hook = Callable[[tuple[Any, ...], dict[str, Any], FunctionType], Any]
_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS", "STORE_GLOBAL", "DELETE_GLOBAL")


@dataclass(frozen=True)
class Nested:
    """``code`` is defined somewhere inside each of ``owners``, FunctionTypes: `main`, and a factory that made it."""

    owners: tuple[Any, ...]  # to type checkers a FunctionType in an attribute is a method
    code: CodeType

    @property
    def owner(self) -> Any:
        """The innermost of ``owners``."""
        return max(self.owners, key=lambda owner: owner.__code__.co_firstlineno)

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

    def prepare(self, hook: Hook, names: Sequence[str]) -> Callable[[], None]:
        """What puts ``hook(arguments, variables by name, the original)`` in place of the function, when it is called.

        ``names``: which variables, besides those of the functions around it.
        """
        inner, space, name = self.code, self.owner.__globals__, f"_vjepa_fast_{self.code.co_name}"

        @torch.compiler.disable  # a compiled function breaks its graph here, as it has to for the first comparison
        def call(arguments: tuple[Any, ...], values: FunctionType) -> Any:
            cells = dict(zip(values.__code__.co_freevars, values.__closure__ or ()))
            found = FunctionType(
                inner, space, inner.co_name, None, tuple(cells[variable] for variable in inner.co_freevars)
            )
            return hook(arguments, values(), found)

        stand_in = self._stand_in(name, names)
        changes = [(owner, _put(owner.__code__, inner, stand_in), _copy(owner)) for owner in self.owners]

        def put() -> None:
            space[name] = call
            for owner, code, original in changes:
                owner.__code__ = code
                owner.__dict__["vjepa_fast_original"] = original

        return put

    def _stand_in(self, hook: str, names: Sequence[str]) -> CodeType:
        """Code of the same name, parameters, variables and line that calls the global ``hook``."""
        free, given, name = self.code.co_freevars, "".join(f"{x}, " for x in self.parameters), self.code.co_name
        values = ", ".join(f"{x!r}: {x}" for x in dict.fromkeys((*free, *names)))
        source = "\n" * (self.code.co_firstlineno - 2) + (
            f"def {hook}({', '.join(free)}):\n def {name}({given}): return {hook}(({given}), lambda: {{{values}}})"
        )
        made = compile(source, self.code.co_filename, "exec", dont_inherit=True)
        for inside_of in (hook, name):
            (made,) = (x for x in made.co_consts if isinstance(x, CodeType) and x.co_name == inside_of)
        if made.co_freevars != free:
            raise UserError(f"{self.where}: has variables in an order of its own; leave it by loss=None")
        if sys.version_info >= (3, 11):  # before, the name is a constant of the outer code
            made = made.replace(co_qualname=self.code.co_qualname)
        return made


def _copy(function: Any) -> FunctionType:
    made = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def inside(code: CodeType, name: str) -> Iterator[CodeType]:
    """All functions of that name that are defined inside, in functions and classes, at any depth."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_name == name:
                yield constant
            yield from inside(constant, name)


def state(code: CodeType, space: dict[str, Any]) -> set[str]:
    """The global variables of a function that may have other values later: neither modules, functions nor classes.

    Those of the functions of the same module that it calls count as well.
    """
    found, waiting, seen = set[str](), [code], set[CodeType]()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        waiting += [x for x in one.co_consts if isinstance(x, CodeType)]
        for name in {x.argval for x in dis.get_instructions(one) if x.opname in _GLOBAL}:
            value = _unwrapped(space.get(name, getattr(builtins, name, None)))
            if not settled(value):
                found.add(name)
            elif isinstance(value, FunctionType) and value.__globals__ is space:
                waiting.append(value.__code__)
    return found


def settled(value: Any) -> bool:
    """Whether it is a module, a function or a class, which training code does not exchange as it runs."""
    value = _unwrapped(value)
    return isinstance(value, (ModuleType, type, FunctionType, BuiltinFunctionType))


def _unwrapped(value: Any) -> Any:
    """Without what decorates it."""
    try:
        return inspect.unwrap(value)
    except ValueError:  # wraps itself
        return value


def functions(module: ModuleType) -> list[FunctionType]:
    """The functions of the module's namespace that are written in it, without what decorates them."""
    found: dict[int, FunctionType] = {}
    for value in list(vars(module).values()):
        if callable(value) and not isinstance(value, type):
            value = _unwrapped(value)
            if isinstance(value, FunctionType) and value.__globals__ is vars(module):
                found[id(value)] = value
    return list(found.values())


def find(module: ModuleType, name: str) -> list[Nested]:
    """The functions of that name inside functions of the module; one that is inside several of them counts once."""
    owners: dict[CodeType, list[Any]] = {}
    for owner in functions(module):
        for code in inside(owner.__code__, name):
            owners.setdefault(code, []).append(owner)
    nested = [Nested(tuple(found), code) for code, found in owners.items()]
    return sorted(nested, key=lambda one: one.code.co_firstlineno)


def _put(code: CodeType, old: CodeType, new: CodeType) -> CodeType:
    constants = tuple(
        (new if x == old else _put(x, old, new)) if isinstance(x, CodeType) else x for x in code.co_consts
    )
    return code.replace(co_consts=constants)
