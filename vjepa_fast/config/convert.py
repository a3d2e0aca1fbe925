"""Plain dictionaries to typed, frozen dataclasses and back. Every refusal is one line with the key's path."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from vjepa_fast.config.checks import check
from vjepa_fast.config.fields import default_of, is_later, join, show
from vjepa_fast.config.schema import Config
from vjepa_fast.errors import ConfigError
from vjepa_fast.registry import suggestion

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Section = TypeVar("Section", bound=DataclassInstance)


def from_dict(values: dict[str, Any], *, source: str = "config", checked: bool = True) -> Config:
    """A `Config` from nested plain dictionaries; keys left out take their defaults.

    Args:
        values: sections and keys as in ``schema.py``.
        source: named at the start of every error (usually the file).
        checked: also apply the constraints of values and between them (`checks.check`).

    Raises:
        ConfigError: unknown key, wrong type, or values that do not go together.
    """
    with named(source):
        config = read(Config, values)
        if checked:
            check(config)
    return config


def to_dict(config: DataclassInstance) -> dict[str, Any]:
    """The inverse of `from_dict`: nested dicts, lists and scalars only (safe for YAML, JSON and ``weights_only``).

    Keys that were added later (`fields.later`) are left out at their default.
    """
    values = {f: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {f.name: _plain(value) for f, value in values.items() if not (is_later(f) and value == default_of(f))}


def read(section: type[Section], values: object, path: str = "") -> Section:
    """A dataclass whose fields take ``values``, each as the type of its annotation; constraints are not looked at.

    Args:
        section: the dataclass.
        values: a dictionary; keys left out take their defaults.
        path: of the section, for messages.

    Raises:
        ConfigError: unknown key or wrong type.
    """
    if not isinstance(values, dict):
        hint = "; write {} for its defaults" if values is None else ""
        raise ConfigError(f"{path or 'the file'}: expected a section of keys, got {show(values)}{hint}")
    kinds = _kinds(section)
    ready: dict[str, Any] = {}
    for key, value in typing.cast("dict[str, object]", values).items():
        if key not in kinds:
            raise unknown_key(path, key, kinds)
        ready[key] = _convert(kinds[key], value, join(path, key))
    return section(**ready)


@contextlib.contextmanager
def named(source: str) -> Generator[None, None, None]:
    """Puts ``source`` (a file or override) before the message of a `ConfigError` raised within."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def unknown_key(path: str, key: object, accepted: Iterable[object]) -> ConfigError:
    """The error for ``key`` at ``path``, with the accepted keys and the nearest of them."""
    names = [str(name) for name in accepted]
    hint = _elsewhere(str(key)) or suggestion(str(key), names) or _elsewhere(str(key), nearly=True)
    return ConfigError(f"{join(path, key)}: unknown key; accepted: {', '.join(names)}{hint}")


def _elsewhere(key: str, nearly: bool = False) -> str:
    """A suggestion where a key is one of another section, or ``nearly`` one."""
    paths: dict[str, list[str]] = {}
    for section, kind in _kinds(Config).items():
        if dataclasses.is_dataclass(kind):
            for field in dataclasses.fields(kind):
                paths.setdefault(field.name, []).append(f"{section}.{field.name}")
    names = difflib.get_close_matches(key, list(paths), n=1) if nearly else [key] * (key in paths)
    return f"; did you mean {' or '.join(paths[names[0]])}?" if names else ""


def number(value: object) -> float | None:
    """A finite float, also from text such as '3e-4' (which YAML 1.1 reads as text)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        parsed = float(value)
    except (ValueError, OverflowError):
        return None
    return parsed if math.isfinite(parsed) else None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


@functools.cache
def _kinds(section: type[DataclassInstance]) -> dict[str, Any]:
    hints = typing.get_type_hints(section)
    return {f.name: hints[f.name] for f in dataclasses.fields(section)}


def _convert(kind: Any, value: Any, path: str) -> Any:
    """``value`` as ``kind``: a scalar type, a union, tuple, dict or dataclass; what else is annotated passes."""
    if dataclasses.is_dataclass(kind):
        return read(typing.cast("type[DataclassInstance]", kind), value, path)
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _union(kind, value, path)
    if origin is tuple:
        return _tuple(kind, value, path)
    if origin is dict:
        return _dict(kind, value, path)
    if kind not in _NAMES:
        return _plain(value)
    converted = _scalar(kind, value)
    if converted is None:
        raise ConfigError(f"{path}: expected {_name(kind)}, got {show(value)}")
    return converted


def _scalar(kind: Any, value: Any) -> Any:
    """The value as a bool, int, float or str; None where it is something else."""
    if kind is float:
        return number(value)
    if kind is str:
        return _text(value)
    return value if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) else None


def _text(value: object) -> str | None:
    """Text that can be a file's name; a number as its digits (``folder: 2024``)."""
    text = str(value) if type(value) is int and abs(value) < 2**64 else value
    if not isinstance(text, str) or "\0" in text:
        return None
    try:
        text.encode(errors="surrogateescape")  # names that are not UTF-8 keep their bytes
    except UnicodeEncodeError:
        return None
    return text


def _union(kind: Any, value: Any, path: str) -> Any:
    members = [m for m in typing.get_args(kind) if m is not type(None)]
    if value is None and len(members) < len(typing.get_args(kind)):
        return None
    if len(members) == 1 and members[0] not in _NAMES and value is not None:
        return _convert(members[0], value, path)  # keeps the inner, more precise message
    for member in members:
        with contextlib.suppress(ConfigError):
            return _convert(member, value, path)
    raise ConfigError(f"{path}: expected {_name(kind)}, got {show(value)}")


def _tuple(kind: Any, value: Any, path: str) -> tuple[Any, ...]:
    members = typing.get_args(kind)
    variable = members[-1] is Ellipsis
    if variable and value is not None and not isinstance(value, (list, tuple, dict)):
        value = [value]  # one value stands for a list of one
    if not isinstance(value, (list, tuple)) or not (variable or len(value) == len(members)):
        raise ConfigError(f"{path}: expected {_name(kind)}, got {show(value)}")
    each = [members[0]] * len(value) if variable else members
    return tuple(_convert(m, v, join(path, i)) for i, (m, v) in enumerate(zip(each, value, strict=True)))


def _dict(kind: Any, value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        hint = "; write {} for its defaults" if value is None else ""
        raise ConfigError(f"{path}: expected a section of keys, got {show(value)}{hint}")
    member = typing.get_args(kind)[1]
    return {str(k): _convert(member, v, join(path, k)) for k, v in value.items()}


_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}


def _name(kind: Any) -> str:
    if kind in _NAMES:
        return _NAMES[kind]
    members, origin = typing.get_args(kind), typing.get_origin(kind)
    if origin is tuple and members[-1] is Ellipsis:
        return f"a list (each {_name(members[0])})"
    if origin is tuple:
        return f"a list of {len(members)} (each {_name(members[0])})"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_name(m) for m in members)
    return "a section of keys"
