"""Tables of what is registered of each kind, in the pages between ``<!-- table: KIND -->`` and ``<!-- end -->``, and of
the keys of a section of a recipe, between ``<!-- keys: SECTION -->`` and ``<!-- end -->``.

    python docs/tables.py            # after something was registered, or its description changed
    python docs/tables.py --check    # changes nothing; exit code 1 and the names of pages that are out of date

Only what comes with the package is listed; plugins of the environment are not.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vjepa_fast.config import Config
from vjepa_fast.registry import registry_of

PAGES = Path(__file__).resolve().parent
TABLE = re.compile(r"(<!-- (table|keys): ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
FIELD = re.compile(r"^    (\w+): .*  # (.+)$", re.MULTILINE)


def what(entry: Any) -> str:
    """First sentence of an entry's docstring, on one line."""
    return sentence(entry if inspect.isclass(entry) else type(entry))


def needs(backend: Any) -> str:
    """What a backend of attention declares that it needs."""
    if not backend.cuda:
        return "nothing"
    multiple, most = backend.head_dims
    words = [f"CUDA, compute capability {'.'.join(map(str, backend.capability))}"]
    words += [" or ".join(str(d).removeprefix("torch.") for d in backend.dtypes)] if backend.dtypes else []
    heads = ([f"in multiples of {multiple}"] if multiple > 1 else []) + ([f"up to {most}"] if most else [])
    return ", ".join(words + ([f"channels of a head {' '.join(heads)}"] if heads else []))


def yes(flag: bool) -> str:
    """A flag as a cell."""
    return "yes" if flag else "no"


def sentence(thing: object) -> str:
    """First sentence of a docstring."""
    text = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    return re.split(r"\. (?=[A-Z])", text)[0].rstrip(".:")


def defaults(entry: Any) -> str:
    """Fields of a dataclass with their defaults, as code."""
    values = {f.name: f.default for f in dataclasses.fields(entry)}
    return options({name: value for name, value in values.items() if (name, value) != ("coeff", 1.0)})


def options(values: dict[str, Any]) -> str:
    """A mapping of defaults, as code; ``-`` where there is none."""
    return ", ".join(f"`{name}: {yaml(value)}`" for name, value in values.items()) or "-"


def yaml(value: Any) -> str:
    """A default as one writes it in a recipe."""
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(yaml, value)) + "]"
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    return "..." if dataclasses.is_dataclass(value) else str(value)


def lasting(task: Any) -> str:
    """Frames, step and views of an evaluation task."""
    frames = "as trained" if task.num_frames is None else f"{task.num_frames} every {task.frame_step or 1}"
    return f"{frames}, {task.clips} x {task.crops}"


# Kind -> heading of a column -> its cell for (name, entry). The first column is the name.
COLUMNS: dict[str, dict[str, Callable[[Any], object]]] = {
    "objective": {"is": what, "fields": defaults, "access": lambda e: e.access, "gradient to": lambda e: e.gradient_to},
    "mask strategy": {"is": what, "`masks.options`": lambda e: options(e.OPTIONS)},
    "decoder": {"is": what},
    "data set": {
        "reads": what,
        "unpacked": lambda e: e.unpacked,
        "splits": lambda e: e.splits or "-",
        "task": lambda e: f"`{e.task}`" if e.task else "-",
    },
    "synthetic suite": {
        "is": what,
        "gives": lambda e: e.modality,
        "classes": lambda e: len(e.classes),
        "fields": defaults,
    },
    "attention backend": {
        "is": what,
        "kernels": lambda e: {"any": "torch's choice"}.get(e.implementation, e.implementation),
        "needs": needs,
        "capacity streams": lambda e: yes(e.on_device),
        "in a compiled graph": lambda e: "yes" if e.graph else "whole grids" if e.whole_graph else "no",
        "in a CUDA graph": lambda e: yes(e.capture),
        "plans per shape": lambda e: yes(e.plans),
        "block-causal": lambda e: yes(e.causal),
        "deterministic backward": lambda e: e.deterministic if e.backward else "none",
    },
    "probe": {"is": what, "reads": lambda e: e.needs},
    "evaluation task": {
        "is": lambda e: e.title,
        "classes": lambda e: e.classes,
        "frames, views": lasting,
        "attentive epochs": lambda e: e.epochs,
        "from": lambda e: "this package" if e.ours else "V-JEPA 2",
    },
}


BY_NAME = ("objective", "mask strategy", "data set", "probe")  # the others have an order of their own


def table(kind: str) -> str:
    """The table of a kind in Markdown; the order in which modules were imported does not show."""
    columns, entries = COLUMNS[kind], list(registry_of(kind).items())
    lines = [["name", *columns], ["---"] * (len(columns) + 1)]
    for name, entry in sorted(entries, key=lambda item: item[0]) if kind in BY_NAME else entries:
        if (entry if inspect.isclass(entry) else type(entry)).__module__.startswith("vjepa_fast."):
            cells = (str(cell(entry)).replace("|", "\\|") for cell in columns.values())
            lines.append([f"`{name}`", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def keys(section: str) -> str:
    """The keys of a section, their defaults and what the comments of ``config/schema.py`` say of them, in Markdown."""
    values = getattr(Config(), section)
    said = dict(FIELD.findall(inspect.getsource(type(values))))
    lines = ["| key | default | what |", "|---|---|---|"]
    for field in dataclasses.fields(values):
        lines.append(f"| `{field.name}` | `{yaml(getattr(values, field.name))}` | {said[field.name]} |")
    return "\n".join(lines)


def updated(page: str) -> str:
    """The text of a page with its tables as they should be."""
    makers = {"table": table, "keys": keys}
    return TABLE.sub(lambda m: f"{m[1]}{makers[m[2]](m[3])}\n{m[4]}", page)


def main() -> int:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="say what is out of date instead of writing it")
    args = parser.parse_args()
    stale = []
    for path in sorted(PAGES.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        new = updated(text)
        if new != text:
            stale.append(path.name)
            if not args.check:
                path.write_text(new, encoding="utf-8")
    for name in stale:
        print(f"docs/{name}: " + ("out of date; run python docs/tables.py" if args.check else "written"))
    return 1 if args.check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
