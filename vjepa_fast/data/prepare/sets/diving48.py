"""Diving-48 V2: Diving48_V2_train.json, Diving48_V2_test.json, Diving48_vocab.json, and .mp4 files."""

from __future__ import annotations

from vjepa_fast.data.prepare.api import DATA_SETS, DataSet, Listed, Listing, Request
from vjepa_fast.data.prepare.lists import Classes, order_classes, read_json, read_records, whole
from vjepa_fast.errors import DataError

_HINT = "download Diving48_V2_train.json, Diving48_V2_test.json and Diving48_vocab.json there, or use --lists"


@DATA_SETS.register("diving48")
class Diving48(DataSet):
    """Diving-48: Diving48_V2_train.json, Diving48_V2_test.json, Diving48_vocab.json, <vid_name>.mp4."""

    title = "Diving-48 V2"
    unpacked = "rgb/ and the three .json files"
    task = "diving48"

    def read(self, request: Request) -> Listing:
        """Parts train and test; labels as the lists have them, names from the vocabulary."""
        if request.find_list("Diving48_V2_train.json", hint=_HINT) is None:
            old = request.find_list("Diving48_train.json", hint=_HINT)
            if old is not None:
                raise DataError(f"{old}: is of the first version, in which labels are wrong; {_HINT}")
        vocabulary = request.find_list("Diving48_vocab.json", hint=_HINT)
        if vocabulary is not None:
            names = ["+".join(map(str, e)) if isinstance(e, list) else str(e) for e in read_json(vocabulary, list)]
            classes = Classes(names, vocabulary)
        else:
            classes = order_classes(set(request.known), request.known, "the evaluation task")
        parts = {}
        for part in ("train", "test"):
            path = request.list_file(f"Diving48_V2_{part}.json", hint=_HINT)
            parts[part] = []
            for where, entry in read_records(path, "vid_name", "label"):
                video, label = str(entry["vid_name"]), whole(entry["label"], where, "the label")
                if label >= len(classes.names):
                    raise DataError(f"{where}: label {label} is none of the {len(classes.names)} of the vocabulary")
                parts[part].append(Listed(video, label, where, *request.files.find(video)))
        return Listing(parts, classes.names)
