"""Running what is missing of a study: its data first, then its runs by one of the launchers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence

from vjepa_fast.locks import Lock
from vjepa_fast.study.jobs.pool import run_here, run_tasks
from vjepa_fast.study.jobs.processes import Work, run_processes, run_slurm, terminable
from vjepa_fast.study.run import cells
from vjepa_fast.study.run.plan import StudyPlan


def run_study(
    study: StudyPlan,
    *,
    launcher: str = "processes",
    places: Sequence[str | None] = (None,),
    slurm: Mapping[str, object] | None = None,
    at_once: int | None = None,
    minutes: float | None = None,
    on_event: Callable[[str, dict | str], None] = lambda what, job: None,
) -> list[str]:
    """Run what is missing of ``study``; keys of the runs that failed (the others went on).

    ``launcher``: ``processes`` (``places``: per slot a GPU or None), ``slurm`` (``slurm``: options for submitit,
    ``at_once``: jobs that may run at the same time), or ``inline`` (in this process, one after the other). ``on_event``
    gets what happened (cost, prepare, start, done, failed, kept, elsewhere, stopped) and the job or a text.
    ``minutes`` from the call on runs of ``processes`` are stopped; they have saved, and go on when the study is run
    again.
    """
    until = None if minutes is None else time.monotonic() + 60 * minutes
    study.claim()
    jobs = study.missing()
    for job in study.jobs:
        if job not in jobs:
            on_event("kept", job)
    if not jobs:
        return study.failed()
    for line in study.suite.cost_lines(jobs):
        on_event("cost", line)
    work = Work(cells.run, cells.done, cells.fail)
    with terminable():
        cores = os.cpu_count() or 1
        workers = 0 if launcher == "inline" else cores if study.settings.device != "cpu" else min(cores, len(places))

        def on_task(what: str, name: str) -> None:
            on_event(what if what == "elsewhere" else "prepare", f"{name}: {what}")

        prepare(study, workers, on_task)
        if launcher == "slurm":
            run_slurm(work, jobs, study.folder, slurm or {}, at_once, on_event)
        elif launcher == "inline":
            for job in jobs:
                on_event("start", job)
                on_event(work.locked(job), job)
        else:
            run_processes(work, jobs, places, study.threads, on_event, until=until)
    return study.failed()


def prepare(study: StudyPlan, workers: int, on_event: Callable[[str, str], None]) -> None:
    """Check the instrument, then render and decode what is missing, in ``workers`` processes (0: in this one).

    One command at a time does so, others wait. Raises UserError where a suite fails its check and nothing is forced.
    """
    lock, reported = Lock(study.folder / "locks" / "prepare.lock"), False
    while not lock.take():
        if not reported:
            on_event("elsewhere", "preparing data")
            reported = True
        time.sleep(1.0)
    try:
        if forced := study.check_instrument(lambda text: on_event("done", text)):
            study.claim(forced)
        tasks = study.suite.tasks(study.grid.regimes)
        if workers:
            run_tasks(tasks, study.folder, at_once=workers, threads=1, on_event=on_event)
        else:
            run_here(tasks, study.folder, on_event=on_event)
    finally:
        lock.release()
