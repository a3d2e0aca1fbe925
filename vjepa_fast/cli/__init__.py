"""The command line: ``vjepa-fast COMMAND``.

Each module in this package is a command: ``HELP`` (one line), ``add_arguments(parser)`` and ``run(args) -> int``. The
modules import the standard library only, so that ``--help`` answers at once; torch comes with the first real work.

Exit codes: 0 done, 1 done in part (a study or a benchmark, some rows of which have errors), 2 wrong input (one line
``error: ...`` on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import errno
import gc
import importlib
import os
import pkgutil
import sys

from vjepa_fast.cli._interrupt import leave_imports_at_once
from vjepa_fast.errors import UserError, printable
from vjepa_fast.registry import suggestion

_ORDER = ("demo", "train", "show", "features", "probe", "fewshot", "geometry", "export", "study")
_ORDER += ("synthetic", "data", "prepare", "config", "bench")
_found = {m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")}
COMMANDS = {name: f"{__name__}.{name}" for name in sorted(_found, key=lambda n: (n not in _ORDER, *_ORDER, n).index(n))}

# An operating system error with one of these is about the folder or disk the user named, not a defect.
_USER_ERRNO = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOENT,
    errno.ENAMETOOLONG,
}

_LONGEST_ERROR = 2000  # characters

# What is no defect either, by the name of its class.
_OF_THE_MACHINE = {
    "BrokenProcessPool": "a worker process was killed, perhaps for want of memory; use fewer workers, or start again",
    "MemoryError": "out of memory; use fewer workers or smaller batches",
    "SafetensorError": "a safetensors file is damaged ({}); remove it, what can be made again is made again",
}
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


class _Usage(UserError):
    """Wrong command line."""


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str):
        raise _Usage(f"{message}; see `{self.prog} --help`")


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _log_to_stderr()
    leave_imports_at_once()
    try:
        return _run(sys.argv[1:] if argv is None else list(argv)) or 0
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        gc.freeze()  # what a step left goes with the process; freeing it piece by piece takes seconds
        return 130
    except BrokenPipeError:  # `vjepa-fast config show NAME | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _USER_ERRNO:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror}")
    except Exception as error:
        name = type(error).__name__  # their modules are not imported for it
        if any(words in str(error) for words in _NO_MEMORY):  # torch's allocator raises RuntimeError
            name = "MemoryError"
        if name not in _OF_THE_MACHINE:
            raise
        return _fail(_OF_THE_MACHINE[name].format(error))


def _run(argv: list[str]) -> int:
    if not argv or argv[0].startswith("-"):
        parser = _top_parser()
        parser.parse_args(argv)  # --help and --version leave here
        parser.print_help()
        return 0
    name = argv[0]
    if name not in COMMANDS:
        raise _Usage(f"{name}: unknown command; commands: {', '.join(COMMANDS)}{suggestion(name, COMMANDS)}")
    command = importlib.import_module(COMMANDS[name])
    parser = _Parser(
        prog=f"vjepa-fast {name}", description=command.HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_arguments(parser)
    return command.run(parser.parse_args(argv[1:]))


def _top_parser() -> _Parser:
    from vjepa_fast import __version__

    lines = [f"  {name:<11}{importlib.import_module(module).HELP}" for name, module in COMMANDS.items()]
    parser = _Parser(
        prog="vjepa-fast",
        usage="vjepa-fast [--version] COMMAND ...",
        description="Video-JEPA pretraining, frozen evaluation and few-shot recognition.",
        epilog="commands:\n" + "\n".join(lines) + "\n\n`vjepa-fast COMMAND --help` lists the options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vjepa-fast {__version__}")
    return parser


def _fail(message: str) -> int:
    """Print the error on one line, of what it quotes from files only what can be shown."""
    text = " ".join(message.split())
    text = text if len(text) <= _LONGEST_ERROR else f"{text[: _LONGEST_ERROR - 200]} ... {text[-200:]}"
    print(f"error: {printable(text)}", file=sys.stderr)
    return 2


def _log_to_stderr() -> None:
    import logging

    class _Shown(logging.Formatter):
        """Messages without the control characters of names in them."""

        def format(self, record: logging.LogRecord) -> str:
            return printable(super().format(record), keep="\n\t")

    log = logging.getLogger("vjepa_fast")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(_Shown("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
