"""Shards that a command writes (``pipe:COMMAND``): it is run once, samples are read in any order from what it wrote."""

from __future__ import annotations

import hashlib
import logging
import subprocess
from pathlib import Path

from vjepa_fast.errors import DataError
from vjepa_fast.files import atomic_path

PREFIX = "pipe:"
FOLDER = "~/.cache/vjepa_fast/pipes"
_log = logging.getLogger("vjepa_fast.data")


def spooled(entry: str) -> str:
    """Path of the shard that the command of ``entry`` writes to its standard output.

    The command is run by the shell unless its output is here already; to have it run again, remove the file.

    Raises:
        DataError: the command fails, or writes nothing.
        UserError: the file cannot be written.
    """
    command = entry.removeprefix(PREFIX).strip()
    if not command:
        raise DataError(f"{entry}: names no command; give for example pipe:curl -fsS https://host/train-000000.tar")
    path = (
        Path(FOLDER).expanduser() / f"{hashlib.sha256(command.encode(errors='surrogateescape')).hexdigest()[:24]}.tar"
    )
    if path.is_file():
        return str(path)
    _log.info("%s: run once, what it writes is kept in %s", entry, path)
    with atomic_path(path, "free space, or copy the shards to another disk and name the files") as temporary:
        with open(temporary, "wb") as file:
            done = subprocess.run(command, shell=True, stdout=file, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        said = done.stderr.decode(errors="replace").strip().splitlines()
        if done.returncode or not temporary.stat().st_size:
            reason = f"ended with code {done.returncode}" if done.returncode else "wrote nothing"
            raise DataError(f"{entry}: the command {reason}{': ' + said[-1][:200] if said else ''}")
    return str(path)
