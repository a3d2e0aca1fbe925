"""Jobs as one SLURM array, through submitit."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from vjepa_fast.errors import UserError
from vjepa_fast.study.jobs.processes import Event, Work


def run_slurm(
    work: Work,
    jobs: Sequence[dict],
    folder: str | os.PathLike,
    options: Mapping[str, object],
    at_once: int | None,
    on_event: Event,
    poll: float = 10.0,
) -> None:
    """Submit the jobs and wait for them, looking every ``poll`` seconds; Ctrl-C leaves them running.

    ``options`` go to submitit's ``update_parameters``: slurm_partition, timeout_min, gpus_per_node, cpus_per_task, ...
    ``at_once``: jobs of the array that may run at the same time (None: as many as SLURM allows).

    Raises:
        UserError: submitit is not installed, or refuses the options.
    """
    try:
        import submitit  # pyright: ignore[reportMissingImports]  # optional, and not among the extras
    except ImportError:
        raise UserError("--launcher slurm needs submitit: pip install submitit") from None
    executor = submitit.AutoExecutor(folder=str(Path(folder) / "slurm"))
    if at_once:
        options = {**options, "slurm_array_parallelism": at_once}
    try:
        executor.update_parameters(name="vjepa-study", **options)
    except (NameError, TypeError, ValueError) as error:
        raise UserError(f"--slurm: submitit does not take these ({error})") from None
    handles = list(zip(executor.map_array(work.locked, jobs), jobs))
    for _, job in handles:
        on_event("start", job)
    while handles:
        for handle, job in [h for h in handles if h[0].done()]:
            handles.remove((handle, job))
            try:
                what = handle.result()
            except Exception as error:  # the job was cancelled, ran out of time or memory
                what = "failed"
                if not work.done(job):
                    work.fail(job, f"the SLURM job ended without a result: {error}")
            on_event("done" if work.done(job) else what, job)
        if handles:
            time.sleep(poll)
