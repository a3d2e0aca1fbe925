"""Something-Something V2: labels.json, train.json, validation.json, and .webm files named by id."""

from __future__ import annotations

from pathlib import Path

from vjepa_fast.data.prepare.api import DATA_SETS, DataSet, Listed, Listing, Request
from vjepa_fast.data.prepare.lists import Classes, read_json, read_records, read_table, whole
from vjepa_fast.errors import DataError

_HINT = "unpack 20bn-something-something-download-package-labels.zip there, or name its folder with --lists"
_PREFIX = "something-something-v2-"
_PARTS = {"train": "train", "validation": "val"}


@DATA_SETS.register("ssv2")
class SSv2(DataSet):
    """Something-Something V2: labels.json, train.json, validation.json, test-answers.csv, <id>.webm."""

    title = "Something-Something V2"
    unpacked = "20bn-something-something-v2/ and labels/"
    task = "ssv2"

    def read(self, request: Request) -> Listing:
        """Parts train and val, and test where test-answers.csv is there; labels as labels.json has them."""
        classes = _classes(_list(request, "labels.json"))
        parts = {}
        for name, part in _PARTS.items():
            parts[part] = [
                _listed(request, classes, str(entry["id"]), str(entry["template"]), where)
                for where, entry in read_records(_list(request, f"{name}.json"), "id", "template")
            ]
        answers, notes = request.find_list("test-answers.csv", hint=_HINT), []
        if answers is not None:
            rows = []
            for where, cells in read_table(answers, ";"):
                if len(cells) != 2:
                    raise DataError(f"{where}: expected '<id>;<label>', found {';'.join(cells)[:80]!r}")
                rows.append(_listed(request, classes, cells[0], cells[1], where))
            parts["test"] = rows
        else:
            notes.append("the test part has no labels (no test-answers.csv) and is left out")
        return Listing(parts, classes.names, notes)


def _list(request: Request, name: str) -> Path:
    return request.list_file(name, _PREFIX + name, hint=_HINT)


def _classes(path: Path) -> Classes:
    numbered = {whole(n, f"{path}: {name[:60]!r}", "the label"): name for name, n in read_json(path, dict).items()}
    if sorted(numbered) != list(range(len(numbered))):
        raise DataError(f"{path}: labels do not count from 0 to {len(numbered) - 1}; download it anew")
    return Classes([numbered[label] for label in sorted(numbered)], path)


def _listed(request: Request, classes: Classes, video: str, template: str, where: str) -> Listed:
    label = classes.label(template.replace("[", "").replace("]", ""), where)
    return Listed(video, label, where, *request.files.find(video))
