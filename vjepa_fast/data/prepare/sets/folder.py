"""A folder of class folders, with or without parts: what ``vjepa-fast data manifest`` reads."""

from __future__ import annotations

import tempfile
from pathlib import Path

from vjepa_fast.data.manifests.manifest import load_manifest
from vjepa_fast.data.manifests.scan import scan_folder
from vjepa_fast.data.prepare.api import DATA_SETS, DataSet, Listed, Listing, Request
from vjepa_fast.files import parse_json


@DATA_SETS.register("folder")
class Folder(DataSet):
    """Your own files: <class>/<file>, train/<class>/<file> (and val, test), or files without classes."""

    title = "folder"
    unpacked = "class folders, in folders train/, val/, test/ or not"
    fractions = True

    def read(self, request: Request) -> Listing:
        """Parts and labels as `scan_folder` finds them."""
        with tempfile.TemporaryDirectory() as scratch:
            written = scan_folder(
                request.source,
                out=Path(scratch) / "train.csv",
                absolute=True,
                val_fraction=request.val_fraction,
                test_fraction=request.test_fraction,
            )
            manifests = {part: load_manifest(facts["path"]) for part, facts in written.items()}
            names = parse_json((Path(scratch) / "train_classes.json").read_text(encoding="utf-8"))
        parts = {
            part: [Listed(Path(p).name, int(y), str(Path(p).parent), p) for p, y in zip(m.paths, m.labels, strict=True)]
            for part, m in manifests.items()
        }
        return Listing(parts, names)
