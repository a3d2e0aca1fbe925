"""HMDB-51: <class>_test_split<N>.txt with 0, 1 or 2 per video, and .avi files."""

from __future__ import annotations

import re

from vjepa_fast.data.prepare.api import DATA_SETS, DataSet, Listed, Listing, Request
from vjepa_fast.data.prepare.lists import Classes, read_lines
from vjepa_fast.errors import DataError

_HINT = "unpack test_train_splits.rar there, or name its folder with --lists"
_LIST = re.compile(r"(.+)_test_split(\d)\.txt")


@DATA_SETS.register("hmdb51")
class HMDB51(DataSet):
    """HMDB-51: <class>_test_splitN.txt (1 train, 2 test, 0 neither), .avi files in class folders."""

    title = "HMDB-51"
    unpacked = "the .rar of each class, and testTrainMulti_7030_splits/"
    splits = 3

    def read(self, request: Request) -> Listing:
        """Parts train1, test1 and so on; labels count the classes by name."""
        found = {m: paths for name, paths in request.list_files(_HINT).items() if (m := _LIST.fullmatch(name))}
        if not found:
            raise DataError(f"{request.lists or request.source}: holds no <class>_test_split1.txt; {_HINT}")
        classes = Classes(sorted({match[1] for match in found}), "the lists")
        parts: dict[str, list[Listed]] = {}
        for split in request.splits or (1,):
            lists = sorted((m[1], paths) for m, paths in found.items() if int(m[2]) == split)
            missing = sorted(set(classes.names) - {name for name, _ in lists})
            if missing:
                raise DataError(
                    f"{request.lists or request.source}: holds no {missing[0]}_test_split{split}.txt; {_HINT}"
                )
            train, test = parts.setdefault(f"train{split}", []), parts.setdefault(f"test{split}", [])
            for name, paths in lists:
                path = request.list_file(f"{name}_test_split{split}.txt", hint=_HINT) if len(paths) > 1 else paths[0]
                label = classes.label(name, str(path))
                for where, line in read_lines(path):
                    video, _, part = line.rpartition(" ")
                    if part not in ("0", "1", "2") or not video:
                        raise DataError(f"{where}: expected '<video> 0', 1 or 2, found {line[:80]!r}")
                    if part != "0":
                        video = video.strip()
                        sample = Listed(video, label, where, *request.files.find(video, within=name))
                        (train if part == "1" else test).append(sample)
        return Listing(parts, classes.names)
