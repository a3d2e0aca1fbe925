"""WebDataset shards as a data set: .tar files that hold the files of each sample after one another, under one key.

``00001.mp4`` and ``00001.cls`` (or ``.json``) are a sample. Where its bytes lie is looked up once and kept beside each
shard (of a URL: in a folder of the user), so that samples are read in any order.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import math
import os
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from typing import IO, Any

from vjepa_fast.data.manifests.pipes import PREFIX, spooled
from vjepa_fast.data.manifests.root import Root
from vjepa_fast.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, one_line, suffix_of
from vjepa_fast.data.members import Member, is_url, names_shards, remote
from vjepa_fast.errors import DataError, UserError
from vjepa_fast.files import parse_json, write_json

LABELS = (".cls", ".json")
_LARGEST_LABEL_FILE = 1_000_000  # bytes
_MOST = 1_000_000  # shards of an entry
_THREADS = 8
_MANY = 20  # shards without an index from which on a run says that it makes them
_REMOTE = "~/.cache/vjepa_fast/shards"
_BESIDE = ".samples.json"  # after the name of a shard
_FORMAT = 1  # of the files that are kept
_log = logging.getLogger("vjepa_fast.data")

Stamp = list[int | str]
Sample = tuple[str, int, int, int, str]  # name, offset, size, label, flaw; as `Member`


def read_shards(entry: str, root: Root | None = None) -> tuple[list[str], list[int]]:
    """Paths (of members) and labels of all samples of an entry of ``data.datasets``, in the order of the shards.

    ``entry`` is a .tar file, a pattern (``{000000..000099}``, ``{a,b}``, ``*``), a URL, a command (``pipe:...``,
    `pipes.spooled`), or a text file of such lines, commands and URLs excepted. Samples without a label, and what
    cannot be read of a shard, are listed with their flaw; where no sample has a label, all get 0, which is enough for
    pretraining. ``root``: where they may lie.

    Raises:
        DataError: a shard is missing, or there is none, or a command that writes one fails.
    """
    shards = _shards(entry)
    if root is not None:
        root.check(shards, entry)
    missing = [shard for shard in shards if not is_url(shard) and not os.path.isfile(shard)]
    if missing:
        raise DataError(f"{entry}: {len(missing)} of {len(shards)} shards are missing, the first: {missing[0]}")
    if (new := sum(not _index_file(shard).is_file() for shard in shards)) >= _MANY:
        _log.info("%s: looking for the samples of %d shards; what is found is kept for the next time", entry, new)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(_samples, shards))
    members = [Member(shard, o, s, n, f) for shard, rows in zip(shards, found) for n, o, s, _, f in rows]
    if not members:
        raise DataError(f"{entry}: {len(shards)} shards without a video or image in them")
    if all(member.flaw == "unlabelled" for member in members if member.size):
        members = [replace(member, flaw="") if member.size else member for member in members]
    return [member.path for member in members], [label for rows in found for _, _, _, label, _ in rows]


def lists_shards(content: bytes) -> bool:
    """Whether a text file is a list of shards: its first line names one."""
    first = next((line for line in content[:10_000].decode(errors="replace").splitlines() if line.strip()), "")
    return names_shards(first.strip()) and not re.search(r"\s[0-9]+$", first.strip())


def _shards(entry: str) -> list[str]:
    """The shards that an entry means, in order."""
    if entry.startswith(PREFIX):
        return [spooled(command) for command in _expanded(entry, words=False)]
    if not names_shards(entry):
        lines = Path(entry).read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
        inside = [line.strip() for line in lines if line.strip()]
        if command := next((line for line in inside if line.startswith(PREFIX) or is_url(line)), None):
            what = "commands are not run from a file" if command.startswith(PREFIX) else "a file fetches nothing"
            raise DataError(
                f"{entry}: {command[:200]}: {what}; name it in data.datasets itself, or copy the shards here"
            )
        if other := next((line for line in inside if not names_shards(line)), None):
            raise DataError(f"{entry}: {other[:200]!r} names no .tar shard, as its first line does")
        folder = os.path.dirname(os.path.abspath(entry))
        return list(chain.from_iterable(_shards(os.path.join(folder, x)) for x in inside))
    shards = _expanded(entry)
    if not is_url(entry):
        shards = [os.path.abspath(shard) for shard in shards]
        if any(c in entry for c in "*?"):
            shards = sorted(chain.from_iterable(glob.glob(shard) for shard in shards))
        if not shards:
            raise DataError(f"{entry}: no shard fits this pattern")
    return shards


def _expanded(text: str, words: bool = True) -> list[str]:
    """``a{0..2}b{x,y}`` in full; spans of numbers alone without ``words``. DataError if there is too much of it."""
    pieces: list[list[str]] = []
    for number, piece in enumerate(re.split(r"\{([^{}]*)\}", text)):
        span = re.fullmatch(r"([0-9]{1,18})\.\.([0-9]{1,18})", piece)
        if number % 2 == 0:
            pieces.append([piece])
        elif span is None:
            pieces.append(piece.split(",") if words else [f"{{{piece}}}"])
        else:
            first, last = int(span[1]), int(span[2])
            if not 0 <= last - first < 1_000_000:
                raise DataError(f"{text}: {{{piece}}} must count up, to a million shards at most")
            pieces.append([str(i).zfill(len(span[1])) for i in range(first, last + 1)])
    if (count := math.prod(map(len, pieces))) > _MOST:
        raise DataError(f"{text[:200]}: stands for {count} shards; at most {_MOST} are read")
    return ["".join(parts) for parts in product(*pieces)]


def _samples(shard: str) -> list[Sample]:
    """The samples of a shard, from the file beside it or from the shard."""
    try:
        stamp = _stamp(shard)
        if (kept := _kept(shard, stamp)) is not None:
            return kept
        samples = _kept_beside(shard, stamp) if is_url(shard) else None
        if samples is None:
            file: Any = open(shard, "rb") if not is_url(shard) else remote(shard)[0].open(remote(shard)[1], "rb")  # noqa: SIM115
            with file:
                samples = _scan(file)
    except UserError:
        raise
    except Exception as error:  # of the system, or of the library behind a URL
        raise DataError(f"{shard}: cannot be read ({one_line(error)})") from None
    try:
        write_json(_index_file(shard), {"format": _FORMAT, "stamp": stamp, "samples": samples}, indent=None)
    except UserError:
        _log.info("%s: cannot be written; the shard is read again the next time", _index_file(shard))
    return samples


def _kept(shard: str, stamp: Stamp) -> list[Sample] | None:
    """What was kept of a shard, if it is the same."""
    try:
        return _parsed(_index_file(shard).read_bytes(), stamp)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _kept_beside(url: str, stamp: Stamp) -> list[Sample] | None:
    """What lies beside a shard behind a URL, put there with it; the sizes have to be the same."""
    try:
        system, inside = remote(url)
        return _parsed(system.cat_file(inside + _BESIDE), stamp[:1])
    except Exception:  # there is none, or no permission to look: whatever the library says, the shard is read
        return None


def _parsed(content: bytes, stamp: Stamp) -> list[Sample]:
    known = parse_json(content)
    if known["format"] != _FORMAT or known["stamp"][: len(stamp)] != stamp:
        raise ValueError("of another shard")
    return [(str(n), int(o), int(s), int(y), str(f)) for n, o, s, y, f in known["samples"]]


def _index_file(shard: str) -> Path:
    if not is_url(shard):
        return Path(shard + _BESIDE)
    return Path(_REMOTE).expanduser() / f"{hashlib.sha256(shard.encode()).hexdigest()[:24]}.json"


def _stamp(shard: str) -> Stamp:
    """Size, and what else changes with a shard's content."""
    if not is_url(shard):
        stat = os.stat(shard)
        return [stat.st_size, stat.st_mtime_ns]
    system, inside = remote(shard)
    info = system.info(inside)
    return [int(info.get("size") or -1), str(info.get("ETag") or info.get("etag") or info.get("mtime") or "")]


