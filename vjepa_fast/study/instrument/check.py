"""The check of a suite: its controls are trained and read, one after the other, and each leaves a record.

A stopped check goes on with the control at which it stopped. Records are
``<folder>/instrument/<suite>-<control>.json``, the whole is ``<folder>/instrument.json``.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vjepa_fast.data.synthetic import SUITES, suite_values
from vjepa_fast.errors import UserError
from vjepa_fast.files import parse_json, write_json
from vjepa_fast.study.instrument.clips import rendered
from vjepa_fast.study.instrument.limits import verdict
from vjepa_fast.study.instrument.read import POOLING, How, suite_rows
from vjepa_fast.study.instrument.supervised import Schedule, train_with_labels

if TYPE_CHECKING:
    from vjepa_fast.config import Config
    from vjepa_fast.evaluation import ClipSet
    from vjepa_fast.models.vit import VisionTransformer

FORMAT = 1
FILE = "instrument.json"


@dataclass(frozen=True)
class Setting:
    """What the suites of a check are seen with: rendered ``size`` in pixels, ``view`` (num_frames, crop_size,
    frame_step), and the configuration whose encoder is trained. ``seed``: of clips, weights and episodes. ``device``:
    that it is measured on.
    """

    size: int
    view: Mapping[str, int]
    config: Config
    seed: int = 0
    device: str = "cpu"

    @property
    def encoder(self) -> dict[str, int | str]:
        """The size of the encoder and how its weights are drawn, as ``instrument.json`` has it."""
        from vjepa_fast.evaluation import random_encoder

        made = random_encoder(self.config)
        names = ("patch_size", "tubelet_size", "embed_dim", "num_heads", "levels")
        return {**{k: getattr(made, k) for k in names}, "depth": len(made.blocks), "init": self.config.model.init}

    def values(self) -> dict[str, Any]:
        """What two checks must share to be of the same instrument, besides a suite's parameters."""
        return {"size": self.size, "view": dict(self.view), "encoder": self.encoder}


@dataclass(frozen=True)
class Design:
    """What the controls of a suite are given: labelled clips, the schedule, at which step the half-trained one stops,
    and the clips that are read by part.
    """

    clips: int
    schedule: Schedule
    half: int
    read: Mapping[str, int]

    def values(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"clips": self.clips, **asdict(self.schedule), "half": self.half, "read": dict(self.read)}


_PROBED = Design(5400, Schedule(), 150, {"train": 1200, "val": 480, "test": 960})
DESIGNS = {  # of the others: _PROBED
    "dive": replace(_PROBED, schedule=Schedule(steps=400, keep=1.0), half=100),
    "fewshot": replace(_PROBED, read={"train": 1080, "val": 720, "test": 1440}),  # 20 of each of its many novel classes
}


def design_of(name: str) -> Design:
    """The design of a suite's controls."""
    return DESIGNS.get(name, _PROBED)


