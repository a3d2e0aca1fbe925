"""UCF-101: classInd.txt, trainlist01.txt to testlist03.txt, and .avi files flat or in class folders."""

from __future__ import annotations

import re
from pathlib import Path

from vjepa_fast.data.prepare.api import DATA_SETS, DataSet, Listed, Listing, Request
from vjepa_fast.data.prepare.lists import Classes, read_lines, whole
from vjepa_fast.errors import DataError

_HINT = "unpack UCF101TrainTestSplits-RecognitionTask.zip there, or name its folder with --lists"
_NAME = re.compile(r"v_([^_]+)_g\d+_c\d+")


@DATA_SETS.register("ucf101")
class UCF101(DataSet):
    """UCF-101: classInd.txt, trainlist0N.txt, testlist0N.txt, v_Class_gXX_cYY.avi."""

    title = "UCF-101"
    unpacked = "UCF-101/ (or .avi files without class folders) and ucfTrainTestlist/"
    splits = 3
    task = "ucf101"

    def read(self, request: Request) -> Listing:
        """Parts train1, test1 and so on; labels as classInd.txt has them, from 0."""
        classes = _classes(request.list_file("classInd.txt", hint=_HINT))
        parts = {}
        for split in request.splits or (1,):
            for part in ("train", "test"):
                path = request.list_file(f"{part}list{split:02d}.txt", hint=_HINT)
                parts[f"{part}{split}"] = [_listed(request, classes, where, line) for where, line in read_lines(path)]
        return Listing(parts, classes.names)


def _classes(path: Path) -> Classes:
    names = {}
    for where, line in read_lines(path):
        number, _, name = line.partition(" ")
        if not name.strip():
            raise DataError(f"{where}: expected '<number> <class>', found {line[:80]!r}")
        names[whole(number, where, "the number", 1, 100_000)] = name.strip()
    if sorted(names) != list(range(1, len(names) + 1)):
        raise DataError(f"{path}: classes are not numbered 1 to {len(names)}; download it anew")
    return Classes([names[number] for number in sorted(names)], path)


def _listed(request: Request, classes: Classes, where: str, line: str) -> Listed:
    head, _, last = line.rpartition(" ")
    name, number = (head.strip(), last) if head and last.isdecimal() else (line, "")
    folder = name.replace("\\", "/").rpartition("/")[0].rpartition("/")[2]
    if not folder:
        match = _NAME.search(name)
        if match is None:
            raise DataError(f"{where}: expected '<class>/<video>' with or without a label, found {line[:80]!r}")
        folder = match[1]
    label = classes.label(folder, where)
    if number and whole(number, where, "the number") != label + 1:
        raise DataError(f"{where}: class {folder} has number {number}, but {label + 1} in classInd.txt")
    return Listed(name, label, where, *request.files.find(name))
