"""What novel classes share with pretraining data, found from the manifests: files, source videos, class names.

Self-supervised pretraining reads no labels, so nothing of this makes a number wrong; but classes whose videos the
encoder has been trained on are not novel to it, and a few-shot accuracy has to say so.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from vjepa_fast.data.manifests.manifest import Manifest
from vjepa_fast.data.members import member_of, read_bytes, stat_of
from vjepa_fast.errors import DataError
from vjepa_fast.evaluation.extract.cache import file_hash
from vjepa_fast.files import parse_json

T = TypeVar("T")
EXAMPLES = 5  # named per finding
KINDS = {
    "path": "are the same file",
    "content": "have the content of another file",
    "video": "come from the same source video as one",
    "class": "belong to a class with the name of one",
}
_TIMED = re.compile(r"([\w-]{11})_\d{6}_\d{6}")  # Kinetics: start and end in s
_BARE = re.compile(r"([\w-]{11})(?:_\d{5})?")  # Diving-48 numbers its clips
_COUNTED = re.compile(r"[A-Za-z]+[_-]?\d+")  # clip_000012 has 11 characters too
_UCF = re.compile(r"v_([A-Za-z]+)_g(\d+)_c\d+")
_HMDB = re.compile(r"(.+)_[fhlu]_(?:cm|nm)_np\d_(?:ba|fr|le|ri)_(?:bad|goo|med)_\d+")
_SSV2 = re.compile(r"something|ssv2|sth-?sth|20bn", re.IGNORECASE)


@dataclass(frozen=True)
class Overlap:
    """``samples`` of the novel samples that share something with ``manifest``; ``kind`` is one of KINDS.

    ``names``: what is shared, the first EXAMPLES of ``distinct``.
    """

    kind: str
    manifest: str
    samples: int
    distinct: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Leakage:
    """Findings for one set of novel samples. ``checked``: manifests that were compared, ``gaps``: what could not be."""

    novel: str
    samples: int
    classes: int
    checked: tuple[str, ...]
    overlaps: tuple[Overlap, ...]
    gaps: tuple[str, ...]
    labelled: bool = False  # the labels of what was compared are trained on as well

    @property
    def found(self) -> bool:
        """Whether anything is shared."""
        return bool(self.overlaps)

    @property
    def statement(self) -> str:
        """The findings in words, one line each."""
        if not self.checked:
            return "\n".join(["Leakage: no pretraining manifests given: leakage not checked.", *_indent(self.gaps)])
        against = ", ".join(self.checked)
        head = f"Leakage of {self.novel} ({self.samples} samples, {self.classes} classes) against {against}: "
        lines = []
        for o in self.overlaps:
            of = "classes" if o.kind == "class" else "videos" if o.kind == "video" else "files"
            more = ", ..." if o.distinct > len(o.names) else ""
            lines.append(
                f"{o.samples} samples ({100 * o.samples / self.samples:.1f} %) {KINDS[o.kind]} of {o.manifest}; "
                f"{o.distinct} {of}: {', '.join(o.names)}{more}"
            )
        read = "their labels are read" if self.labelled else "pretraining reads no labels"
        head += (
            f"found; {read}, {'so' if self.labelled else 'but'} these are not novel to the encoder."
            if lines
            else "no shared file, source video or class name found."
        )
        return "\n".join([head, *_indent(lines), *_indent(self.gaps)])

    def to_dict(self) -> dict:
        """Plain types, for JSON, the statement included."""
        return {**asdict(self), "statement": self.statement}


def _indent(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def find_leakage(
    novel: Manifest,
    pretrain: Sequence[Manifest],
    *,
    content: bool = True,
    gaps: Sequence[str] = (),
    labelled: bool = False,
) -> Leakage:
    """Compare a manifest of novel samples with manifests of pretraining, or (``labelled``) of base classes.

    Looked for: the same file (path, links followed), another file of the same content (sha256; only files of equal size
    are read; ``content=False`` leaves it out), the same source video (:func:`source_ids`), and classes of the same name
    (:func:`class_names`, :func:`class_keys`). What cannot be compared goes to ``gaps``, after those given.
    """
    overlaps, gaps = [], [*gaps]
    real = [_real(p) for p in novel.paths]
    ids = [source_ids(p) for p in novel.paths]
    names = class_names(novel)
    if pretrain and not names:
        gaps.append(f"{_label(novel)}: class names unknown (no classes.json, no class folders), so not compared")
    sizes = _sizes(novel) if content and pretrain else {}
    for manifest in pretrain:
        theirs = {_real(p) for p in manifest.paths}
        by_path = {i: os.path.basename(novel.paths[i]) for i, p in enumerate(real) if p in theirs}
        found = {"path": by_path}
        if content:
            found["content"], missing = _same_content(novel, sizes, manifest, skip=set(by_path))
            if missing:
                gaps.append(f"{_label(manifest)}: {missing} files are not here, so their content is not compared")
        known = set().union(*map(source_ids, manifest.paths))
        found["video"] = {i: min(own & known)[1] for i, own in enumerate(ids) if own & known}
        if other := class_names(manifest):
            keys = {k: name for name in other.values() for k in class_keys(name)}
            shared = {
                label: f"{name} = {keys[hit[0]]}" if name != keys[hit[0]] else name
                for label, name in names.items()
                if (hit := [k for k in class_keys(name) if k in keys])
            }
            found["class"] = {i: shared[int(y)] for i, y in enumerate(novel.labels) if int(y) in shared}
        elif names:
            gaps.append(f"{_label(manifest)}: class names unknown (no classes.json, no class folders), so not compared")
        for kind, hits in found.items():
            if hits:
                distinct = sorted(set(hits.values()))
                shown = tuple(distinct[:EXAMPLES])
                overlaps.append(Overlap(kind, _label(manifest), len(hits), len(distinct), shown))
    if sizes and (missing := len(novel.paths) - sum(map(len, sizes.values()))):
        gaps.append(f"{_label(novel)}: {missing} files are not here, so their content is not compared")
    classes = len(set(novel.labels.tolist()))
    return Leakage(
        _label(novel), len(novel.paths), classes, tuple(map(_label, pretrain)), tuple(overlaps), tuple(gaps), labelled
    )


def _label(manifest: Manifest) -> str:
    path = Path(manifest.path)
    return f"{path.parent.name}/{path.name}" if path.parent.name else path.name


# ---------------------------------------------------------------- files


_real_folder = lru_cache(maxsize=4096)(os.path.realpath)


def _real(path: str) -> str:
    """os.path.realpath, looking at each folder once."""
    if os.path.islink(path):
        return os.path.realpath(path)
    folder, name = os.path.split(path)
    return os.path.join(_real_folder(folder), name)


def _read(what: Callable[[str], T], path: str) -> T | None:
    """``what(path)``; None where the file cannot be read."""
    try:
        return what(path)
    except OSError:
        return None


def _digest(path: str) -> str:
    """sha256 of a file's content, or of a member's of a shard."""
    return file_hash(path) if member_of(path) is None else hashlib.sha256(read_bytes(path)).hexdigest()


def _sizes(manifest: Manifest) -> dict[int, list[int]]:
    """Size in bytes -> samples whose file has it."""
    sizes: dict[int, list[int]] = {}
    for i, path in enumerate(manifest.paths):
        if (stat := _read(stat_of, path)) is not None:
            sizes.setdefault(stat[0], []).append(i)
    return sizes


def _same_content(
    novel: Manifest, sizes: dict[int, list[int]], manifest: Manifest, skip: set[int]
) -> tuple[dict[int, str], int]:
    """(novel sample -> file name in ``manifest`` of the same content, number of the manifest's files not found)."""
    wanted, missing, hits = {}, 0, {}
    for path in manifest.paths:
        stat = _read(stat_of, path)
        missing += stat is None
        if stat is not None and stat[0] in sizes:
            wanted.setdefault(stat[0], []).append(path)
    for size, paths in wanted.items():
        mine = [i for i in sizes[size] if i not in skip]
        if not mine:
            continue
        theirs = {_read(_digest, path): os.path.basename(path) for path in paths}
        for i in mine:
            if (digest := _read(_digest, novel.paths[i])) is not None and digest in theirs:
                hits[i] = theirs[digest]
    return hits, missing


# ---------------------------------------------------------------- source videos


def source_ids(path: str) -> set[tuple[str, str]]:
    """(data set's way of naming, id of the video that a clip was cut from), as far as the file name shows.

    YouTube ids: ``<id>_000012_000022`` (Kinetics); ``<id>_00012`` (Diving-48) and ``<id>`` where that looks like one.
    UCF-101: ``v_X_gYY_cZZ`` are cuts of the video ``v_X_gYY``. HMDB-51: what comes before class and tags.
    Something-Something: numbers, in a path that names the data set.
    """
    stem = os.path.splitext(os.path.basename(path))[0]
    if match := _TIMED.fullmatch(stem):
        return {("youtube", match[1])}
    if match := _UCF.fullmatch(stem):
        return {("ucf101", f"v_{match[1]}_g{match[2]}")}
    if match := _HMDB.fullmatch(stem):
        return {("hmdb51", match[1].removesuffix("_" + os.path.basename(os.path.dirname(path))))}
    if stem.isdigit():
        return {("ssv2", stem)} if _SSV2.search(path) else set()
    match = _BARE.fullmatch(stem)
    # 64 letters at random: all but a few in a thousand ids have both cases, names given by people mostly not
    if match and match[1] not in (match[1].lower(), match[1].upper()) and not _COUNTED.fullmatch(match[1]):
        return {("youtube", match[1])}
    return set()


# ---------------------------------------------------------------- classes


def class_names(manifest: Manifest) -> dict[int, str]:
    """Label -> class name: from ``<name>_classes.json`` or ``classes.json`` beside the manifest (as `vjepa-fast data
    manifest` writes them), else from the files' folders where each class has its own; empty where neither is there.

    Raises DataError where a class file is no list of names or has fewer than there are labels.
    """
    path = Path(manifest.path)
    labels = sorted(set(manifest.labels.tolist()))
    stems = [path.stem, re.sub(r"_(train|val|test|base|novel)$", "", path.stem)]
    for file in [path.with_name(f"{s}_classes.json") for s in stems] + [path.with_name("classes.json")]:
        if not file.is_file():
            continue
        try:
            names = parse_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            names = None
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise DataError(f"{file}: expected a JSON list of class names, one per label")
        if labels and labels[-1] >= len(names):
            raise DataError(f"{file}: {len(names)} class names, but {path.name} has label {labels[-1]}")
        return {label: names[label] for label in labels}
    folders: dict[int, set[str]] = {}
    for file, label in zip(manifest.paths, manifest.labels.tolist()):
        folders.setdefault(label, set()).add(os.path.basename(os.path.dirname(file)))
    found = {label: next(iter(f)) for label, f in sorted(folders.items()) if len(f) == 1}
    return found if len(set(found.values())) == len(folders) else {}


def class_keys(name: str) -> set[str]:
    """Spellings of a class name that count as the same: words from CamelCase, blanks or underscores, without endings,
    in their order and, of up to three, sorted ("HorseRiding" meets "riding a horse" and "ride_horse").
    """
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name.replace("'", "")).lower())
    stems = [_stem(w) for w in words if w not in ("a", "an", "the")] or words
    keys = {"".join(stems)}
    if len(stems) <= 3:  # in a sentence the order matters: from left to right, from right to left
        keys.add("".join(sorted(stems)))
    return {re.sub(r"([a-z])\1", r"\1", key) for key in keys} - {""}  # "hug" in "hugging"


def _stem(word: str) -> str:
    if len(word) > 5 and word.endswith("ing"):
        word = word[:-3]
    if len(word) > 2 and word[-1] == "s" and word[-2] != "s":
        word = word[:-1]
    return word[:-1] if len(word) > 3 and word[-1] == "e" else word