def _scan(file: IO[bytes]) -> list[Sample]:
    """The samples of an open shard, in order."""
    samples: list[Sample] = []
    group, parts = "", {}
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (the caller closes the file)
    except tarfile.TarError:
        return [("no samples", 0, 0, 0, "foreign")]
    flaw = ""
    try:
        for member in archive:
            folder, base = os.path.split(member.name)
            if not member.isreg() or base.startswith("."):
                continue
            key = os.path.join(folder, base.partition(".")[0])
            suffix = suffix_of(base)
            if key != group or suffix in parts:
                samples += _sample(parts)
                group, parts = key, {}
            content = b""
            if suffix in LABELS and member.size <= _LARGEST_LABEL_FILE:
                opened = archive.extractfile(member)
                content = b"" if opened is None else opened.read()
            parts[suffix] = member, content
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
            flaw = "damaged"
    except (tarfile.TarError, EOFError):
        flaw = "cut"
    samples += _sample(parts)
    if samples and samples[-1][1] + samples[-1][2] > file.seek(0, os.SEEK_END):
        samples[-1] = *samples[-1][:4], "cut"
    elif flaw:
        samples.append(("the rest of the shard", archive.offset, 0, 0, flaw))
    return samples


def _sample(parts: dict[str, tuple[tarfile.TarInfo, bytes]]) -> list[Sample]:
    """The sample of the files under one key, if there is a video or an image among them."""
    media = [member for kinds in (VIDEO_SUFFIXES, IMAGE_SUFFIXES) for s, (member, _) in parts.items() if s in kinds]
    if not media:
        return []
    label = next((value for s in LABELS if s in parts and (value := _label(s, parts[s][1])) is not None), None)
    given = any(s in parts for s in LABELS)
    flaw = "" if label is not None else "mislabelled" if given else "unlabelled"
    return [(media[0].name, media[0].offset_data, media[0].size, label or 0, flaw)]


def _label(suffix: str, content: bytes) -> int | None:
    """A whole number from 0 on: the text of a .cls file; of a .json file the value, or what it has as label."""
    try:
        value = parse_json(content.decode("utf-8-sig"))
    except ValueError:
        return None
    if suffix == ".json" and isinstance(value, dict):
        value = next((value[k] for k in ("label", "cls", "class") if k in value), None)
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    return value if type(value) is int and 0 <= value < 2**31 else None
