"""Metrics without a wait per step: values stay on the device and are read once per log interval.

Files of a run folder written here: ``metrics.jsonl`` (one row per log interval, the mean over its steps), and
``failure.json`` when a loss was not finite or one spike too many. TensorBoard and others get the rows as
``loggers.Sink``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vjepa_fast.config.schema import OptimizationConfig
from vjepa_fast.errors import TrainingError, UserError
from vjepa_fast.files import append_line, read_rows, write_bytes, write_json
from vjepa_fast.metrics import hardware
from vjepa_fast.metrics.flops import Work
from vjepa_fast.trainer import peers, spikes
from vjepa_fast.trainer.distributed import Distributed
from vjepa_fast.trainer.loggers import Sink
from vjepa_fast.trainer.nonfinite import NonFiniteError, Skips
from vjepa_fast.trainer.step import StepOutput

_log = logging.getLogger("vjepa_fast")
MAX_NAMED = 16  # sample paths in an error message; all are in failure.json


@dataclass
class Pending:
    """Steps since the last row: ``values`` are device rows ``[loss, *terms, grad_norm]``, ``paths`` their samples."""

    values: list[Tensor] = field(default_factory=list[Tensor])
    steps: list[int] = field(default_factory=list[int])
    paths: list[list[str]] = field(default_factory=list[list[str]])
    spikes: list[Tensor] = field(default_factory=list[Tensor])  # `StepOutput.spike`, where the run skips those
    terms: list[str] = field(default_factory=list[str])
    monitors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    clips: int = 0
    work: Work = Work()
    counted: int = 0  # steps behind clips and work: those of this process, not of one that was interrupted


class Metrics:
    """Collects `StepOutput` and writes rows.

    Args:
        folder: the run folder; rows beyond ``resume_step`` are cut off, so that a resumed run has none twice.
        world: rows are means over its processes and written by the first.
        ipe: steps per epoch.
        resume_step: the step of the checkpoint that the run goes on from.
        sinks: where rows go besides; those of the first process count.
        device: whose memory the rows report.
        peak: FLOP/s per process, for MFU; None: not known.
        max_skips: steps that are not finite were skipped, and so many in a row are no error; None: each is an error.
        max_spikes: steps were skipped for their loss, and so many in all are no error; None: none was.
    """

    def __init__(
        self,
        folder: Path,
        *,
        world: Distributed,
        ipe: int,
        resume_step: int = 0,
        sinks: Sequence[Sink] = (),
        device: torch.device | str = "cpu",
        peak: float | None = None,
        max_skips: int | None = None,
        max_spikes: int | None = None,
    ):
        self.folder, self.world, self.ipe = folder, world, ipe
        self.device, self.peak = torch.device(device), peak
        self.path = folder / "metrics.jsonl"
        self.last_row: dict[str, Any] = {}
        self.pending = Pending()
        self.data_wait = self.save_wait = 0.0  # seconds of the interval
        self.since = time.perf_counter()
        self.sinks = list(sinks)
        self.skips, self.max_spikes = None if max_skips is None else Skips(max_skips), max_spikes
        if world.main:
            self.last_row = truncate_rows(self.path, resume_step)

    def waited(self, *, data: float, save: float) -> None:
        """Seconds that the host waited for clips, and training for checkpoints."""
        self.data_wait += data
        self.save_wait += save

    def record(self, step: int, out: StepOutput) -> None:
        """Take the output of the step that brought the count of finished steps to ``step``. Does not wait."""
        p = self.pending
        if not p.values:
            p.terms = list(out.terms)
        elif p.terms != list(out.terms):
            raise AssertionError("a plan reports the same terms at every step")
        p.values.append(torch.stack([v.float().reshape(()) for v in (out.loss, *out.terms.values(), out.grad_norm)]))
        if out.spike is not None:
            p.spikes.append(out.spike)
        p.steps.append(step)
        p.paths.append(out.paths)
        p.monitors.update(out.monitors)
        p.clips += out.clips
        p.work += out.work
        p.counted += 1

    def read(self) -> Tensor:
        """The pending values ``[n, 2 + terms]`` on the CPU (the one wait), averaged over processes and checked.

        Raises:
            TrainingError: one of them is not finite, and the step was not skipped, or too many in a row were, or too
                many in all for their loss; names the first such step, its terms and its samples.
        """
        peers.mark("log")
        values = self.world.mean(torch.stack(self.pending.values)).cpu()
        bad, many = ~torch.isfinite(values), None
        if self.skips is not None:
            skipped = self.skips.of(values)
            many = self.skips.too_many(skipped)
            bad &= ~skipped[:, None]
        over = None if self.max_spikes is None else spikes.first_over(self._seen(), self.max_spikes)
        first = int(bad.any(dim=1).nonzero()[0]) if bad.any() else None
        if found := [(row, n) for n, row in enumerate((many, first, over)) if row is not None]:
            row, reason = min(found)
            if reason == 2:
                self._fail_of_spikes(values, row)
            self._fail(values, row, too_many=reason == 0)
        return values

    def _seen(self) -> Tensor:
        """`Spikes.last` of the pending steps: [n, 3] on the CPU."""
        return torch.stack(self.pending.spikes).double().cpu()

    def _fail_of_spikes(self, values: Tensor, row: int) -> None:
        step, loss, seen = self.pending.steps[row], float(values[row, 0]), self._seen()[row]
        named = self._named(step, {"loss": str(loss), "bound": str(float(seen[1]))}, row)
        remedy = "lower optimization.lr, check these samples, or raise optimization.spike_std"
        raise TrainingError(f"{spikes.text(step, loss, seen)} ({self.max_spikes}); samples: {named}; {remedy}")

    def _named(self, step: int, found: Mapping[str, str], row: int) -> str:
        """The samples of a step that ends the run, of all processes; they are in failure.json then."""
        paths = [path for part in self.world.gather(self.pending.paths[row]) for path in part]
        if self.world.main:
            with contextlib.suppress(UserError):  # the loss is the news, not the disk
                report = {"step": step, "values": dict(found), "samples": paths}
                write_json(self.folder / "failure.json", report, parents=False)
        return ", ".join(paths[:MAX_NAMED]) + (f" and {len(paths) - MAX_NAMED} more" if len(paths) > MAX_NAMED else "")

    def _fail(self, values: Tensor, row: int, *, too_many: bool = False) -> None:
        p, step = self.pending, self.pending.steps[row]
        names = ["loss", *p.terms, "grad_norm"]
        found = {n: str(v) for n, v in zip(names, values[row].tolist()) if not math.isfinite(v)}
        named = self._named(step, found, row)
        where = self.world.gather(not bool(torch.isfinite(p.values[row][:-1]).all()))  # the norm is that of all
        terms = ", ".join(f"{k}={v}" for k, v in found.items())
        limit = self.skips.limit if self.skips is not None else 0
        what = (
            f"more than {limit} steps in a row were skipped (optimization.max_skips); samples: {named}"
            if too_many
            else f"samples: {named}; no checkpoint was written since"
        )
        text = f"step {step}: not finite: {terms}; {what}; "
        raise NonFiniteError(
            text + "lower optimization.lr, set optimization.clip_grad or check these samples",
            step,
            found,
            here=where[self.world.rank] if any(where) else self.world.main,
            last=bool(Skips.of(values[row:]).all()),
        )

    def flush(self, out: StepOutput) -> dict[str, Any]:
        """Write the row of the pending steps, the last of which gave ``out``; returns it. Where all were skipped they
        wait for the next row, and this is empty.
        """
        p = self.pending
        values = self.read().double()
        own: dict[str, Any] = {}
        skipped = spiked = torch.zeros(len(values), dtype=torch.bool)
        if self.skips is not None:
            skipped = self.skips.of(values)
            own["skipped"] = int(skipped.sum())
        if self.max_spikes is not None:
            spiked = self._seen()[:, 0] > 0
            own["spikes"] = int(spiked.sum())
        if (left_out := skipped | spiked).all():
            return {}
        if self.skips is not None:
            self.skips.before = self.skips.after(skipped)
        mean = values[~left_out].mean(dim=0).tolist()
        clips, work = self._together(p)
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        memory = hardware.peak_memory(self.device)
        row = {
            "step": p.steps[-1],
            "epoch": (p.steps[-1] - 1) // self.ipe,
            "loss": mean[0],
            "terms": dict(zip(p.terms, mean[1:-1])),
            "weights": {k: float(v) for k, v in out.weights.items()},
            "lr": out.lr,
            "wd": out.weight_decay,
            "ema": out.momentum,
            "grad_norm": mean[-1],
            "clips_per_s": round(clips / elapsed, 3),
            "tokens_per_s": round(work.tokens / elapsed, 1),
            # of the steps since the last row, as the rates around it
            "step_flops": round(work.flops / p.counted) if p.counted else None,
            "mfu": round(p.work.flops / elapsed / self.peak, 4) if self.peak else None,
            "peak_memory_mb": None if memory is None else round(memory / 1e6, 1),
            "data_wait": round(self.data_wait / elapsed, 4),
            "save_wait": round(self.save_wait / elapsed, 4),
            "monitors": {k: v if math.isfinite(v) else None for k, v in _read(p.monitors).items()},
            **own,
        }
        self.pending, self.data_wait, self.save_wait, self.since = Pending(), 0.0, 0.0, time.perf_counter()
        self.last_row = row
        if self.world.main:
            hint = "free space and start again, training resumes from the last checkpoint"
            append_line(self.path, json.dumps(row), hint)
            for sink in self.sinks:
                sink.log(p.steps[-1], flatten(row))
        return row

    def _together(self, p: Pending) -> tuple[float, Work]:
        """Clips and work of all processes; with ``img_data.rank_ratio`` they read different numbers."""
        parts = self.world.gather((p.clips, p.work))
        return sum(clips for clips, _ in parts) / self.world.world, sum((work for _, work in parts), Work())

    def state_dict(self) -> dict[str, Any]:
        """The pending steps, so that the row of an interrupted interval comes out as in an uninterrupted run.

        Raises:
            TrainingError: one of them is not finite, so there is nothing worth saving.
        """
        p = self.pending
        state: dict[str, Any] = {
            "steps": list(p.steps),
            "terms": list(p.terms),
            "values": self.read() if p.values else torch.zeros(0, 0),
            "monitors": {k: torch.tensor(v) for k, v in _read(p.monitors).items()},
        }
        if self.skips is not None:
            state["skipped"] = self.skips.before
        if self.max_spikes is not None:
            state["spikes"] = self._seen() if p.values else torch.zeros(0, 3, dtype=torch.float64)
        return state

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over what `state_dict` returned."""
        n = len(state["steps"])
        seen: Tensor = state.get("spikes", torch.zeros(n, 3))
        if self.skips is not None:
            self.skips.before = int(state.get("skipped", 0))
        self.pending = Pending(
            values=list(state["values"].to(device)),
            steps=list(state["steps"]),
            paths=[[] for _ in range(n)],
            spikes=[] if self.max_spikes is None else list(seen.to(device, spikes.dtype_on(device))),
            terms=list(state["terms"]),
            monitors={k: v.to(device) for k, v in state["monitors"].items()},
        )

    def close(self) -> None:
        """Close the sinks."""
        for sink in self.sinks:
            sink.close()


