"""Files that appear whole or not at all: written beside, fsynced, renamed. All that the package writes goes through it.

A temporary file is hidden and ends in ``.tmp`` (``.film.mp4.1234.tmp``), so that no scanner takes it for data.
"""

from __future__ import annotations

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
    path: str | Path, hint: str = "free space or choose another folder", sync: bool = True
) -> Iterator[Path]:
    """A temporary path to write to; it takes the place of ``path`` when the block ends, and goes when the block raises.

    For writers that want a name, not an open file. The folder is made.

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
        path.parent.mkdir(parents=True, exist_ok=True)
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
    path: str | Path, mode: str = "w", hint: str = "free space or choose another folder", newline: str = "\n"
) -> Iterator[IO]:
    """An open file that becomes ``path`` when the block ends, as with `atomic_path`. ``mode``: "w" (UTF-8) or "wb"."""
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": newline}
    with atomic_path(path, hint) as temporary, open(temporary, mode, **text) as f:
        yield f


def write_text(path: str | Path, text: str, hint: str = "free space or choose another folder") -> None:
    """Write ``text`` as UTF-8 with line ends as they are."""
    with atomic_file(path, "w", hint, newline="") as f:
        f.write(text)


def write_bytes(path: str | Path, blob: bytes, hint: str = "free space or choose another folder") -> None:
    """Write ``blob``."""
    with atomic_file(path, "wb", hint) as f:
        f.write(blob)


def write_json(path: str | Path, value: Any, hint: str = "free space or choose another folder", **options: Any) -> None:
    """Write ``value`` as JSON with a line end; ``options`` go to ``json.dumps`` (default: ``indent=1``)."""
    write_text(path, json.dumps(value, **{"indent": 1, **options}) + "\n", hint)


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
