"""A file that one process at a time holds, among all that see the folder, on one machine or several.

The file says who holds it: host, boot, process number and start. A holder touches its file while it works. A lock is
taken over where its process on this machine is gone, or where it is of another machine (or of this one before it was
started anew) and was not touched for ``STALE`` seconds. A process of this machine that lives keeps its lock, however
long it is held up.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from vjepa_fast.errors import UserError
from vjepa_fast.files import parse_json

BEAT = 15.0  # seconds between touches of a lock
STALE = 180.0  # seconds without a touch after which a lock is taken over
_held: set[str] = set()  # tokens of the locks that this process holds


class Lock:
    """``path``, held by at most one process; `take` returns whether it is this one.

    Attributes:
        lost: another process took the lock over, after this one was held up for ``stale`` seconds.
        holder: who holds it, or held it, where `take` found it held; in words.
        taken_over: whose lock `take` took over; empty where it was free.
    """

    def __init__(self, path: str | os.PathLike[str], stale: float = STALE):
        self.path, self.stale = Path(path), stale
        self.token = uuid.uuid4().hex
        self.lost = False
        self.holder = self.taken_over = ""
        self._done = threading.Event()

    def take(self) -> bool:
        """Create the lock, or take over a stale one; False where another process holds it.

        Raises:
            UserError: the folder cannot be written.
        """
        _held.add(self.token)  # before the file says so
        try:
            if not self._take():
                _held.discard(self.token)
                return False
        except OSError as error:
            _held.discard(self.token)
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); choose another folder") from error
        self._done.clear()
        self.lost = False
        threading.Thread(target=self._beat, daemon=True).start()
        return True

    def _take(self) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.taken_over = ""
        if self._create(self.path) or self.mine():
            return True
        self.holder = self._who()
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
        self.taken_over = self.holder
        return True

    def release(self) -> None:
        """Give the lock back; one that another process took over stays that process's."""
        self._done.set()
        _held.discard(self.token)
        if self.mine():
            with suppress(OSError):
                self.path.unlink(missing_ok=True)

    def mine(self) -> bool:
        """Whether the file is there and is this lock's."""
        return self._read(self.path).get("token") == self.token

    def _create(self, path: Path) -> bool:
        """Whether this call made the file; it appears with its content."""
        own = {"token": self.token, "pid": os.getpid(), "born": born(os.getpid()), "since": time.time()}
        own |= {**place(), **_whereabouts(path)}
        temporary = path.with_name(f".{path.name}.{self.token}.tmp")
        try:
            temporary.write_text(json.dumps(own))
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            return _create_plain(path, json.dumps(own))
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            found = parse_json(path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _who(self) -> str:
        held = self._read(self.path)
        pid, host = str(held.get("pid", "unknown"))[:12], str(held.get("host", "unknown"))[:64]
        since = held.get("since")
        begun = time.strftime(", since %Y-%m-%d %H:%M", time.localtime(since)) if isinstance(since, float) else ""
        return f"process {' '.join(pid.split())} on {' '.join(host.split())}{begun}"

    def _abandoned(self, path: Path) -> bool:
        held = self._read(path)
        if held and all(held.get(k) == v for k, v in place().items()):
            here = _whereabouts(path)  # of a copied folder neither is the same
            copied = "folder" in held and held["folder"] != here["folder"] and held.get("inode") != here["inode"]
            given_up = held.get("pid") == os.getpid() and held.get("token") not in _held  # in a folder that moved
            return copied or given_up or not alive(held.get("pid"), held.get("born"))
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
            if not self.mine():
                self.lost = not self._done.is_set()
                return
            try:
                os.utime(self.path)
            except OSError:
                continue


def _create_plain(path: Path, text: str) -> bool:
    try:
        with open(path, "x") as file:
            file.write(text)
        return True
    except FileExistsError:
        return False


def _whereabouts(path: Path) -> dict[str, Any]:
    """Path and number of the folder that a lock is in."""
    return {"folder": str(path.parent.resolve()), "inode": path.parent.stat().st_ino}


def place() -> dict[str, Any]:
    """This machine since it was started, and the process namespace in which process numbers mean something."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return {"host": socket.gethostname(), "boot": boot, "namespace": space}


def born(pid: int) -> int | None:
    """When a process started, in ticks since the boot, so that a process number used again is not taken for it; None
    where it is not known. A process that has ended and was not waited for counts as none.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else int(rest[18])
    except (OSError, ValueError, IndexError):
        return None


def alive(pid: object, began: object = None) -> bool:
    """Whether the process ``pid`` of this machine that started at ``began`` (`born`; None: unknown) still runs."""
    try:
        number = int(str(pid))
    except ValueError:
        return False
    try:
        os.kill(number, 0)
    except PermissionError:  # another user's
        return began is None or born(number) in (None, began)
    except (ProcessLookupError, OverflowError):
        return False
    now = born(number)
    if now is None:
        return not Path("/proc/self/stat").exists()
    return began is None or now == began
