"""ImageNet-100: an ImageFolder tree of ImageNet, of which the classes of a list are taken."""

from __future__ import annotations

import os

from vjepa_fast.data.prepare.api import DATA_SETS, DataSet, Listed, Listing, Request
from vjepa_fast.data.prepare.lists import Classes, read_lines
from vjepa_fast.errors import DataError

_PARTS = ("train", "val", "test")


@DATA_SETS.register("imagenet100")
class ImageNet100(DataSet):
    """ImageNet-100: train/<wnid>/ and val/<wnid>/ of the 100 classes of CMC, or of a list of your own."""

    title = "ImageNet-100"
    unpacked = "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG"
    task = "imagenet100"

    def read(self, request: Request) -> Listing:
        """Parts by the folder's name (train without one); labels count the ids of the list by name."""
        names, source = sorted(request.known), "the list of CMC"
        if request.lists is not None:
            names, source = sorted({line.split()[0] for _, line in read_lines(request.lists)}), str(request.lists)
        if not names:
            raise DataError(f"{request.source}: which classes is not known; give a text file of their ids with --lists")
        classes = Classes(names, source)
        labels = {name: label for label, name in enumerate(classes.names)}
        parts: dict[str, list[Listed]] = {part: [] for part in _PARTS}
        for path in sorted(p for paths in request.files.media.values() for p in paths):
            folder = os.path.dirname(path)
            folders = os.path.relpath(path, request.source).split(os.sep)[:-1] or [os.path.basename(folder)]
            label = next((labels[f] for f in reversed(folders) if f in labels), None)
            if label is not None:
                part = next((p for f in folders for p in _PARTS if f.split(".")[0].lower() == p), "train")
                parts[part].append(Listed(os.path.basename(path), label, folder, path))
        if not any(parts.values()):
            raise DataError(
                f"{request.source}: holds no folder of an id of {source} ({names[0]}, ...); "
                "unpack each class to a folder of its own"
            )
        notes = []
        for part, listed in parts.items():
            absent = len(names) - len({sample.label for sample in listed})
            if listed and absent:
                notes.append(f"{part}: {absent} of {len(names)} classes have no image")
        if not parts["val"] and any(name.startswith("ILSVRC2012_val_") for name in request.files.media):
            notes.append(
                "images of val/ are not in folders of their class and are left out; move them to have a val part"
            )
        return Listing({part: listed for part, listed in parts.items() if listed}, classes.names, notes)
