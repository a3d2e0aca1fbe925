"""Plain dictionaries to typed, frozen dataclasses and back. Every refusal is one line with the key's path."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing

from vjepa_fast.config.checks import check
from vjepa_fast.config.schema import Config
from vjepa_fast.errors import ConfigError


def from_dict(values: dict, *, source: str = "config", checked: bool = True) -> Config:
    """A `Config` from nested plain dictionaries; keys left out take their defaults.

    Args:
        values: sections and keys as in ``schema.py``.
        source: named at the start of every error (usually the file).
        checked: also apply the checks between fields (`checks.check`).

    Raises:
        ConfigError: unknown key, wrong type, or values that do not go together.
    """
    config = _dataclass(Config, values, "", source)
    if checked:
        check(config, source)
    return config


def to_dict(config) -> dict:
    """The inverse of `from_dict`: nested dicts, lists and scalars only (safe for YAML, JSON and ``weights_only``).
    Fields marked ``LATER`` (schema.py) are left out at their default.
    """
    return {
        f.name: _plain(value)
        for f in dataclasses.fields(config)
        if (value := getattr(config, f.name)) != _default(f) or not f.metadata.get("later")
    }


def _default(field: dataclasses.Field[typing.Any]) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def unknown_key(source: str, path: str, key: str, accepted) -> ConfigError:
    """The error for ``key`` at ``path``, with the accepted keys and the nearest of them."""
    accepted = [str(name) for name in accepted]
    near = difflib.get_close_matches(str(key), accepted, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return ConfigError(f"{source}: {_join(path, key)}: unknown key; accepted: {', '.join(accepted)}{hint}")


def _plain(value):
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _join(path: str, key) -> str:
    return f"{path}.{key}" if path else str(key)


def _dataclass(cls, values, path: str, source: str):
    if not isinstance(values, dict):
        where = path or "the file"
        raise ConfigError(f"{source}: {where}: expected a section of keys, got {_show(values)}")
    hints = _hints(cls)
    kwargs = {}
    for key, value in values.items():
        if key not in hints:
            raise unknown_key(source, path, key, hints)
        kwargs[key] = _convert(hints[key], value, _join(path, key), source)
    return cls(**kwargs)


@functools.cache
def _hints(cls) -> dict:
    return typing.get_type_hints(cls)


def _convert(kind, value, path: str, source: str):
    """``value`` as ``kind``: a scalar type, Optional or another union, tuple, dict or dataclass."""
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, path, source)
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _union(kind, value, path, source)
    if origin is tuple:
        return _tuple(kind, value, path, source)
    if origin is dict and typing.get_args(kind)[1] is dict:
        return _terms(value, path, source)
    if origin is dict and isinstance(value, dict):
        return _plain(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and _is_int(value):
        return value
    if kind is float and not isinstance(value, bool):
        parsed = number(value)
        if parsed is not None:
            return parsed
    if kind is str and isinstance(value, str):
        return value
    if kind is str and _is_int(value):  # folder: 2024
        return str(value)
    raise ConfigError(f"{source}: {path}: expected {_name(kind)}, got {_show(value)}")


def _union(kind, value, path: str, source: str):
    members = typing.get_args(kind)
    if value is None and type(None) in members:
        return None
    members = [m for m in members if m is not type(None)]
    if (
        len(members) == 1
        and (dataclasses.is_dataclass(members[0]) or typing.get_origin(members[0]))
        and value is not None
    ):
        return _convert(members[0], value, path, source)  # keeps the inner, more precise message
    for member in members:
        try:
            return _convert(member, value, path, source)
        except ConfigError:
            continue
    raise ConfigError(f"{source}: {path}: expected {_name(kind)}, got {_show(value)}")


def _tuple(kind, value, path: str, source: str):
    members = typing.get_args(kind)
    variable = len(members) == 2 and members[1] is Ellipsis
    if variable and not isinstance(value, (list, tuple, dict)) and value is not None:
        value = [value]  # one value stands for a list of one
    if not isinstance(value, (list, tuple)) or not (variable or len(value) == len(members)):
        raise ConfigError(f"{source}: {path}: expected {_name(kind)}, got {_show(value)}")
    each = [members[0]] * len(value) if variable else members
    return tuple(_convert(m, v, _join(path, i), source) for i, (m, v) in enumerate(zip(each, value, strict=True)))


def _terms(value, path: str, source: str) -> dict:
    """The objectives: a dict of dicts. The fields of a term belong to the objectives package, which checks them."""
    if not isinstance(value, dict):
        raise ConfigError(f"{source}: {path}: expected terms such as 'pred: {{}}', got {_show(value)}")
    for term, fields in value.items():
        if not isinstance(fields, dict):
            raise ConfigError(
                f"{source}: {_join(path, term)}: expected a section of keys, got {_show(fields)}; "
                "write {} for a term with its defaults"
            )
    return _plain(value)


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def number(value) -> float | None:
    """A finite float, also from text such as '3e-4' (which YAML 1.1 reads as text)."""
    if not isinstance(value, (int, float, str)):
        return None
    try:
        parsed = float(value)
    except (ValueError, OverflowError):
        return None
    return parsed if math.isfinite(parsed) else None


def _show(value) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _name(kind) -> str:
    scalars = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}
    if kind in scalars:
        return scalars[kind]
    members = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin is tuple and members[-1] is Ellipsis:
        return f"a list (each {_name(members[0])})"
    if origin is tuple:
        return f"a list of {len(members)} (each {_name(members[0])})"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_name(m) for m in members)
    return "a section of keys"
