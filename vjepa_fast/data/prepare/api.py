"""What a data set is to `prepare`: it reads the official lists and says which file has which label.

Adding one: derive from `DataSet`, register it (``@DATA_SETS.register("mine")``) in a module of the folder ``sets`` or
in a plugin, and ``vjepa-fast prepare mine SOURCE`` uses it; tests/data/test_prepare.py checks every registered one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from vjepa_fast.data.prepare.find import Files
from vjepa_fast.errors import DataError
from vjepa_fast.registry import Registry


@dataclass(frozen=True)
class Listed:
    """One sample of a list.

    Attributes:
        name: as the list names it. label: class number.
        where: ``file:line`` of the list, or the file where it has no lines.
        path: the file; None where there is none. problem: why there is none.
    """

    name: str
    label: int
    where: str
    path: str | None
    problem: str = ""


@dataclass
class Listing:
    """What the lists of a data set say.

    Attributes:
        parts: samples by part, which is also the name of its manifest: "train", "test2", ...
        classes: names in the order of the labels; or, where each part has classes of its own, by part.
        notes: what a user should know, one sentence each.
    """

    parts: dict[str, list[Listed]]
    classes: list[str] | dict[str, list[str]]
    notes: list[str] = field(default_factory=list)

    def classes_of(self, part: str) -> list[str]:
        """Names in the order of the labels of one part."""
        return self.classes[part] if isinstance(self.classes, dict) else self.classes

    def class_files(self) -> dict[str, list[str]]:
        """Class names by the file that holds them, which is found from a manifest's name."""
        if isinstance(self.classes, dict):
            return {f"{part}_classes.json": names for part, names in self.classes.items()}
        return {"classes.json": self.classes}


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
        source: what the download was unpacked to: a folder, for some data sets a file.
        lists: folder or file of the lists; None: below ``source``.
        out: folder that is written to.
        splits: numbers of the official splits; empty: the first.
        known: names of the classes in the order in which evaluation numbers them; empty where it does not say.
        val_fraction, test_fraction: of each class, for data sets without official parts.
    """

    source: Path
    lists: Path | None = None
    out: Path = Path("prepared")
    splits: tuple[int, ...] = ()
    known: Sequence[str] = ()
    val_fraction: float = 0.0
    test_fraction: float = 0.0

    @cached_property
    def files(self) -> Files:
        """What lies below ``source``."""
        return Files(self.source)

    def list_files(self, hint: str) -> dict[str, list[Path]]:
        """Files that can be lists (.txt, .csv, .json, .list) by name, below ``lists`` or else below ``source``.

        Raises:
            DataError: there are none; ``hint`` says what to unpack.
        """
        root = self.lists or self.source
        found = Files(root).lists if root.is_dir() else {root.name: [root]} if root.is_file() else {}
        if not found:
            raise DataError(f"{root}: holds no lists; {hint}")
        return found

    def list_file(self, *names: str, hint: str) -> Path:
        """The one file of the first of these names that is there, as `list_files`.

        Raises:
            DataError: none is there, or several are.
        """
        path = self.find_list(*names, hint=hint)
        if path is None:
            raise DataError(f"{self.lists or self.source}: holds no {' or '.join(names)}; {hint}")
        return path

    def find_list(self, *names: str, hint: str) -> Path | None:
        """As `list_file`; None where none is there."""
        found = self.list_files(hint)
        for name in names:
            hits = found.get(name, [])
            if len(hits) > 1:
                raise DataError(
                    f"{hits[0]}: {hits[1]} has the same name; name the folder of the right one with --lists"
                )
            if hits:
                return hits[0]
        return None


class DataSet(ABC):
    """Reads the lists of one data set.

    Attributes:
        title: for people.
        unpacked: what the download unpacks to, in one line.
        splits: how many official splits there are; 0 where the parts are fixed.
        task: the evaluation task whose labels these are, if one is known.
        fractions: whether val_fraction and test_fraction mean anything.
    """

    title: str
    unpacked: str
    splits: int = 0
    task: str | None = None
    fractions: bool = False

    @abstractmethod
    def read(self, request: Request) -> Listing:
        """The samples of every part.

        Raises:
            DataError: a list is missing or cannot be read, in one line with its path and line.
        """


def _check(name: str, kind: type[DataSet]) -> None:
    if not (isinstance(kind, type) and issubclass(kind, DataSet)):
        raise TypeError(f"data set {name!r} must be a class derived from vjepa_fast.data.prepare.DataSet, not {kind!r}")


DATA_SETS: Registry[type[DataSet]] = Registry("data set", package="vjepa_fast.data.prepare.sets", check=_check)
