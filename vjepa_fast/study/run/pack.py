"""A study between machines: what a machine needs, or has made, in one archive of limited size, and merging it.

A rented machine gets an archive (or starts with nothing), runs a portion (`vjepa-fast study run --minutes`), and gives
one back; a study that was packed and unpacked goes on as if it had stayed where it was.
"""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vjepa_fast.errors import UserError
from vjepa_fast.files import atomic_path, write_json
from vjepa_fast.study.run.cells import error_path, read_cell
from vjepa_fast.study.run.plan import read_plan

DATA = ("suites", "cache", "tasks")  # folders of rendered and decoded clips, and the notes that they are done
LISTS = ("variants", "regimes", "seeds", "keys")  # of study.json, which are merged
_STOPPED = ("checkpoints", "rows", "config.yaml", "demo_key.json", "study_hash.txt", "versions.json", "metrics.jsonl")
_KEPT = ("config.yaml", "versions.json", "metrics.jsonl")  # of the folder of a finished run


@dataclass
class Packed:
    """What an archive holds. ``left_out``: stopped runs that did not fit and start anew elsewhere."""

    path: str
    megabytes: float
    cells: int
    stopped: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def pack(folder: str | os.PathLike, out: str | os.PathLike, *, data: bool = False, most: float = 50.0) -> Packed:
    """Write cells, metrics of runs and, as they fit, checkpoints and rows of stopped runs to ``out``, a .tar.gz.

    Args:
        folder: of the study; no command may be at work in it.
        out: the archive.
        data: rendered and decoded clips too.
        most: megabytes (10^6 bytes) that the archive may have.

    Raises:
        UserError: no study there, or what has to be in the archive does not fit (nothing is written then).
    """
    folder, out, limit = Path(folder), Path(out), int(most * 1e6)
    read_plan(folder)
    done = [path.stem for path in sorted((folder / "cells").glob("*.json"))]
    runs = [path.name for path in sorted((folder / "runs").glob("*")) if path.is_dir()]
    needed = [folder / "study.json", *sorted(folder.glob("instrument*")), *sorted((folder / "cells").glob("*"))]
    needed += [folder / "runs" / key / name for key in runs if key in done for name in _KEPT]
    needed += [path for name in DATA if data for path in _files(folder / name)]
    packed = Packed(str(out), 0.0, len(done))
    with atomic_path(out) as temporary:
        with gzip.open(temporary, "wb", compresslevel=4) as packer, tarfile.open(fileobj=packer, mode="w") as archive:
            for path in needed:
                if path.is_file():
                    archive.add(path, path.relative_to(folder), recursive=False)
            packer.flush()
            for key in runs:
                if key in done:
                    continue
                files = [file for name in _STOPPED for file in _files(folder / "runs" / key / name)]
                if temporary.stat().st_size + sum(file.stat().st_size for file in files) > limit:
                    packed.left_out.append(key)
                    continue
                for file in files:
                    archive.add(file, file.relative_to(folder), recursive=False)
                packer.flush()
                packed.stopped.append(key)
        size = temporary.stat().st_size
        if size > limit:
            raise UserError(
                f"{out}: takes {size / 1e6:.1f} MB, over the {most:g} asked for; "
                + ("leave --data out, or give the machine fewer or smaller suites" if data else "raise --mb")
            )
        packed.megabytes = size / 1e6
    return packed


def unpack(archives: Sequence[str | os.PathLike], folder: str | os.PathLike) -> dict[str, int]:
    """Merge archives into a study's folder, made if it is not there: {"cells": new ones, "stopped": runs taken}.

    A cell that is here stays; a stopped run is taken where none is here that has come as far.

    Raises:
        UserError: an archive is damaged or none of a study, or is of a study with other settings, or holds a cell that
            was made with another configuration than the one here.
    """
    folder, found = Path(folder), {"cells": 0, "stopped": 0}
    for archive in archives:
        with tempfile.TemporaryDirectory() as place:
            _extract(Path(archive), Path(place))
            new = _merge(Path(place), folder, str(archive))
        found = {key: found[key] + new[key] for key in found}
    return found


def _merge(source: Path, folder: Path, name: str) -> dict[str, int]:
    plan = there = read_plan(source)
    if (folder / "study.json").exists():
        here = read_plan(folder)
        if here["settings"] != there["settings"]:
            both = {**here["settings"], **there["settings"]}
            differs = ", ".join(k for k in both if here["settings"].get(k) != there["settings"].get(k))
            raise UserError(f"{name}: is of a study with another {differs} than {folder}; choose another folder")
        plan = {**here, **{key: _union(here[key], there[key]) for key in LISTS}}
        plan["modes"] = {mode: _union(here["modes"].get(mode, []), asked) for mode, asked in there["modes"].items()}
        forced = (p.get("instrument", {}).get("forced", []) for p in (here, there))
        plan["instrument"] = {"forced": sorted(_union(*forced))}
    cells = [path.stem for path in (source / "cells").glob("*.json")]
    for key in cells:
        ours, theirs = read_cell(folder, key), read_cell(source, key)
        if theirs is None:
            raise UserError(f"{name}: cells/{key}.json is damaged; pack the study anew")
        if ours is not None and ours["config_hash"] != theirs["config_hash"]:
            raise UserError(f"{name}: cells/{key}.json was made with another configuration than the one in {folder}")
    new = {"cells": 0, "stopped": 0}
    for key in cells:
        if read_cell(folder, key) is None:
            new["cells"] += 1
            _take(source, folder, Path("cells") / f"{key}.json")
            error_path(folder, key).unlink(missing_ok=True)
    for run in sorted((source / "runs").glob("*")):
        relative = run.relative_to(source)
        if read_cell(folder, run.name) is not None and run.name not in cells:
            continue
        if _progress(run) > _progress(folder / relative):
            shutil.rmtree(folder / relative, ignore_errors=True)
            _take(source, folder, relative)
            new["stopped"] += run.name not in cells
    for path in [*source.glob("instrument*"), *(source / name for name in DATA)]:
        if path.exists() and not (folder / path.name).exists():
            _take(source, folder, path.relative_to(source))
    write_json(folder / "study.json", plan)
    return new


def _extract(archive: Path, place: Path) -> None:
    """Unpack; UserError where the archive cannot be read, or names a place outside of the folder."""
    try:
        free = shutil.disk_usage(place).free
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:  # a small archive may hold files of any size
                if (free := free - member.size) < 0:
                    raise UserError(f"{archive}: what it holds does not fit the disk of {place}; free space")
                tar.extract(member, place, filter="data")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"{archive}: is no archive of vjepa-fast study pack, or a damaged one ({error})") from None
    if not (place / "study.json").is_file():
        raise UserError(f"{archive}: holds no study.json; give an archive of vjepa-fast study pack")


def _take(source: Path, folder: Path, relative: Path) -> None:
    (folder / relative).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(str(source / relative), str(folder / relative))


def _progress(run: Path) -> tuple[int, int]:
    """(step of the newest checkpoint; 0 without one, -1 without a run; evaluated rows that are kept)."""
    steps = [int(path.stem.rpartition("-")[2]) for path in (run / "checkpoints").glob("step-*.pt")]
    return max(steps, default=0 if run.is_dir() else -1), len(list((run / "rows").glob("*.json")))


def _files(path: Path) -> Iterator[Path]:
    """The file, or all files below the folder."""
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from (file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.endswith(".tmp"))


def _union(*lists: Sequence) -> list:
    return list(dict.fromkeys(item for one in lists for item in one))