class Controls:
    """The controls of one suite; clips are rendered once, when first asked for."""

    def __init__(self, name: str, setting: Setting, design: Design):
        self.name, self.setting, self.design = name, setting, design

    @functools.cached_property
    def read(self) -> dict[str, ClipSet]:
        """The clips that every control is read on, by part."""
        return {part: self._clips(part, number, 1) for part, number in self.design.read.items()}

    @functools.cached_property
    def labelled(self) -> ClipSet:
        """The clips that the supervised encoder is trained on; none of them is read."""
        return self._clips("train", self.design.clips, 0)

    @property
    def factors(self) -> np.ndarray:
        """The labels of `labelled`, int64 ``[n, factors]``: classes that are combinations are learned by what they
        are composed of.
        """
        return np.array(SUITES[self.name].factors)[self.labelled.labels]

    def _clips(self, part: str, number: int, stream: int) -> ClipSet:
        return rendered(self.name, part, number, self.setting.size, self.setting.view, 2 * self.setting.seed + stream)

    def supervised(self, say: Callable[[str], None]) -> list[dict]:
        """The encoder trained with labels, and the same one as it was after ``half`` steps."""
        return self._trained(("supervised", "half"), self.factors, self.design.schedule, say)

    def shuffled(self, say: Callable[[str], None]) -> list[dict]:
        """An encoder trained for ``half`` steps with the labels of other clips."""
        labels = np.random.default_rng(self.setting.seed).permutation(self.factors)
        return self._trained(("shuffled",), labels, replace(self.design.schedule, steps=self.design.half), say)

    def random(self, say: Callable[[str], None]) -> list[dict]:
        """The weights that runs start from."""
        from vjepa_fast.evaluation import random_encoder

        return self._rows("random", random_encoder(self.setting.config).to(self.setting.device))

    def pixels(self, say: Callable[[str], None]) -> list[dict]:
        """The clips themselves."""
        return self._rows("pixels", "pixels")

    def _rows(self, control: str, encoder: VisionTransformer | str) -> list[dict]:
        how = How(probes=("linear",), queries=10, seed=self.setting.seed, where={"batch_size": 64})
        rows = suite_rows(control, control, self.name, encoder, self.read, SUITES[self.name].few_shot, how)
        return [
            {
                "suite": self.name,
                "encoder": control,
                "outcome": row.probe,
                **{k: round(getattr(row, k), 4) for k in ("accuracy", "low", "high", "chance")},
                "n": row.n,
                "readout": row.chosen.get("name", f"linear probe of {POOLING if control != 'pixels' else 'pixels'}"),
            }
            for row in rows
        ]

    def _trained(
        self, names: tuple[str, ...], labels: np.ndarray, schedule: Schedule, say: Callable[[str], None]
    ) -> list[dict]:
        from vjepa_fast.evaluation import random_encoder

        encoder = random_encoder(self.setting.config).to(self.setting.device)

        def on_step(step: int, loss: float) -> None:
            if step % 100 == 0 or step == schedule.steps:
                say(f"{self.name}: {names[0]}, step {step} of {schedule.steps}, loss {loss:.2f}")

        half = train_with_labels(
            encoder,
            self.labelled.clips,
            labels,
            schedule,
            seed=self.setting.seed,
            snapshot=self.design.half if len(names) > 1 else None,
            on_step=on_step,
        )
        trained = [encoder] if half is None else [encoder, half]
        return [row for name, made in zip(names, trained, strict=True) for row in self._rows(name, made)]


def check_suite(folder: Path, name: str, setting: Setting, say: Callable[[str], None]) -> tuple[dict, list[dict]]:
    """(entry, rows) of one suite in ``instrument.json``; what has a record in ``folder`` is not measured again."""
    design, rows, seconds = design_of(name), list[dict](), 0.0
    controls = Controls(name, setting, design)
    identity = {"parameters": suite_values(name), **setting.values(), "seed": setting.seed, "training": design.values()}
    for control in ("supervised", "shuffled", "random", "pixels"):
        path = folder / "instrument" / f"{name}-{control}.json"
        record = _record(path, identity)
        if record is None:
            start = time.process_time()
            record = {"identity": identity, "rows": getattr(controls, control)(say)}
            record["seconds"] = round(time.process_time() - start, 1)
            write_json(path, record, "free space and check again")
        rows += record["rows"]
        seconds += record["seconds"]
    kind = "fewshot" if SUITES[name].few_shot else "probe"
    judged = verdict(kind, rows)
    entry = {
        "kind": kind,
        "parameters": identity["parameters"],
        "passed": judged.passed,
        "reasons": list(judged.reasons),
        "notes": list(judged.notes),
        "training": design.values(),
        "seconds": round(seconds, 1),
    }
    return entry, rows


def run_check(
    folder: str | Path, names: Iterable[str], setting: Setting, say: Callable[[str], None] = lambda text: None
) -> dict:
    """The whole check of the suites ``names``, as ``instrument.json`` has it; suites that pass or fail alike are in it.

    Raises UserError where ``folder`` cannot be written.
    """
    from vjepa_fast import __version__

    suites, rows = {}, []
    for name in names:
        suites[name], more = check_suite(Path(folder), name, setting, say)
        rows += more
        say(f"{name}: {'passed' if suites[name]['passed'] else 'FAILED: ' + '; '.join(suites[name]['reasons'])}")
    return {
        "format": FORMAT,
        "package": __version__,
        "seed": setting.seed,
        **setting.values(),
        "suites": suites,
        "rows": rows,
    }


def read_check(path: str | Path) -> dict:
    """A finished check. Raises UserError where there is none, or it is not of this format."""
    try:
        found = parse_json(Path(path).read_text(encoding="utf-8"))
        if found["format"] != FORMAT or not isinstance(found["suites"], dict):
            raise KeyError("format")
        return found
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `vjepa-fast study validate` writes it") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is no instrument check of format {FORMAT}; remove it and validate again") from None


def _record(path: Path, identity: dict) -> dict | None:
    try:
        found = parse_json(path.read_text())
        return found if found["identity"] == json.loads(json.dumps(identity)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
