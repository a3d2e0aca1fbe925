"""Kinds of thing that people add by name, and how their additions are found.

A kind (objective, mask strategy, video decoder, probe, ...) is one `Registry` in the room of that kind. What this
package brings registers itself when its modules are imported; what others bring is a *plugin*: a module that registers
when imported, named by an entry point of the group ``vjepa_fast.plugins`` or in ``VJEPA_FAST_PLUGINS`` (module names
with commas between). Plugins are imported once, when a registry is first asked.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import os
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeVar

from vjepa_fast.errors import ConfigError

T = TypeVar("T")
GROUP = "vjepa_fast.plugins"
VARIABLE = "VJEPA_FAST_PLUGINS"

# Where the registry of each kind is, as module:name; the modules are imported when asked for.
KINDS = {
    "objective": "vjepa_fast.objectives:OBJECTIVES",
    "mask strategy": "vjepa_fast.masks:STRATEGIES",
    "decoder": "vjepa_fast.data.decoders:DECODERS",
    "data set": "vjepa_fast.data.prepare:DATA_SETS",
    "synthetic suite": "vjepa_fast.data.synthetic:SUITES",
    "attention backend": "vjepa_fast.layers.attention:BACKENDS",
    "probe": "vjepa_fast.evaluation.probes:PROBES",
    "evaluation task": "vjepa_fast.evaluation.tasks:TASKS",
}


def registry_of(kind: str) -> Registry:
    """The registry of a kind, one of `KINDS`."""
    module, name = KINDS[kind].split(":")
    return getattr(importlib.import_module(module), name)


def suggestion(word: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` for the closest of ``known``, or an empty text."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


class Registry(Mapping[str, T], Generic[T]):
    """The entries of one kind by name, in the order in which they were registered; a mapping.

    Args:
        kind: what an entry is called in messages.
        package: a package of this project all of whose modules are imported first, so that they register.
        check: called with (name, entry) at registration; raises TypeError where the entry cannot be one of the kind.
    """

    def __init__(self, kind: str, package: str | None = None, check: Callable[[str, T], None] | None = None) -> None:
        self.kind = kind
        self._package = package
        self._check = check
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: the entry ``name`` is what follows.

        Raises:
            ValueError: the name is taken by something else.
            TypeError: the entry is not one of the kind.
        """

        def add(entry: T) -> T:
            self.add(name, entry)
            return entry

        return add

    def add(self, name: str, entry: T) -> None:
        """As `register`, for an entry that is there already."""
        if self._check is not None:
            self._check(name, entry)
        taken = self._entries.get(name)
        # the same module imported anew may register again
        if taken is not None and taken != entry and _origin(taken) != _origin(entry):
            raise ValueError(f"{self.kind} {name!r} is registered twice: {_origin(taken)} and {_origin(entry)}")
        self._entries[name] = entry

    def get_named(self, name: str, path: str) -> T:
        """The entry ``name``.

        Args:
            path: key, flag or argument that the name came from, for the message.

        Raises:
            ConfigError: there is none; names what there is, and the closest.
        """
        entries = self._all()
        if name not in entries:
            known = ", ".join(entries)
            raise ConfigError(f"{path}: unknown {self.kind} {name!r}; accepted: {known}{suggestion(name, entries)}")
        return entries[name]

    def _all(self) -> dict[str, T]:
        if self._package is not None:
            package, self._package = self._package, None
            for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
                importlib.import_module(f"{package}.{module.name}")
        load_plugins()
        return self._entries

    def __getitem__(self, name: str) -> T:
        return self._all()[name]

    def __iter__(self):
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


def _origin(entry: object) -> str:
    """Where a class or function is defined; type and content of anything else."""
    if hasattr(entry, "__qualname__"):
        return f"{entry.__module__}.{entry.__qualname__}"  # pyright: ignore[reportAttributeAccessIssue]  # it has one
    return f"{type(entry).__module__}.{entry!r}"


_loaded: dict[str, str] = {}  # module -> where it was named


@functools.cache
def _entry_points() -> dict[str, str]:
    """Module -> where it was named; read once, since reading takes milliseconds and registries are asked often."""
    from importlib.metadata import entry_points

    return {e.value: f"entry point {e.name}" for e in entry_points(group=GROUP)}


def load_plugins() -> dict[str, str]:
    """Import every plugin that has not been imported; returns all of them as module -> where it was named.

    Raises:
        ConfigError: a plugin cannot be imported; names it, where it was named, and the error.
    """
    named = _entry_points() | {m.strip(): VARIABLE for m in os.environ.get(VARIABLE, "").split(",") if m.strip()}
    for module, where in named.items():
        if module not in _loaded:
            _loaded[module] = where  # first, since a plugin may ask a registry while it is imported
            try:
                importlib.import_module(module)
            except Exception as error:
                del _loaded[module]
                raise ConfigError(
                    f"plugin {module} ({where}) cannot be imported: {type(error).__name__}: {error}; mend or remove it"
                ) from error
    return dict(_loaded)
