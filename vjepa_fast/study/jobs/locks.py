"""A file that one process at a time holds, among all that see the folder, on one machine or several.

A holder touches its file while it works. A lock that was not touched for ``STALE`` seconds, or whose process on this
machine is gone, is taken over.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from pathlib import Path

BEAT = 15.0  # seconds between touches of a lock
STALE = 180.0  # seconds without a touch after which a lock is taken over


class Lock:
    """``path``, held by at most one process; `take` returns whether it is this one.

    ``lost`` becomes true when another process took the lock over, after this one was held up for ``stale`` seconds.
    """

    def __init__(self, path: str | os.PathLike, stale: float = STALE):
        self.path, self.stale = Path(path), stale
        self.token = uuid.uuid4().hex
        self.lost = False
        self._done = threading.Event()

    def take(self) -> bool:
        """Create the lock, or take over a stale one; False where another process holds it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self._create(self.path):
            if not self._abandoned(self.path):
                return False
            # of several that see it abandoned one may remove it, and looks again first
            steal = self.path.with_suffix(".steal")
            if not self._create(steal):
                if self._abandoned(steal):
                    steal.unlink(missing_ok=True)
                return False
            try:
                if self._abandoned(self.path):
                    self.path.unlink(missing_ok=True)
                if not self._create(self.path):
                    return False
            finally:
                steal.unlink(missing_ok=True)
        self._done.clear()
        self.lost = False
        threading.Thread(target=self._beat, daemon=True).start()
        return True

    def release(self) -> None:
        """Give the lock back; one that another process took over stays that process's."""
        self._done.set()
        if self._mine():
            self.path.unlink(missing_ok=True)

    def _create(self, path: Path) -> bool:
        try:
            with open(path, "x") as file:
                json.dump({"token": self.token, "pid": os.getpid(), **_place()}, file)
            return True
        except FileExistsError:
            return False

    def _read(self, path: Path) -> dict:
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            return {}

    def _mine(self) -> bool:
        return self._read(self.path).get("token") == self.token

    def _abandoned(self, path: Path) -> bool:
        held = self._read(path)
        if held and all(held.get(k) == v for k, v in _place().items()) and not _alive(held.get("pid")):
            return True
        try:
            return self._now() - path.stat().st_mtime > self.stale
        except FileNotFoundError:
            return False  # released meanwhile: the next look takes it

    def _now(self) -> float:
        """The file server's time, since clocks of machines differ."""
        probe = self.path.with_name(f".{self.token}.now")
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink(missing_ok=True)
        return now

    def _beat(self) -> None:
        while not self._done.wait(min(BEAT, self.stale / 4)):
            if not self._mine():
                self.lost = not self._done.is_set()
                return
            try:
                os.utime(self.path)
            except OSError:
                continue


def _place() -> dict:
    """This machine, and the process namespace in which process numbers mean something."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return {"host": socket.gethostname(), "namespace": space}


def _alive(pid: object) -> bool:
    try:
        os.kill(int(str(pid)), 0)
    except PermissionError:  # another user's
        return True
    except (ProcessLookupError, ValueError):
        return False
    return True
