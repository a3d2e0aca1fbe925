"""The training loop: data in, steps made, rows and checkpoints out. It knows no objective by name.

A run folder holds ``config.yaml versions.json metrics.jsonl tensorboard/ checkpoints/``, what ``runtime.logger``
writes, ``bad_samples.jsonl`` if a sample could not be read, and ``failure.json`` if a loss was not finite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vjepa_fast import config as configs
from vjepa_fast.config.schema import Config
from vjepa_fast.errors import TrainingError
from vjepa_fast.metrics import hardware
from vjepa_fast.metrics.profile import StepProfiler
from vjepa_fast.trainer import banner, checkpoint, passes, precision, preflight, restore, run_folder, starting, warm
from vjepa_fast.trainer.bundle import write_bundle
from vjepa_fast.trainer.distributed import Distributed
from vjepa_fast.trainer.loggers import open_sinks
from vjepa_fast.trainer.methods import METHODS
from vjepa_fast.trainer.metrics import Metrics, limits
from vjepa_fast.trainer.nonfinite import NonFiniteError
from vjepa_fast.trainer.peers import mark, together
from vjepa_fast.trainer.prefetch import Prefetcher
from vjepa_fast.trainer.progress import Progress
from vjepa_fast.trainer.saving import Saver
from vjepa_fast.trainer.signals import StepGivenUp, StopRequest, process_settings_kept
from vjepa_fast.trainer.step import StepOutput, resolve_device
from vjepa_fast.trainer.streams import open_streams, position
from vjepa_fast.trainer.watch import MakeProbe, Watch
from vjepa_fast.trainer.writer import RunLock


@dataclass(frozen=True)
class TrainResult:
    """What a run has come to."""

    folder: Path
    step: int  # optimiser steps made in all
    last_metrics: dict[str, Any]  # the last row of metrics.jsonl
    checkpoint: Path


class Trainer:
    """One process of a run. Building it sets threads and seed, restores what `resume` names, and opens the data."""

    def __init__(
        self,
        cfg: Config,
        *,
        resume: bool | str | Path = True,
        device: str | None = None,
        fallback: bool = True,
        lock: RunLock | None = None,
        probe: MakeProbe | None = None,
    ):
        if device is not None:
            cfg = dataclasses.replace(cfg, runtime=dataclasses.replace(cfg.runtime, device=device))
        preflight.check(cfg := passes.resolve(cfg))
        self.cfg, run = cfg, cfg.runtime
        if run.threads:
            torch.set_num_threads(run.threads)
        self.device = resolve_device(run.device, Distributed.local_rank_from_env())
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.world = Distributed.from_env(self.device.type, run.timeout)
        self.folder, self.lock = Path(cfg.folder), lock or RunLock(cfg.folder)
        self.notes = self.lock.take(self.world)
        source, saved, notes = restore.find(self.folder, resume, self.world, fallback)
        self.notes += notes
        dtype, notes = precision.choose(cfg, self.device, self.world, saved)
        self.notes += notes
        with warm.ahead(cfg, self.device, dtype, self.notes):
            self.step = METHODS[cfg.method](cfg, device=self.device, dtype=dtype, world=self.world)
        self.done = int(saved["step"]) if saved is not None else 0
        self.notes += starting.take(cfg, self.step, saved)
        if saved is not None:
            self.step.load_state_dict(saved, source)
            checkpoint.set_rng_state(saved["rng"], self.device)
            changed = run_folder.changed_settings(saved["config"], configs.to_dict(cfg))
            self.notes.append(
                f"resuming {source} at step {self.done}" + (f"; changed since: {', '.join(changed)}" if changed else "")
            )
        peak = hardware.peak(self.device, dtype, run.peak_tflops)
        # before the first write: a missing manifest leaves no folder behind
        self.watch = Watch(cfg, probe, self.world, self.device)
        self.loaders, decoders, notes = open_streams(cfg, self.world, self.done, saved)
        self.notes += notes
        self.versions = {**run_folder.versions(self.device, dtype), "peak": peak.label, **decoders}
        run_folder.begin(cfg, self.versions, self.world, anew=resume is False)
        self.metrics = Metrics(
            self.folder,
            world=self.world,
            ipe=cfg.optimization.ipe,
            resume_step=self.done,
            sinks=open_sinks(cfg, self.world, self.done),
            device=self.device,
            peak=peak.flops,
            **limits(cfg.optimization),
        )
        if saved is not None:
            self.metrics.load_state_dict(saved["metrics"], self.device)
        self.saver = Saver(self.folder, self.world, self.lock, run, source if saved is not None else None)
        self.listed = 0  # unreadable samples in the list so far

    def run(
        self, max_steps: int | None = None, on_log: Callable[[dict[str, Any]], None] | None = None, profile: int = 0
    ) -> TrainResult:
        """Make the steps that are left, see `train`."""
        total, run = self.step.schedules.total_steps, self.cfg.runtime
        end = total if max_steps is None else min(total, max_steps)
        if self.done >= end:
            return self._result()
        feed = Prefetcher(
            [iter(loader) for loader in self.loaders],
            self.step.stage,
            self.device,
            accumulate=[len(loader.share.own) for loader in self.loaders],
        )
        try:
            profiler = StepProfiler(profile if self.world.main else 0, self.folder, self.device)
            alone = self.world.world == 1
            stopper = StopRequest(impatient=alone and self.device.type == "cpu", main=self.world.main)
            with stopper as request, Progress(end, self.done, enabled=self.world.main) as progress, profiler:
                self.saver.say = progress.note
                for note in [*self.notes, *banner.lines(self, end)]:
                    progress.note(note)
                while self.done < end:
                    try:
                        with request.step():
                            out = self._one(feed, end, stop=request.signal is not None or self.saver.failed)
                    except StepGivenUp:
                        if self.done:
                            self._save(wait=True)
                        request.leave(progress.note, self.done, self.saver.path)
                    profiler.step()
                    # several processes agree during the next step
                    out.stop = request.signal is not None if alone else out.stop
                    self.saver.look()
                    if self.done % run.log_every == 0 or self.done == end:
                        self.lock.check()
                        if row := self.metrics.flush(out):
                            for tell in filter(None, (progress.log, on_log)):
                                tell(row)
                        self.listed = run_folder.list_bad(self.folder, self.loaders, self.world, self.listed)
                    else:
                        progress.advance(self.done)
                    if self.done % run.save_every == 0 or self.done == end or out.stop:
                        self._save(wait=self.done == end or out.stop)
                    if out.stop:
                        request.leave(progress.note, self.done, self.saver.path)
        except NonFiniteError as error:
            write_bundle(self, error)
            raise
        except KeyboardInterrupt:  # a second one
            self.saver.close(at_once=True)
            raise
        finally:
            self.saver.close()
            self.metrics.close()
        return self._result()

    def _one(self, feed: Prefetcher, end: int, *, stop: bool) -> StepOutput:
        """Make the next step; where the device works by itself, get the one after it ready meanwhile."""
        batches, every = feed.take(self.done), self.cfg.runtime.monitor_every
        out = self.step(batches, self.done, stop=stop, monitor=bool(every) and (self.done + 1) % every == 0)
        self.done += 1
        if self.done < end:
            feed.advance(self.done)
        self.metrics.waited(data=feed.waited, save=self.saver.waited)
        feed.waited = self.saver.waited = 0.0
        out.monitors.update(self.watch(self.step, self.done, self.metrics))
        self.metrics.record(self.done, out)
        return out

    def _save(self, *, wait: bool) -> None:
        mark("save")
        metrics = self.metrics.state_dict()  # raises on every process alike if a value is not finite
        weights = self.step.state_dict() if self.world.main or self.step.sharded else {}
        others = {
            "epoch": self.done // self.cfg.optimization.ipe,
            "step": self.done,
            "sampler": position(self.cfg, self.done, self.loaders),
            "rng": checkpoint.rng_state(self.device),
            "metrics": metrics,
            "config": configs.to_dict(self.cfg),
            "versions": self.versions,
        }
        self.saver.save(self.done, {**weights, **others} if self.world.main else None, wait=wait)

    def _result(self) -> TrainResult:
        if self.saver.path is None:
            raise TrainingError("no step was made: optimization.epochs * optimization.ipe or max_steps is 0")
        return TrainResult(self.folder, self.done, self.metrics.last_row, self.saver.path)

    def close(self) -> None:
        """Stop the loaders, leave the process group, give the folder back."""
        for loader in self.loaders:
            loader.close()
        self.world.close()
        self.lock.release()


def train(
    cfg: Config,
    *,
    resume: bool | str | Path = True,
    device: str | None = None,
    max_steps: int | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    profile: int = 0,
    fallback: bool = True,
    probe: MakeProbe | None = None,
) -> TrainResult:
    """Train, or go on training, as ``cfg`` says, in ``cfg.folder``.

    Args:
        cfg: the configuration.
        resume: True goes on from the newest checkpoint of the folder if there is one; a path from that checkpoint or
            run folder; False starts anew (an earlier run in the folder is moved to ``previous-N/``).
        device: in place of ``cfg.runtime.device``.
        max_steps: stop at this count of optimiser steps; schedules stay those of the whole run.
        on_log: called with each row of metrics.jsonl.
        profile: so many steps, after two, go into ``profile/`` of the folder (metrics/profile.py).
        fallback: take the checkpoint before where the newest is damaged; False: raise.
        probe: what makes the probe of ``monitor.probe``: ``evaluation.quick_probe``.

    On SIGTERM the step in hand is finished, a checkpoint written, and the process exits 0; on SIGINT likewise, then
    KeyboardInterrupt. After a kill the run goes on with the losses that an uninterrupted one has, bit for bit on a CPU.

    Raises:
        TrainingError: a loss was not finite (step, terms and samples are named; no checkpoint was written after it).
        CheckpointError: the checkpoint is damaged or of another architecture.
        UserError: configuration, data or folder cannot be used; another process trains in the folder.
    """
    with process_settings_kept(), run_folder.nothing_left(Path(cfg.folder)), RunLock(cfg.folder) as lock:
        trainer = None
        try:
            with together(lock.release):
                trainer = Trainer(cfg, resume=resume, device=device, fallback=fallback, lock=lock, probe=probe)
                return trainer.run(max_steps, on_log, profile)
        finally:
            if trainer is not None:
                trainer.close()
