"""Preparing a data set: its lists are read, its files looked at, copied if asked, and manifests written.

OUT/train.csv, ...       manifests: <path> <label>; absolute paths, but for files below OUT
OUT/train.frames, ...    frame indices of the videos
OUT/train.info.jsonl     one object per line of the list: codec, width, height, frames, fps, gop, status, ...
OUT/classes.json         class names in the order of the labels (<part>_classes.json where parts have their own)
OUT/quarantine.jsonl     what is missing or cannot be used, with the reason and the line of the list
OUT/prepare.json         the numbers of the report
OUT/h264-8fps-256px-q20  copies, one folder for each form; sources.json there: size and time of what was copied
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from vjepa_fast.data.decoders.index_cache import INDICES
from vjepa_fast.data.manifests.manifest import quoted
from vjepa_fast.data.media import ReadOptions, is_image_path
from vjepa_fast.data.prepare.api import DATA_SETS, Listed, Listing, Request
from vjepa_fast.data.prepare.copy import CopyForm, CopyTask, is_made, make_copy, state
from vjepa_fast.data.prepare.inspect import Facts, inspect
from vjepa_fast.data.processes import each
from vjepa_fast.errors import DataError
from vjepa_fast.files import write_bytes, write_json, write_text

_HINT = "choose another folder with --out"
_STATES = "sources.json"  # beside the copies of one form
_SPARE = 0.95  # share of the free disk that copies may take
_COLUMNS = ("codec", "width", "height", "frames", "fps", "constant", "gop", "bytes")  # of the info files
Progress = Callable[[str, int, int], None]  # what is done, how many are done, how many there are


@dataclass
class Report:
    """What was prepared.

    Attributes:
        out: the folder. parts: name -> manifest, samples, missing, bad, classes.
        files, missing, bad: numbers of files found, of names without a file, and of files that cannot be used.
        hours: of the videos in the manifests, each file counted once. classes: how many there are.
        codecs: "codec width x height" -> number of files, the most frequent first.
        copied_bytes: of all copies. notes: what a user should know.
    """

    out: str
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: int = 0
    missing: int = 0
    bad: int = 0
    hours: float = 0.0
    classes: int = 0
    codecs: dict[str, int] = field(default_factory=dict)
    copied_bytes: int = 0
    notes: list[str] = field(default_factory=list)


def prepare(
    name: str,
    request: Request,
    *,
    form: CopyForm | None = None,
    workers: int = 1,
    full: bool = False,
    options: ReadOptions | None = None,
    on_progress: Progress | None = None,
) -> Report:
    """Prepare a data set.

    Files that are missing or cannot be used are left out of the manifests and listed in quarantine.jsonl. What an
    earlier call left in ``request.out`` is used: frame indices, and finished copies.

    Args:
        name: one of `DATA_SETS`.
        request: where its files and lists are, and where to write.
        form: of the copies; None: no copies.
        workers: processes.
        full: decode every frame of every file.
        options: how files are read, and limits.
        on_progress: called as files are done.

    Raises:
        ConfigError: there is no such data set, or it has no such split.
        DataError: a list is missing or wrong, or none of its files can be used.
        UserError: something cannot be written, or the disk has too little room for the copies.
    """
    data_set = DATA_SETS.get_named(name, "prepare")()
    listing = data_set.read(request)
    report = Report(str(request.out), notes=list(listing.notes))
    _check(listing, request, report)
    manifests = {part: request.out / f"{part}.csv" for part in listing.parts}
    for manifest in manifests.values():
        INDICES.use(manifest)
    found = sorted({s.path for part in listing.parts.values() for s in part if s.path is not None})
    work = _Work(workers, full, options or ReadOptions(), on_progress or (lambda what, done, total: None))
    try:
        if form is None:
            files = {path: (path, facts) for path, facts in work.look_at(found).items()}
        else:
            files = work.copy(found, request, form)
            report.copied_bytes = sum(facts.bytes for path, facts in files.values() if not facts.problem)
    except BaseException:
        _keep_indices(listing, manifests)
        raise
    _write(listing, files, manifests, report, request.out)
    return report


# ---------------------------------------------------------------- lists


def _check(listing: Listing, request: Request, report: Report) -> None:
    """Refuse files in two parts of one split or under two labels, and keep one of equal lines."""
    repeated = 0
    splits: dict[str, dict[str, tuple[str, Listed]]] = {}  # of one split: real path -> part, sample
    for part, samples in listing.parts.items():
        seen = splits.setdefault(re.sub(r"\D", "", part), {})
        kept = []
        for sample in samples:
            real = sample.name if sample.path is None else os.path.realpath(sample.path)
            earlier = seen.setdefault(real, (part, sample))
            if earlier[1] is sample:
                kept.append(sample)
            elif earlier[0] != part:
                raise DataError(
                    f"{sample.where}: {sample.name} is in {earlier[0]} as well ({earlier[1].where}); take one line out"
                )
            elif earlier[1].label != sample.label:
                raise DataError(
                    f"{sample.where}: {sample.name} has label {sample.label}, but {earlier[1].label} at "
                    f"{earlier[1].where}; take one line out"
                )
            else:
                repeated += 1
        listing.parts[part] = kept
    if request.known and list(request.known) != listing.classes:
        report.notes.append("the classes are not those of the evaluation task; leave --task of probe out")
    if repeated:
        report.notes.append(f"{repeated} lines repeat a file and are left out")
    everything = [sample for part in listing.parts.values() for sample in part]
    if everything and all(sample.path is None for sample in everything):
        first = everything[0]
        raise DataError(
            f"{first.where}: {first.name} is {first.problem}, and neither is any other of the {len(everything)} files; "
            "name the folder that holds the unpacked files"
        )
    for part, samples in listing.parts.items():
        images = sum(is_image_path(s.path) for s in samples if s.path is not None)
        videos = sum(s.path is not None for s in samples) - images
        if images and videos:
            raise DataError(f"{request.source}: {part} holds {videos} videos and {images} images; part them by folder")


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class _Work:
    """How files are looked at and copied: arguments of `prepare`."""

    workers: int
    full: bool
    options: ReadOptions
    progress: Progress

    def look_at(self, paths: list[str]) -> dict[str, Facts]:
        """Path -> what it is. A file whose index is known is not read again."""
        job = partial(inspect, full=self.full, options=self.options)
        facts = {path: job(path) for path in paths if not self.full and INDICES.known(path) is not None}
        rest = [path for path in paths if path not in facts]
        for path, seen in each(job, rest, self.workers):
            facts[path] = _kept(path, seen or _crashed(path))
            self.progress("looking at files", len(facts), len(paths))
        return facts

    def copy(self, paths: list[str], request: Request, form: CopyForm) -> dict[str, tuple[str, Facts]]:
        """Source -> its copy and what that is; or the source itself and why there is no copy."""
        if images := [path for path in paths if is_image_path(path)]:
            raise DataError(f"{images[0]}: is an image, and images are not copied; leave --convert out")
        folder = request.out / form.folder
        tasks = [CopyTask(path, target) for path, target in _targets(paths, request, folder, form.suffix).items()]
        known = _states(folder)
        made = [task for task in tasks if is_made(task, known.get(_name(str(task.target), folder)))]
        seen = self.look_at([str(task.target) for task in made])
        copies = {t.source: (str(t.target), seen[str(t.target)]) for t in made if not seen[str(t.target)].problem}
        waiting = [task for task in tasks if task.source not in copies]
        sources = self.look_at([task.source for task in waiting])
        reasons = {path: form.objection(path, facts) for path, facts in sources.items()}
        bad = {path: (path, Facts(problem=reason)) for path, reason in reasons.items() if reason}
        waiting = [task for task in waiting if task.source not in bad]
        known |= {_name(str(task.target), folder): state(task.source) for task in waiting}
        self._check_room(folder, sum(form.estimate(sources[task.source]) for task in waiting), len(waiting))
        for task, facts in each(partial(make_copy, form=form, options=self.options), waiting, self.workers):
            target = str(task.target)
            copies[task.source] = target, _kept(target, facts or _crashed(task.source))
            self.progress("copying", len(copies) + len(bad), len(tasks))
        write_json(folder / _STATES, known)
        return copies | bad

    def _check_room(self, folder: Path, need: int, copies: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        self.progress(f"{copies} copies will take about {need / 1e9:.1f} GB of {free / 1e9:.0f} GB free", 0, 0)
        if need > _SPARE * free:
            raise DataError(
                f"{folder}: the copies of {copies} videos take about {need / 1e9:.1f} GB, but {free / 1e9:.1f} GB "
                "are free; choose another disk with --out, a lower --fps or a smaller --short-side"
            )


def _states(folder: Path) -> dict[str, list[int]]:
    """Copy -> size and time of its source when it was made, as far as they were written down."""
    try:
        found = json.loads((folder / _STATES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _kept(path: str, facts: Facts) -> Facts:
    """With its index in the cache, instead of in memory for good."""
    if facts.index is not None:
        INDICES.put(path, facts.index)
    return replace(facts, index=None)


def _crashed(path: str) -> Facts:
    return Facts(problem=f"{path}: reading it ended the process (a crash, or not enough memory)")


def _targets(paths: list[str], request: Request, folder: Path, suffix: str) -> dict[str, Path]:
    """Where the copy of each file goes: as below the source, with the old suffix where two differ in it alone."""
    source, folder = request.source, folder.absolute()
    roots = [os.path.abspath(root) for root in (source if source.is_dir() else source.parent, request.out)]
    below: dict[str, str] = {}
    for path in paths:
        root = next((root for root in roots if path.startswith(root + os.sep)), None)
        below[path] = os.path.relpath(path, root) if root else os.path.join("outside", *Path(path).parts[1:])
    stems = {path: os.path.splitext(relative)[0] for path, relative in below.items()}
    count = Counter(stems.values())
    return {path: folder / ((stem if count[stem] == 1 else below[path]) + suffix) for path, stem in stems.items()}


# ---------------------------------------------------------------- what is written


def _write(
    listing: Listing, files: dict[str, tuple[str, Facts]], manifests: dict[str, Path], report: Report, out: Path
) -> None:
    quarantine: list[dict[str, Any]] = []
    used: dict[str, Facts] = {}
    for part, samples in listing.parts.items():
        lines, info = [], []
        for sample in samples:
            path, facts = files[sample.path] if sample.path is not None else ("", Facts(problem=sample.problem))
            row = _row(sample, path, facts)
            info.append(row)
            if row["status"] == "ok":
                lines.append(f"{quoted(_name(path, out))} {sample.label}\n")
                used[path] = facts
            else:
                quarantine.append({"part": part, **row})
        status = Counter(row["status"] for row in info)
        if not lines:
            manifests[part].unlink(missing_ok=True)  # of an earlier run
            report.notes.append(f"{part}: none of its {len(samples)} files can be used, so there is no manifest of it")
            continue
        labels, names = {row["label"] for row in info if row["status"] == "ok"}, listing.classes_of(part)
        if len(labels) < len(names):
            report.notes.append(f"{part}: {len(names) - len(labels)} of {len(names)} classes have no sample")
        write_bytes(manifests[part], "".join(lines).encode(errors="surrogateescape"), _HINT)
        _write_rows(out / f"{part}.info.jsonl", info)
        facts = {"samples": len(lines), "missing": status["missing"], "bad": status["bad"], "classes": len(labels)}
        report.parts[part] = {"manifest": str(manifests[part]), **facts}
    _write_rows(out / "quarantine.jsonl", quarantine)
    if not used:
        first = quarantine[0]["reason"] if quarantine else "the lists name none"
        raise DataError(f"{out / 'quarantine.jsonl'}: none of the files can be used; the first: {first}")
    _keep_indices(listing, manifests, files)
    for name, names in listing.class_files().items():
        write_json(out / name, names, _HINT)
    report.files, report.hours = len(files), sum(facts.seconds for facts in used.values()) / 3600
    report.missing = len({row["name"] for row in quarantine if row["status"] == "missing"})
    report.bad = len({row["path"] for row in quarantine if row["status"] == "bad"})
    report.classes = max(map(len, listing.class_files().values()))
    report.codecs = dict(Counter(f"{f.codec} {f.width} x {f.height}" for f in used.values()).most_common())
    write_json(out / "prepare.json", asdict(report), _HINT)


def _row(sample: Listed, path: str, facts: Facts) -> dict[str, Any]:
    """A line of the info file."""
    problem = facts.problem
    if not problem and ("\n" in path or "\r" in path):
        problem = f"{path!r}: a path with a line break cannot be in a manifest; rename it"
    status = "missing" if sample.path is None else "bad" if problem else "ok"
    row = {"path": path, "label": sample.label, "status": status, "where": sample.where}
    if problem:
        return row | {"name": sample.name, "reason": problem}
    known = {name: getattr(facts, name) for name in _COLUMNS}
    source = {"source": sample.path} if path != sample.path else {}
    return row | known | {"seconds": round(facts.seconds, 3)} | source


def _keep_indices(
    listing: Listing, manifests: dict[str, Path], files: Mapping[str, tuple[str, Facts]] | None = None
) -> None:
    """Write the frame indices that there are beside the manifests: of ``files``, or of the listed files themselves."""
    for part, samples in listing.parts.items():
        listed = [sample.path for sample in samples if sample.path is not None]
        paths = [files[path][0] for path in listed] if files is not None else listed
        if any(INDICES.known(path) is not None for path in paths):
            INDICES.save(manifests[part], paths)


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows), _HINT)


def _name(path: str, out: Path) -> str:
    """As the manifest names a file: relative below ``out``, so that the folder can move; else absolute."""
    root = os.path.abspath(out)
    return os.path.relpath(path, root) if path.startswith(root + os.sep) else path
