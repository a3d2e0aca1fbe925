"""Which checkpoint a run goes on from: the newest that is whole."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from vjepa_fast.errors import CheckpointError
from vjepa_fast.models.digests import DamagedError
from vjepa_fast.trainer import checkpoint
from vjepa_fast.trainer.distributed import Distributed

ASIDE = ".damaged"  # appended to the name of a checkpoint that could not be used


def find(
    folder: Path, resume: bool | str | Path, world: Distributed, fallback: bool = True
) -> tuple[Path | None, dict[str, Any] | None, list[str]]:
    """(checkpoint, its content, notes for the user); None, None where a run starts anew.

    Args:
        folder: the run folder, which this run holds.
        resume: True: the newest of ``folder``, if any; a path: that checkpoint, or the newest of that run folder.
        world: the first process looks, the others read what it found.
        fallback: where the newest of a folder is damaged take the one before; those that are damaged get `ASIDE` put
            after their names, in ``folder``. False: that is an error.

    Raises:
        CheckpointError: there is none that can be used.
    """
    if resume is False:
        return None, None, []
    source = folder if resume is True else Path(resume)
    found, content, notes, error = None, None, list[str](), None
    if world.main:
        try:
            found, content, notes = _first_whole(source, fallback, optional=resume is True, own=source == folder)
        except CheckpointError as e:
            error = e
    world.agree(error)
    found = world.gather(found)[0]
    if found is not None and not world.main:
        try:
            content = checkpoint.load(found)
        except CheckpointError as e:
            error = e
    world.agree(error)
    return found, content, notes


def _first_whole(
    source: Path, fallback: bool, optional: bool, own: bool
) -> tuple[Path | None, dict[str, Any] | None, list[str]]:
    candidates = checkpoint.all_in(source)[::-1] if source.is_dir() or optional else []
    if not candidates:
        return (None, None, []) if optional else (source, checkpoint.load(source), [])
    notes: list[str] = []
    damaged: list[DamagedError] = []
    for path in candidates:
        try:
            content = checkpoint.load(path)
        except DamagedError as error:
            damaged.append(error)
            if not fallback:
                raise
            continue
        for bad, reason in zip(candidates, damaged):
            aside = _set_aside(bad) if own else bad
            notes.append(f"warning: {reason}: taken is {path.name}" + (f"; kept as {aside.name}" if own else ""))
        return path, content, notes
    rest = f"; nor can the {len(damaged) - 1} before it be used" if len(damaged) > 1 else ""
    raise CheckpointError(f"{damaged[0]}{rest}; --no-resume starts anew")


def _set_aside(path: Path) -> Path:
    """So that it is neither taken for the newest nor counted among those that are kept."""
    aside = path.with_name(path.name + ASIDE)
    with suppress(OSError):
        path.replace(aside)
    return aside
