"""WebDataset shards: .tar files in which the files of a sample follow each other under one key."""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vjepa_fast.data.media import VIDEO_SUFFIXES, suffix_of
from vjepa_fast.data.prepare.api import DATA_SETS, DataSet, Listed, Listing, Request
from vjepa_fast.data.prepare.find import MEDIA_SUFFIXES, visible
from vjepa_fast.data.prepare.lists import Classes, order_classes, whole
from vjepa_fast.errors import DataError
from vjepa_fast.files import atomic_path, first_line, parse_json

_PARTS = ("train", "val", "test")
_LABELS = (".cls", ".json", ".txt")  # the first with a label counts: a text may be a caption
_LONGEST_LABEL = 1_000_000  # bytes of its file that are read
_MOST_CLASSES = 1_000_000


@DATA_SETS.register("webdataset")
class WebDataset(DataSet):
    """WebDataset shards: key.mp4 (or .jpg, ...) and key.cls, key.txt or key.json; unpacked to files/ of the output."""

    title = "WebDataset"
    unpacked = ".tar shards, in folders or with names of train, val, test or not"

    def read(self, request: Request) -> Listing:
        """Parts by the shard's path (train without one); labels are numbers, or classes in the order of names."""
        root = request.source if request.source.is_dir() else request.source.parent
        found = visible(root) if request.source.is_dir() else iter([str(request.source)])
        shards = [Path(path) for path in found if path.endswith(".tar")]
        if not shards:
            raise DataError(f"{request.source}: holds no .tar shards")
        rows: dict[str, list[tuple[str, str, str | None, str]]] = {}  # part -> name, label, path, problem
        unlabelled = 0
        for shard in shards:
            below = os.path.relpath(shard, root)
            words = re.split(r"[^a-z]+", below.lower())
            part = next((p for p in _PARTS if p in words or (p == "val" and "validation" in words)), "train")
            folder = request.out / "files" / Path(below).with_suffix("")
            for name, label, path, problem in _unpack(shard, folder):
                unlabelled += not label and path is not None
                rows.setdefault(part, []).append((f"{shard}: {name}", label or "0", path, problem))
        labels = {label for part in rows.values() for _, label, _, _ in part}
        numbers = {label for label in labels if label.isdecimal()}
        if numbers != labels and numbers - {"0"}:  # 0 also stands for none
            where, label = next((n, t) for part in rows.values() for n, t, _, _ in part if t not in numbers)
            raise DataError(f"{where}: the label {label!r} is no number, others are; give all as numbers, or as names")
        if numbers == labels:
            count = max(whole(label, str(request.source), "a label", 0, _MOST_CLASSES) for label in labels) + 1
            classes = Classes([str(number) for number in range(count)], "the shards")
        else:
            classes = order_classes(labels, (), "the shards")
        parts = {
            part: [
                Listed(name, classes.label(label, name), name, path, problem) for name, label, path, problem in found
            ]
            for part, found in rows.items()
        }
        notes = [f"{len(shards)} shards are unpacked to {request.out / 'files'}; training reads the files there"]
        if unlabelled:
            notes.append(f"{unlabelled} samples have no .cls, .txt or .json with a label and get label 0")
        return Listing(parts, classes.names, notes)


def _unpack(shard: Path, folder: Path) -> Iterator[tuple[str, str, str | None, str]]:
    """(name, label, path, problem) of each sample; files that are there already are not written again."""
    media: dict[str, tuple[str, str | None, str]] = {}
    labels: dict[str, dict[str, str]] = {}  # key -> suffix of its file -> label
    problem = ""
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if not member.isfile() or os.path.basename(member.name).startswith("."):
                    continue
                base = os.path.basename(member.name)
                key = os.path.join(os.path.dirname(member.name), base.partition(".")[0])
                suffix = os.path.splitext(base)[1].lower()
                content = archive.extractfile(member)
                assert content is not None, "it is a file"
                if suffix in MEDIA_SUFFIXES:
                    if key in media and (suffix not in VIDEO_SUFFIXES or suffix_of(media[key][0]) in VIDEO_SUFFIXES):
                        continue  # a sample is its first video, or its first picture
                    parts = [p for p in Path(member.name).parts if p != "/"]
                    if ".." in parts:
                        media[key] = member.name, None, "its name leads out of the shard"
                    else:
                        media[key] = member.name, _write(content, folder.joinpath(*parts), member.size), ""
                elif suffix in _LABELS:
                    labels.setdefault(key, {})[suffix] = _label(content.read(_LONGEST_LABEL), suffix)
    except (tarfile.TarError, EOFError) as error:
        problem = f"the shard ends early or is damaged ({first_line(error)}); download it anew"
    for key, (name, path, why) in media.items():
        given = labels.get(key, {})
        yield name, next((given[s] for s in _LABELS if given.get(s)), ""), path, why
    if problem:
        yield "the rest", "0", None, problem


def _write(content: IO[bytes], path: Path, size: int) -> str:
    if not path.is_file() or path.stat().st_size != size:
        with atomic_path(path, sync=False) as temporary, open(temporary, "wb") as file:
            shutil.copyfileobj(content, file)
            if file.tell() != size:
                raise EOFError("unexpected end of data")
    return str(path.absolute())


def _label(content: bytes, suffix: str) -> str:
    text = content.decode("utf-8-sig", errors="replace").strip()
    if suffix == ".json":
        try:
            facts = parse_json(text)
        except ValueError:
            return ""
        value = (
            next((facts[k] for k in ("label", "cls", "class") if k in facts), "") if isinstance(facts, dict) else facts
        )
        return str(value) if isinstance(value, int | str) else ""
    return " ".join(text.split())[:200]
