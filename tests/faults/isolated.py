"""A function in a process of its own, with limits on its time and memory: what a hostile file costs before refusal."""

import json
import os
import resource
from collections.abc import Callable

from vjepa_fast.errors import UserError


def outcome(read: Callable[[], object], megabytes: int = 600, seconds: int = 10) -> str:
    """``read``; ``refused: <text>``; or what went wrong: another exception, or the process's end by a limit.

    Args:
        read: called in a fork of this process.
        megabytes: address space that it may take beyond what the process has.
        seconds: of the CPU's time.
    """
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = "ended early"
        try:
            used = resource.getrusage(resource.RUSAGE_SELF)
            limit = int(used.ru_utime + used.ru_stime) + seconds + 1
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            with open("/proc/self/statm") as file:
                room = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + megabytes * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (room, room))
            said = _said(read)
        finally:
            os.write(theirs, json.dumps(said[:4000]).encode())
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        content = pipe.read()
    status = os.waitpid(pid, 0)[1]
    return json.loads(content) if content else f"killed by signal {status & 0x7F}"


def _said(read: Callable[[], object]) -> str:
    try:
        read()
    except UserError as error:
        return f"refused: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "read"
