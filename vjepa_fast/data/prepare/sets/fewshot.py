"""Few-shot lists: those of CMN, OTAM and ARN as CMN, TRX and HyRSM publish them."""

from __future__ import annotations

import os
import re

from vjepa_fast.data.prepare.api import DATA_SETS, DataSet, Listed, Listing, Request
from vjepa_fast.data.prepare.lists import Classes, read_pairs
from vjepa_fast.errors import DataError

_HINT = "name the folder of one split with --lists (train.list, trainlist03.txt or train_few_shot.txt, ...)"
_LIST = re.compile(r"(train|val|test)(?:list\d*|_few_shot)?\.(?:list|txt)")
_PARTS = {"train": "base", "val": "val", "test": "novel"}
_NUMBERED = re.compile(r"(?:train|val|test)\d+")


@DATA_SETS.register("fewshot")
class FewShot(DataSet):
    """Few-shot lists <class>/<video>: CMN (Kinetics-100, SSv2-Small), TRX and HyRSM (also SSv2-Full, UCF, HMDB)."""

    title = "few-shot lists"
    unpacked = "the videos; the lists by --lists"

    def read(self, request: Request) -> Listing:
        """Parts base, val and novel, as far as there are lists; each numbers its own classes by name."""
        lists = {}
        for name, paths in sorted(request.list_files(_HINT).items()):
            if match := _LIST.fullmatch(name):
                for path in paths:
                    if match[1] in lists:
                        raise DataError(f"{path}: {lists[match[1]]} is a list of the same part; {_HINT}")
                    lists[match[1]] = path
        if not lists:
            raise DataError(f"{request.lists or request.source}: holds no few-shot lists; {_HINT}")
        parts: dict[str, list[Listed]] = {}
        names: dict[str, list[str]] = {}
        for part in _PARTS:
            if part not in lists:
                continue
            rows = [
                (where, name, video, *request.files.find(video, within=name))
                for where, name, video in read_pairs(lists[part])
            ]
            meant = _folders([(name, video) for _, name, video, _, _ in rows])
            classes = Classes(sorted({meant[name] for _, name, *_ in rows}), lists[part])
            parts[_PARTS[part]] = [
                Listed(f"{name}/{video}", classes.label(meant[name], where), where, path, problem)
                for where, name, video, path, problem in rows
            ]
            names[_PARTS[part]] = classes.names
        for one, other in (("base", "val"), ("base", "novel"), ("val", "novel")):
            if shared := sorted(set(names.get(one, ())) & set(names.get(other, ()))):
                raise DataError(
                    f"{lists['train' if one == 'base' else 'val']}: class {shared[0]!r} is in {other} as well; "
                    "the classes of few-shot parts must be apart"
                )
        return Listing(parts, names)


def _folders(rows: list[tuple[str, str]]) -> dict[str, str]:
    """Class in the list -> its name: the videos' folder where a list numbers its classes."""
    folders: dict[str, set[str]] = {}
    for name, video in rows:
        folders.setdefault(name, set()).add(os.path.basename(os.path.dirname(video)))
    numbered = all(_NUMBERED.fullmatch(name) for name in folders)
    one_each = all(len(found) == 1 for found in folders.values())
    meant = {name: next(iter(found)) for name, found in folders.items()} if numbered and one_each else {}
    apart = len(set(meant.values())) == len(folders) and "" not in meant.values()
    return meant if apart else {name: name for name in folders}
