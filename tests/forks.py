"""Python processes as forks of one that has imported what they need, which takes longer than most of them last.

`Forked` and `run` are used as `subprocess.Popen` and `subprocess.run` with ``text=True`` and output to read. Hash seeds
are the same in all forks of a test process, so a test of what differs by them has to start Python itself.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
_server: tuple[subprocess.Popen, socket.socket] | None = None


class Forked:
    """A process that runs ``arguments`` as ``python`` would: ``-c code ...`` or ``-m module ...``."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None):
        self.args = arguments
        self.stdout, self.stderr = (tempfile.TemporaryFile("w+", errors="replace") for _ in range(2))  # noqa: SIM115
        mine, theirs = socket.socketpair()
        asked = {"arguments": [str(a) for a in arguments], "env": dict(os.environ if env is None else env)}
        asked["cwd"] = os.getcwd()
        with theirs, tempfile.TemporaryFile("w+") as file:  # an environment may be longer than a message
            json.dump(asked, file)
            file.flush()
            fds = [f.fileno() for f in (file, self.stdout, self.stderr, theirs)]
            socket.send_fds(_connection(), [b"."], fds)
        self._socket, number = mine, b""
        while not number.endswith(b"\n"):  # and no more, as what follows is the exit code
            number += mine.recv(1) or b"\n"
        self.pid = int(number)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._socket.settimeout(1e-6 if timeout is not None and timeout <= 0 else timeout)
            try:
                line = self._socket.recv(100)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(list(self.args), timeout or 0.0) from None
            self.returncode = int(line)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.said(self.stdout), self.said(self.stderr)

    def said(self, file) -> str:
        """All that was written so far to ``self.stdout`` or ``self.stderr``."""
        return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(*arguments: str, env: dict[str, str] | None = None, timeout: float = 300) -> subprocess.CompletedProcess:
    """`Forked`, and wait for its end; one that takes longer than ``timeout`` is killed."""
    process = Forked(*arguments, env=env)
    try:
        out, err = process.communicate(timeout)
    except BaseException:
        process.kill()
        raise
    return subprocess.CompletedProcess(list(arguments), process.returncode or 0, out, err)


def _connection() -> socket.socket:
    global _server
    if _server is None or _server[0].poll() is not None:
        mine, theirs = socket.socketpair()
        with theirs:
            path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
            command = [sys.executable, "-m", "tests.forks", str(theirs.fileno())]
            process = subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        _server = process, mine
        atexit.register(mine.close)  # its end
    return _server[1]


def _serve(connection: socket.socket) -> None:
    import gc

    import torch
    import torch._dynamo  # every optimiser imports it
    import torch.distributed.fsdp
    import torch.distributed.tensor
    import torch.utils.serialization

    import vjepa_fast.cli.train
    import vjepa_fast.data.decoders
    import vjepa_fast.data.synthetic
    import vjepa_fast.trainer.trainer  # noqa: F401

    torch.set_num_threads(1)
    with torch.device("meta"):
        torch.nn.init.trunc_normal_(torch.nn.Linear(2, 2).weight)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, lambda *_: _reap())
    while True:
        message, fds, *_ = socket.recv_fds(connection, 1, 4)
        if not message:
            return
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            connection.close()
            _mind(*fds)
        for fd in fds:
            os.close(fd)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _mind(asked: int, out: int, err: int, status: int) -> None:
    """Fork the process asked for, say its number, wait, and say its exit code."""
    pid = os.fork()
    if pid == 0:
        os.close(status)
        request = json.loads(os.pread(asked, os.fstat(asked).st_size, 0))
        os.dup2(out, 1)
        os.dup2(err, 2)
        for fd in (asked, out, err):
            os.close(fd)
        os._exit(_child(**request))
    os.write(status, f"{pid}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):  # nobody waits for it any more
        os.write(status, str(code).encode())
    os._exit(0)


def _child(arguments: list[str], env: dict[str, str], cwd: str) -> int:
    import runpy
    import types

    code: object = 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    paths = env.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [cwd, *(p for p in paths if p and p not in sys.path)]
    how, what, *rest = arguments
    try:
        if how == "-m":
            sys.argv = [what, *rest]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.argv = ["-c", *rest]
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(compile(what, "<string>", "exec"), main.__dict__)
    except SystemExit as error:
        code = error.code
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        sys.stderr.flush()
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    with contextlib.suppress(BaseException):
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code or 0)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
