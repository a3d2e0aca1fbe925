"""Files that appear whole or not at all: written beside, fsynced, renamed. All that the package writes goes through it.

A temporary file is hidden and ends in ``.tmp`` (``.film.mp4.1234.tmp``), so that no scanner takes it for data.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from vjepa_fast.errors import UserError


@contextmanager
def atomic_path(
    path: str | Path, hint: str = "free space or choose another folder", sync: bool = True, parents: bool = True
) -> Iterator[Path]:
    """A temporary path to write to; it takes the place of ``path`` when the block ends, and goes when the block raises.

    For writers that want a name, not an open file. The folder is made, and those that it is in unless ``parents`` is
    False: then a folder that was moved away meanwhile is an error, and does not come back empty.

    Args:
        hint: what to do about it, for the error text.
        sync: False for one of many files that can be made again: a power cut may leave it empty, and writing takes a
            fraction of the time.

    Raises:
        UserError: the file cannot be written (read-only folder, full disk); nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=parents, exist_ok=True)
        yield temporary
        if sync:
            _sync(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a failed write as RuntimeError
        _remove(temporary)
        raise UserError(f"{path}: cannot be written ({_reason(error)}); {hint}") from error
    except BaseException:
        _remove(temporary)
        raise
    if sync:
        _sync_folder(path.parent)


@contextmanager
def atomic_entries(path: str | Path, hint: str = "free space or choose another folder") -> Iterator[Path]:
    """A path of the same name in a hidden folder; what is written there takes its place when the block ends.

    For what is a folder, or a file with others beside it: everything in the hidden folder moves beside ``path``, which
    comes last. It goes when the block raises.

    Raises:
        UserError: it cannot be written, or ``path`` is a folder that is not empty; nothing is left behind.
    """
    path = Path(path)
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True)
        yield folder / path.name
        for entry in folder.rglob("*"):
            _sync(entry)
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == path.name):
            os.replace(entry, path.parent / entry.name)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({_reason(error)}); {hint}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _sync_folder(path.parent)


@contextmanager
def atomic_file(
    path: str | Path,
    mode: str = "w",
    hint: str = "free space or choose another folder",
    newline: str = "\n",
    parents: bool = True,
) -> Iterator[IO]:
    """An open file that becomes ``path`` when the block ends, as with `atomic_path`. ``mode``: "w" (UTF-8) or "wb"."""
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": newline}
    with atomic_path(path, hint, parents=parents) as temporary, open(temporary, mode, **text) as f:
        yield f


def write_text(
    path: str | Path, text: str, hint: str = "free space or choose another folder", parents: bool = True
) -> None:
    """Write ``text`` as UTF-8 with line ends as they are."""
    with atomic_file(path, "w", hint, newline="", parents=parents) as f:
        f.write(text)


def write_bytes(path: str | Path, blob: bytes, hint: str = "free space or choose another folder") -> None:
    """Write ``blob``."""
    with atomic_file(path, "wb", hint) as f:
        f.write(blob)


def write_json(
    path: str | Path,
    value: Any,
    hint: str = "free space or choose another folder",
    parents: bool = True,
    **options: Any,
) -> None:
    """Write ``value`` as JSON with a line end; ``options`` go to ``json.dumps`` (default: ``indent=1``)."""
    write_text(path, json.dumps(value, **{"indent": 1, **options}) + "\n", hint, parents)


def append_line(path: str | Path, line: str, hint: str = "free space or choose another folder") -> None:
    """Add ``line`` and a line end to a file, all of it or nothing, and flush it. The folder must be there.

    Raises:
        UserError: it cannot be written; the file is as it was.
    """
    path, blob = Path(path), (line + "\n").encode()
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(fd).st_size
            try:
                if os.write(fd, blob) != len(blob):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(fd)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(fd, size)
                raise
        finally:
            os.close(fd)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); {hint}") from error


def read_rows(path: str | Path) -> tuple[list[tuple[bytes, dict[str, Any]]], list[int]]:
    """(lines with the object that each holds, numbers from 1 of damaged lines) of a file with a JSON object per line.

    A last line without line end was cut short by a kill and is left out; it does not count as damaged. UserError where
    the file cannot be read.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    rows: list[tuple[bytes, dict[str, Any]]] = []
    damaged: list[int] = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append((line + b"\n", row))
        else:
            damaged.append(number)
    return rows, damaged


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. ValueError where it is none, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("lists or objects nested too deeply") from None


def read_json(path: str | Path, remedy: str = "remove it, what can be made again is made again") -> Any:
    """The value in a JSON file.

    Raises:
        UserError: it cannot be read or is no JSON; one line with ``remedy``.
    """
    try:
        return parse_json(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({first_line(error)}); {remedy}") from None


def check_stored(path: str | Path) -> None:
    """Look at the directory of a zip file whose entries should be stored as they are, and at nothing else of it.

    Raises:
        zipfile.BadZipFile: it is none, or its entries are compressed, or larger than the file: what one reads of it may
            then be of any size.
        OSError: it cannot be read.
    """
    import zipfile

    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    size = os.path.getsize(path)
    packed = next((e for e in entries if e.compress_type != zipfile.ZIP_STORED or e.file_size != e.compress_size), None)
    if packed is not None:
        raise zipfile.BadZipFile(f"{packed.filename[:80]} is compressed; it would take {packed.file_size} bytes")
    if (claimed := sum(entry.file_size for entry in entries)) > size:
        raise zipfile.BadZipFile(f"its entries claim {claimed} bytes, the file has {size}")


def _remove(path: Path) -> None:
    with suppress(OSError):  # the folder itself may be the trouble
        path.unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return f"the file could not be completed: is the disk full? {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 120 characters; its type's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; not every system can fsync a folder."""
    with suppress(OSError):
        _sync(folder)
