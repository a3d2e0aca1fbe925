"""All videos below a folder, wherever they lie: what ``vjepa-fast train --videos`` reads."""

from __future__ import annotations

from pathlib import Path

from vjepa_fast.data.media import is_image_path
from vjepa_fast.data.prepare.api import DATA_SETS, DataSet, Listed, Listing, Request
from vjepa_fast.errors import DataError


@DATA_SETS.register("videos")
class Videos(DataSet):
    """Every video below a folder, labelled by its first folder; images are left out."""

    title = "videos"
    unpacked = "any folder: videos directly in it, or in folders of any depth"

    def read(self, request: Request) -> Listing:
        """One part, ``train``. Videos directly in the folder have a class of its name."""
        files = request.files
        found = sorted(path for paths in files.media.values() for path in paths)
        videos = [path for path in found if not is_image_path(path)]
        if not videos:
            raise DataError(f"{request.source}: no video in it or in its folders; name the folder that holds them")
        root = Path(request.source).absolute()
        classes = {path: _first_folder(Path(path), root) for path in videos}
        names = sorted(set(classes.values()))
        samples = [Listed(Path(p).name, names.index(classes[p]), str(Path(p).parent), p) for p in videos]
        images = len(found) - len(videos)
        notes = [f"{images} image{'s' if images > 1 else ''} among the videos left out"] if images else []
        return Listing({"train": samples}, names, notes)


def _first_folder(path: Path, root: Path) -> str:
    below = path.relative_to(root).parts
    return below[0] if len(below) > 1 else root.name
