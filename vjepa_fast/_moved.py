"""Module names of version 0.1.0 that still import, with a DeprecationWarning: their modules are in other rooms now."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

# Old name -> where what was in it is now, below vjepa_fast. (Modules whose name is a package now are not listed.)
MOVED = {
    "cli._bench_step": "bench.providers bench.cases bench.step bench.results bench.memory",
    "data.augment": "data.views.augment",
    "data.bad": "data.bad_samples",
    "data.decode_pyav": "data.decoders data.sampling data.decoders.pyav",
    "data.evalview": "data.views.evaluation",
    "data.manifest": "data.manifests.manifest data.media",
    "data.scan": "data.manifests.scan data.manifests.check",
    "data.synthetic.render": "data.synthetic",
    "evaluation.attentive": "evaluation.probes.attentive",
    "evaluation.baselines": "evaluation.controls",
    "evaluation.collapse": "evaluation.run.geometry",
    "evaluation.compare": "evaluation.run.rows",
    "evaluation.features": "evaluation.extract.features evaluation.extract.clips evaluation.extract.cache",
    "evaluation.fewshot.meta_baseline": "evaluation.fewshot.tuning.meta_baseline",
    "evaluation.fewshot.run": "evaluation.run.fewshot",
    "evaluation.fewshot.sun": "evaluation.fewshot.tuning.sun",
    "evaluation.fewshot.tune": "evaluation.fewshot.tuning.methods evaluation.run.rows",
    "evaluation.fewshot.views": "evaluation.fewshot.tuning.augment",
    "evaluation.leakage": "evaluation.fewshot.leakage",
    "evaluation.protocol_published": "evaluation.probes.published",
    "evaluation.tokens": "evaluation.extract.tokens evaluation.extract.shards",
    "models.attention": "layers.block layers.attention",
    "models.fused_block": "layers.cpu_block",
    "models.registry": "models.timm_names",
    "models.segments": "layers.attention layers.packed",
    "ops.fp8": "layers.fp8",
    "ops.geometry": "metrics.geometry",
    "ops.packed": "layers.packed",
    "study.cells": "study.run.cells",
    "study.claims_study": "study.claims.measured",
    "study.launch": "locks study.jobs.processes",
    "study.plan": "study.demo.plan study.run.clips study.run.training",
    "study.plots": "study.figures study.demo.figures",
    "study.pool": "study.jobs.pool study.jobs.workers",
    "study.published": "study.claims.published",
    "study.results": "study.records",
    "study.runner": "study.run.runner study.run.plan",
    "study.study_plots": "study.report.figures",
    "study.study_report": "study.report.write study.report.sentences",
    "study.study_tables": "study.report.tables study.report.write",
    "study.suites": "study.run.suites",
    "study.tasks": "study.demo.tasks study.run.clips study.run.evaluate study.run.training",
    "study.variants": "study.run.variants",
    "trainer.flops": "metrics.flops",
    "trainer.hardware": "metrics.hardware",
    "trainer.monitors": "metrics.collapse",
    "trainer.profile": "metrics.profile",
}


class Finder:
    """Finds and loads the old names; the last on ``sys.meta_path``, so that a module of that name comes first."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of an old name, None for any other."""
        known = name.startswith("vjepa_fast.") and name.removeprefix("vjepa_fast.") in MOVED
        return importlib.machinery.ModuleSpec(name, Finder) if known else None  # pyright: ignore[reportArgumentType]  # by its methods

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> None:
        """The default module."""

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        """Warn, and let the module look its names up in the new ones."""
        places = [f"vjepa_fast.{place}" for place in MOVED[module.__name__.removeprefix("vjepa_fast.")].split()]
        now = " and ".join(places)
        warnings.warn(f"{module.__name__} is {now} now", DeprecationWarning, stacklevel=2)

        def look_up(name: str) -> Any:
            if name.startswith("__"):  # what `inspect` asks every module
                raise AttributeError(name)
            for place in places:
                found = importlib.import_module(place)
                if hasattr(found, name):
                    return getattr(found, name)
            raise AttributeError(f"module {module.__name__!r} (now {now}) has no attribute {name!r}")

        module.__dict__["__getattr__"] = look_up


if Finder not in sys.meta_path:
    sys.meta_path.append(Finder)
