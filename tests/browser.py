"""Pages opened by a Chromium without a window, where there is one that works."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")


def browse(uri: str, *options: str, folder: Path, seconds: float = 120) -> tuple[str, str]:
    """What the browser writes to stdout and stderr for a page.

    Both are files: of a pipe there is no end while any of the browser's helpers has it, killed browser or not.

    Raises:
        subprocess.TimeoutExpired: it was not done after ``seconds``; it and its helpers are killed.
        subprocess.CalledProcessError: it failed.
    """
    command = [str(PROGRAM), *OPTIONS, f"--user-data-dir={folder / 'profile'}", *options, uri]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=folder, start_new_session=True)
        try:
            code = process.wait(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said = [os.pread(f.fileno(), os.fstat(f.fileno()).st_size, 0).decode(errors="replace") for f in (out, err)]
    if code:
        raise subprocess.CalledProcessError(code, command, *said)
    return said[0], said[1]


@functools.cache
def fault() -> str:
    """Why no page can be opened here; empty where one can be."""
    if PROGRAM is None:
        return "no chromium on PATH"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page = Path(folder) / "page.html"
        page.write_text("<body><script>document.body.textContent = 6 * 7</script></body>")
        try:
            found, said = browse(page.as_uri(), "--dump-dom", folder=Path(folder), seconds=60)
        except (OSError, subprocess.SubprocessError) as error:
            return f"{PROGRAM} does not open a page of one line: {error}"
    return "" if "42" in found else f"{PROGRAM} does not open a page of one line: {said[-300:]}"


def needed() -> None:
    """Skip the test, with the reason, where no page can be opened."""
    if fault():
        pytest.skip(fault())
