"""Constraints of single values, declared with the dataclass field that they belong to.

A helper such as ``number(8, low=1)`` stands where the default of a field does. It says which values the field takes,
and in which words others are refused. The type is the annotation's: ``convert.py`` applies it first, and null passes
where the annotation allows it. The sections of ``schema.py`` and the terms of the objectives declare their fields so.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vjepa_fast.errors import ConfigError
from vjepa_fast.registry import registry_of, suggestion

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_REFUSAL, _LATER = "refusal", "later"
MOST = 2**53  # integers up to it are floats too


def constrained(default: Any, refusal: Callable[[Any], str | None]) -> Any:
    """A field with a default.

    Args:
        default: of the field.
        refusal: what is wrong with a value of the annotated type, or None; it is not asked about null.
    """
    metadata = {_REFUSAL: refusal}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def later(field: Any) -> Any:
    """A field that came after configurations were saved and hashed.

    `to_dict` leaves it out at its default, so that run folders, checkpoints and study cells from before still match.
    """
    return dataclasses.field(
        default=field.default, default_factory=field.default_factory, metadata={**field.metadata, _LATER: True}
    )


def is_later(field: dataclasses.Field[Any]) -> bool:
    """Whether the field was declared through `later`."""
    return _LATER in field.metadata


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, or MISSING."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def number(
    default: float | tuple[float, ...] | None,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    most: float | None = None,
) -> Any:
    """A number, or a list of at least one, each with ``low <= x <= high`` and ``above < x < below``.

    ``most``: of a number without ``high``, what no one asks for; of integers `MOST` where it is not given.
    """
    bottom, top = max(low, above), min(high, below)
    if math.isinf(bottom) or math.isinf(top):
        bounds = (("at least", low), ("greater than", above), ("at most", high), ("less than", below))
        words = " and ".join(f"{word} {_bound(bound)}" for word, bound in bounds if math.isfinite(bound))
    else:
        words = f"in {'[' if low > above else '('}{_bound(bottom)}, {_bound(top)}{']' if high < below else ')'}"

    def inside(x: float) -> bool:
        return (isinstance(x, int) or math.isfinite(x)) and low <= x <= high and above < x < below

    def refusal(x: Any) -> str | None:
        if isinstance(x, (tuple, list)) and not x:
            return "must not be empty"
        values = x if isinstance(x, (tuple, list)) else (x,)
        if all(map(inside, values)):
            limits = [MOST if most is None and isinstance(v, int) else most or math.inf for v in values]
            over = [(v, limit) for v, limit in zip(values, limits) if math.isinf(min(high, below)) and abs(v) > limit]
            return f"must be at most {_bound(over[0][1])}, got {show(over[0][0])}" if over else None
        return f"must be {words or 'finite'}, got {show(x)}"

    return constrained(default, refusal)


def _bound(x: float) -> str:
    return f"{x:g}" if isinstance(x, float) else str(x)


def choice(default: Any, *accepted: str | bool | None) -> Any:
    """One of ``accepted``."""
    names = [v if isinstance(v, str) else show(v) for v in accepted]

    def refusal(x: Any) -> str | None:
        if x in accepted:
            return None
        return f"unknown value {quoted(x)}; accepted: {', '.join(names)}{suggestion(str(x), names)}"

    return constrained(default, refusal)


def registered(kind: str, *builtin: str) -> Any:
    """The name of an entry of a registry, by default the first of ``builtin``.

    Args:
        kind: one of `vjepa_fast.registry.KINDS`.
        builtin: accepted without a look at the registry, which would import a room above this one.
    """

    def refusal(x: Any) -> str | None:
        if x in builtin:
            return None
        names = list(dict.fromkeys([*builtin, *registry_of(kind)]))
        return None if x in names else f"unknown {kind} {quoted(x)}; accepted: {', '.join(names)}{suggestion(x, names)}"

    return constrained(builtin[0], refusal)


def flag(default: bool) -> Any:
    """True or false."""
    return dataclasses.field(default=default)


def filled(default: Any, hint: str = "must not be empty") -> Any:
    """A text, list or mapping that is not empty; else ``hint``."""
    return constrained(default, lambda x: None if (x.strip() if isinstance(x, str) else x) else hint)


def interval(default: tuple[float, float], high: float = math.inf) -> Any:
    """``[low, high]`` with ``0 < low <= high``, at most ``high``."""
    limit = f" <= {high:g}" if math.isfinite(high) else ""
    words = f"[low, high] with 0 < low <= high{limit}"
    return checked(default, words, lambda x: 0 < x[0] <= x[1] <= high)


def ramp(default: tuple[float, float] | None) -> Any:
    """``[start, end]`` of a rise over a run: integers count steps, decimals up to 1 are fractions of the run.

    Whole decimals above 1 count steps as well; start and end may be given in different units.
    """

    def fits(x: Any) -> bool:
        known = all(v >= 0 and (isinstance(v, int) or v <= 1 or v == int(v)) for v in x)
        return known and (is_fraction(x[0]) != is_fraction(x[1]) or x[0] <= x[1])

    words = "[start, end] with 0 <= start <= end: integers for steps, decimals in [0, 1] for fractions of the run"
    return checked(default, words, fits)


def is_fraction(x: float) -> bool:
    """Whether a bound of a `ramp` is a fraction of the run rather than a number of steps."""
    return isinstance(x, float) and x <= 1


def checked(default: Any, accepts: str, check: Callable[[Any], bool]) -> Any:
    """A field with a check of its own.

    Args:
        default: of the field.
        accepts: what ``check`` lets pass, as words after "must be".
        check: whether a value of the annotated type can be used.
    """
    return constrained(default, lambda x: None if check(x) else f"must be {accepts}, got {show(x)}")


def refusals(values: DataclassInstance, path: str = "") -> Iterator[str]:
    """``path.key: what is wrong`` for each value of a dataclass, and of those nested in it, that its field refuses."""
    for field in dataclasses.fields(values):
        value, where = getattr(values, field.name), join(path, field.name)
        text = refusal_of(field, value)
        if text is not None:
            yield f"{where}: {text}"
        parts = enumerate(value) if isinstance(value, tuple) else [(None, value)]
        for i, part in parts:
            if dataclasses.is_dataclass(part) and not isinstance(part, type):
                yield from refusals(part, where if i is None else join(where, i))


def refusal_of(field: dataclasses.Field[Any], value: Any) -> str | None:
    """What is wrong with a value of the right type for this field, or None."""
    refusal: Callable[[Any], str | None] | None = field.metadata.get(_REFUSAL)
    return None if refusal is None or value is None else refusal(value)


def require(section: DataclassInstance | type[DataclassInstance], path: str, **values: Any) -> None:
    """Raise `ConfigError` for what the fields of a section refuse.

    Args:
        section: its values; or a class, to ask about single ``values`` of its fields.
        path: of the section, for the message.
        values: name and value of fields of a class.
    """
    if not isinstance(section, type):
        found = refusals(section, path)
    else:
        fields: Mapping[str, dataclasses.Field[Any]] = section.__dataclass_fields__
        texts = ((join(path, name), refusal_of(fields[name], value)) for name, value in values.items())
        found = (f"{where}: {text}" for where, text in texts if text is not None)
    for text in found:
        raise ConfigError(text)


def join(path: str, key: object) -> str:
    """The path of a key below ``path``."""
    return f"{path}.{key}" if path else str(key)


def show(value: object) -> str:
    """A value as it would stand in YAML, at most 60 characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return quoted(list(value) if isinstance(value, tuple) else value)


def quoted(value: object) -> str:
    """The ``repr`` of a value on one line, at most 60 characters of it."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no integer of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."
