"""Files inside .tar shards, which are read in place: a member's path says in which bytes of which shard it lies.

Such a path is ``SHARD[OFFSET+SIZE]/NAME``, for example ``/data/train-000000.tar[1536+40022]/00001.mp4``; after the size
may follow what is wrong with the sample, one of `FLAWS`: ``[1536+40022 unlabelled]``. SHARD is a path that ends in
.tar, or a URL that fsspec opens.
"""

from __future__ import annotations

import functools
import io
import os
import re
import threading
from dataclasses import dataclass
from typing import IO, Any

from vjepa_fast.errors import DataError

FLAWS = {
    "unlabelled": "has no .cls or .json with a label",
    "mislabelled": "its .cls or .json holds no label, a whole number from 0 on",
    "damaged": "the shard is damaged from here on; fetch it anew",
    "cut": "the shard ends here, before its end mark; fetch it anew",
    "foreign": "is no .tar file, or a compressed one; unpack it or fetch it anew",
}
_SCHEME = r"[a-z][a-z0-9+.-]+(?:::[^:]*)*://"
_URL = re.compile(_SCHEME, re.IGNORECASE)
_PATH = re.compile(
    rf"(.+\.tar|{_SCHEME}.+)\[([0-9]+)\+([0-9]+)(?: ({'|'.join(FLAWS)}))?\]/(.*)", re.DOTALL | re.IGNORECASE
)
_last = threading.local()  # what this thread fetched last: an index is made and a clip read of it


@dataclass(frozen=True)
class Member:
    """Bytes ``offset`` to ``offset + size`` of a shard; ``flaw``: why they are of no use, a key of `FLAWS` or empty."""

    shard: str
    offset: int
    size: int
    name: str
    flaw: str = ""

    @property
    def path(self) -> str:
        """As a path, which `member_of` reads."""
        return f"{self.shard}[{self.offset}+{self.size}{self.flaw and f' {self.flaw}'}]/{self.name}"


def member_of(path: str) -> Member | None:
    """The member that a path means; None for a file of its own."""
    if (found := _PATH.fullmatch(path)) is None:
        return None
    shard, offset, size, flaw, name = found.groups()
    return Member(shard, int(offset), int(size), name, flaw or "")


def names_shards(text: str) -> bool:
    """Whether an entry of ``data.datasets`` means shards: ``.tar`` files, a pattern of them, a URL or a pipe."""
    return text.endswith(".tar") or text.startswith("pipe:") or is_url(text)


def is_url(text: str) -> bool:
    """Whether a shard is to be opened by fsspec."""
    return _URL.match(text) is not None


def stat_of(path: str) -> tuple[int, int]:
    """Size in bytes, and modification time in ns, of a file or of a member (the shard's time; 0 behind a URL).

    Raises:
        OSError: it cannot be found, or the shard ends before the member does.
    """
    member = member_of(path)
    if member is None:
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    if is_url(member.shard):
        return member.size, 0
    stat = os.stat(member.shard)
    if member.offset + member.size > stat.st_size:
        raise OSError(f"the shard ends within this file, after {stat.st_size} bytes; fetch it anew")
    return member.size, stat.st_mtime_ns


def read_bytes(path: str) -> bytes:
    """The content of a file or of a member. OSError if it cannot be read."""
    member = member_of(path)
    if member is None:
        with open(path, "rb") as file:
            return file.read()
    if is_url(member.shard):
        return _fetch(member)
    with open(member.shard, "rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def open_file(path: str) -> IO[bytes]:
    """A file, or the content of a member, to read from. OSError if it cannot be read."""
    return open(path, "rb") if member_of(path) is None else io.BytesIO(read_bytes(path))


def _fetch(member: Member) -> bytes:
    if getattr(_last, "member", None) == member:
        return _last.content
    try:
        system, inside = remote(member.shard)
        content = system.cat_file(inside, start=member.offset, end=member.offset + member.size)
    except Exception as error:  # of whichever library is behind the URL
        raise OSError(f"cannot be fetched ({type(error).__name__}: {' '.join(str(error).split())[:200]})") from None
    if len(content) > member.size:
        raise OSError(
            f"{len(content)} bytes came for {member.size}: its server sends whole files; copy the shards here"
        )
    if len(content) != member.size:
        raise OSError(f"{len(content)} of {member.size} bytes came; the shard has changed or ends early")
    _last.member, _last.content = member, content
    return content


@functools.lru_cache(maxsize=4096)
def remote(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it, by fsspec.

    Raises:
        DataError: fsspec or a library that it needs for this kind of URL is missing, or the URL is no use.
    """
    try:
        import fsspec
    except ImportError:
        raise DataError(f"{url}: URLs need fsspec (pip install fsspec)") from None
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: cannot be opened ({' '.join(str(error).split())})") from None


def ffmpeg_name(path: str) -> str:
    """What FFmpeg opens for a path: bytes of a shard through its subfile protocol."""
    member = member_of(path)
    if member is None:
        return path
    return f"subfile,,start,{member.offset},end,{member.offset + member.size},,:{member.shard}"
