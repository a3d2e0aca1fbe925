"""What a study asks before it runs: has every suite that it evaluates on passed the instrument check?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vjepa_fast.data.synthetic import suite_values
from vjepa_fast.errors import UserError
from vjepa_fast.files import write_json
from vjepa_fast.study.instrument.check import FILE, Setting, read_check, run_check

PACKAGED = Path(__file__).parent / "data" / FILE  # the check of the suites and the encoder that come with the package


def known(folder: str | Path, names: Iterable[str], setting: Setting) -> dict:
    """A check of those suites of ``names`` that were checked with this setting, in ``folder`` or with the package; as
    ``instrument.json`` has it, of no suites where there is none.
    """
    paths = [p for p in (Path(folder) / FILE, PACKAGED) if p.is_file()]
    found, wanted = {"suites": {}, "rows": []}, setting.values()
    for check in map(read_check, paths):
        if any(check.get(key) != value for key, value in wanted.items()):
            continue
        for name in names:
            entry = check["suites"].get(name)
            if entry and name not in found["suites"] and entry["parameters"] == suite_values(name):
                found = merged(found, check, [name])
    return found


def merged(first: Mapping[str, Any], second: Mapping[str, Any], names: Iterable[str]) -> dict:
    """``first`` with the suites ``names`` of ``second``, which has been measured with the same setting."""
    names = set(names)
    suites = {**first["suites"], **{name: second["suites"][name] for name in names}}
    rows = [row for row in first["rows"] if row["suite"] not in names]
    rows += [row for row in second["rows"] if row["suite"] in names]
    return {**second, "suites": suites, "rows": rows}


def gate(
    folder: str | Path, names: Sequence[str], setting: Setting, force: bool, say: Callable[[str], None]
) -> list[str]:
    """Check the suites that have no check of this setting, and write ``folder/instrument.json``.

    With ``force`` nothing is measured and nothing refused: returns the suites that failed or have no check.

    Raises:
        UserError: without ``force``, for suites that failed; says why.
    """
    found = known(folder, names, setting)
    lacking = [name for name in names if name not in found["suites"]]
    if lacking and not force:
        say(f"instrument check of {', '.join(lacking)}: no result for these parameters yet; it is made first")
        found = merged(found, run_check(folder, lacking, setting, say), lacking)
    if found["suites"]:
        write_json(Path(folder) / FILE, found, "free space and run the study again")
    failed = [name for name in names if not found["suites"].get(name, {"passed": False})["passed"]]
    if failed and not force:
        reasons = [f"{name}: {reason}" for name in failed for reason in found["suites"][name]["reasons"]]
        raise UserError(
            f"{Path(folder) / FILE}: suites that cannot tell good encoders from bad ones: {'; '.join(reasons)}. "
            "Leave them out (--evaluate), change them and validate again, or run all the same with --force"
        )
    return failed