def limits(cfg: OptimizationConfig) -> dict[str, int | None]:
    """``max_skips`` and ``max_spikes`` of `Metrics`; None for what is no reason to skip a step."""
    return {
        "max_skips": cfg.max_skips if cfg.on_nonfinite == "skip" else None,
        "max_spikes": cfg.max_spikes if cfg.spike_std is not None else None,
    }


def _read(values: dict[str, Tensor]) -> dict[str, float]:
    """0-d tensors as numbers, in one copy."""
    return dict(zip(values, torch.stack([v.float() for v in values.values()]).tolist())) if values else {}


def truncate_rows(path: Path, step: int) -> dict[str, Any]:
    """Drop the rows beyond ``step`` and a last line cut short; returns the last row kept (empty if none).

    Lines that are no rows are left out with a warning; the file as it was is then ``metrics.jsonl.damaged``.
    """
    if not path.exists():
        return {}
    found, damaged = read_rows(path)
    found, strange = [x for x in found if is_row(x[1])], [x for x in found if not is_row(x[1])]
    before = path.read_bytes()
    if damaged or strange:
        lines = before.split(b"\n")
        numbers = sorted({*damaged, *(lines.index(line.rstrip(b"\n")) + 1 for line, _ in strange)})
        aside = path.with_name(path.name + ".damaged")
        write_bytes(aside, before)
        named = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        _log.warning("warning: %s: no rows in line %s: left out (as it was: %s)", path, named, aside.name)
    kept = [(line, row) for line, row in found if row["step"] <= step]
    if (text := b"".join(line for line, _ in kept)) != before:
        write_bytes(path, text)
    return kept[-1][1] if kept else {}


def is_row(row: Mapping[str, Any]) -> bool:
    """Whether an object is a row of metrics.jsonl."""
    step = row.get("step")
    return isinstance(step, int) and not isinstance(step, bool) and isinstance(row.get("loss"), (int, float))


def flatten(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested names joined with ``/``; values that are finite numbers."""
    out: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            out.update(flatten(value, f"{prefix}{key}/"))
        elif key != "step" and value is not None and math.isfinite(value):
            out[prefix + key] = value
    return out
