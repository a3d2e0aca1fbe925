"""``vjepa-fast study``: its subcommands are the modules ``_study_<name>`` beside this one.

Each has ``HELP``, ``add_arguments(parser)`` and ``run(args) -> int``, as a command has, and is listed if it is there.
"""

from __future__ import annotations

import importlib
import pkgutil
from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import ModuleType

HELP = "objectives compared over seeds: run them, report them, check published claims"

_PREFIX, _ORDER = "_study_", ("run", "report", "claims")
_found = [
    m.name.removeprefix(_PREFIX)
    for m in pkgutil.iter_modules([str(Path(__file__).parent)])
    if m.name.startswith(_PREFIX)
]
SUBCOMMANDS = sorted(_found, key=lambda n: (n not in _ORDER, *_ORDER, n).index(n))


def add_arguments(parser: ArgumentParser) -> None:
    """Add the subcommands."""
    commands = parser.add_subparsers(
        dest="study_command", required=True, metavar=f"{{{','.join(SUBCOMMANDS)}}}", parser_class=type(parser)
    )
    for name in SUBCOMMANDS:
        module = _module(name)
        module.add_arguments(
            commands.add_parser(name, help=module.HELP, description=module.HELP, formatter_class=parser.formatter_class)
        )


def run(args: Namespace) -> int:
    """Run the subcommand."""
    return _module(args.study_command).run(args)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{_PREFIX}{name}")
