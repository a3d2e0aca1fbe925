"""YAML text to plain values, within limits: a file from a stranger costs its reader little before it is refused."""

from __future__ import annotations

import copy
import functools
import re
from typing import TYPE_CHECKING, Any

from vjepa_fast.errors import ConfigError

if TYPE_CHECKING:
    import yaml

LARGEST = 1_000_000  # characters of a file
DEEPEST = 32  # sections and lists in one another
MOST = 50_000  # values; an alias counts as all that it stands for
LONGEST_NUMBER = 400  # characters of a number or date
KEPT = 100_000  # characters of a text whose value is kept


def parse(text: str) -> Any:
    """The value of a YAML text. ``3e-4`` is a number; a repeated key is refused, and so is what is over the limits.

    Raises:
        ConfigError: not YAML, or too much of it: names the limit and the line.
    """
    import yaml

    if len(text) > LARGEST:
        raise ConfigError(f"more than {LARGEST} characters are too many for a configuration")
    try:
        return copy.deepcopy(_kept(text)) if len(text) <= KEPT else yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}") from None


@functools.lru_cache(maxsize=256)
def _kept(text: str) -> Any:
    """The value of a text; a study reads the same recipes for each of its runs."""
    import yaml

    return yaml.load(text, Loader=_loader())


@functools.cache
def _loader() -> type[yaml.SafeLoader]:
    import yaml

    def refusal(text: str, mark: Any) -> yaml.MarkedYAMLError:
        return yaml.constructor.ConstructorError(None, None, text, mark)

    class Loader(yaml.SafeLoader):
        """SafeLoader with decimal exponents as in YAML 1.2, without silently repeated keys, and with limits."""

        def __init__(self, stream: str) -> None:
            super().__init__(stream)
            self._depth = self._values = 0
            self._sizes: dict[int, int] = {}  # values within each node that has an anchor, by the node's id

        def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
            event, before = self.peek_event(), self._values
            self._depth, self._values = self._depth + 1, before + 1
            if self._depth > DEEPEST:
                raise refusal(f"more than {DEEPEST} sections or lists in one another", event.start_mark)
            node = super().compose_node(parent, index)
            self._depth -= 1
            if isinstance(event, yaml.AliasEvent):
                if id(node) not in self._sizes:
                    raise refusal("an alias within what it stands for", event.start_mark)
                self._values = before + self._sizes[id(node)]
            elif event.anchor is not None:
                self._sizes[id(node)] = self._values - before
            if self._values > MOST:
                raise refusal(f"more than {MOST} values, aliases counted as what they stand for", event.start_mark)
            return node

        def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
            number = node.tag.rpartition(":")[2] in ("int", "float", "timestamp")
            if number and isinstance(node, yaml.ScalarNode) and len(node.value) > LONGEST_NUMBER:
                raise refusal(f"a number of {len(node.value)} characters", node.start_mark)
            try:
                return super().construct_object(node, deep)
            except (yaml.YAMLError, MemoryError):
                raise
            except Exception:  # what Python's int(), date() and others raise on a tag or pattern that does not hold
                kind = node.tag.rpartition(":")[2]
                raise refusal(f"no {kind}: {str(node.value)[:40]!r}", node.start_mark) from None

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = True) -> dict[Any, Any]:
        keys = [loader.construct_object(k, deep=True) for k, _ in node.value if k.tag != "tag:yaml.org,2002:merge"]
        seen: set[Any] = set()
        for key in keys:
            if isinstance(key, (dict, list, set)) or key in seen:
                raise refusal(f"key {str(key)[:80]!r} is given twice or is no text", node.start_mark)
            seen.add(key)
        loader.flatten_mapping(node)
        return loader.construct_mapping(node, deep=deep)

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    return Loader
