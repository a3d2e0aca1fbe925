"""What a study on GPUs will take, counted before it starts: GPU-hours and disk, by part.

FLOP are counted from the shapes (2 per multiply-add); the hours follow from an assumed rate, since nothing was measured
on the machine that will run it. Decoding and the probes of pooled features are not in them. N tokens of a clip, D
width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vjepa_fast.config import Config

TFLOPS = 100.0  # sustained by one GPU in bfloat16; assumed
STEP = 2.43  # FLOP of training on a clip, in forward passes over all its tokens: the published step's
BACKWARD = 3  # forward and backward pass, in forward passes


@dataclass
class Line:
    """One part of a study: what passes through an encoder, FLOP of one run, bytes on disk, and for how many runs.

    ``kept``: the bytes stay; otherwise they are removed when the part is done, and only the largest count.
    """

    name: str
    clips: int
    flops: float
    bytes: float = 0.0
    runs: int = 1
    kept: bool = True

    @property
    def hours(self) -> float:
        """GPU-hours of all runs."""
        return self.runs * self.flops / (TFLOPS * 1e12 * 3600)


class Shapes:
    """The encoder and predictor of a configuration on the meta device, and what a clip costs them."""

    def __init__(self, cfg: Config, crop_size: int):
        from vjepa_fast.metrics.flops import Dims
        from vjepa_fast.models.build import build_from_config

        self.encoder, predictor = build_from_config(cfg, device="meta")
        self.dims, self.crop_size = Dims.of(self.encoder, predictor), crop_size

    def grid(self, frames: int) -> tuple[int, int, int]:
        """(T, H, W) of a clip of so many frames."""
        return self.encoder.grid((1, 3, frames, self.crop_size, self.crop_size))

    def passes(self, frames: int) -> tuple[float, int]:
        """(FLOP of a forward pass, N) of a clip of so many frames."""
        tokens = math.prod(self.grid(frames))
        return self.dims.encoder.flops(tokens, tokens**2) + 2 * self.dims.patch * tokens, tokens

    def training(self, cfg: Config, frames: int, runs: int, processes: int = 1) -> Line:
        """Pretraining by the V-JEPA step, and its checkpoint; other methods take less and are counted alike."""
        opt = cfg.optimization
        steps = int(opt.epochs * opt.ipe * opt.ipe_scale)
        clips = steps * cfg.data.batch_size * opt.accumulate * processes
        size = 12 * self.dims.trained + 4 * self.dims.averaged
        return Line("training", clips, clips * STEP * self.passes(frames)[0], size, runs)


def trained(jobs: Sequence[Mapping[str, Any]]) -> list[Line]:
    """The pretraining alone of the runs ``jobs``, which share data, encoder and steps."""
    from vjepa_fast import config as configs

    cfg = configs.from_dict(jobs[0]["config"])
    return [Shapes(cfg, cfg.data.crop_size).training(cfg, max(cfg.data.dataset_fpcs), len(jobs))]


def lines(suite: Any, jobs: Sequence[Mapping[str, Any]]) -> list[Line]:
    """The parts of the runs ``jobs`` of a ``Paper``."""
    import torch

    from vjepa_fast import config as configs
    from vjepa_fast.data import load_manifest
    from vjepa_fast.evaluation.extract.features import pool_tokens
    from vjepa_fast.study.instrument.read import CANDIDATES

    trained = [job for job in jobs if job["kind"] != "random"]
    cfg, view = configs.from_dict((trained or jobs)[0]["config"]), suite.view()
    shapes = Shapes(cfg, view["crop_size"])
    width, grid_of, passes = shapes.encoder.embed_dim, shapes.grid, shapes.passes

    def numbers(poolings: Iterable[str]) -> int:
        """Of a clip's features, all poolings together."""
        grid = grid_of(view["num_frames"])
        z = torch.zeros(1, math.prod(grid), width)
        return sum(pool_tokens(z, grid, pooling).shape[1] for pooling in poolings)

    own, _ = passes(view["num_frames"])
    scored = len(jobs) + sum(_untrained_target(job) for job in trained)  # encoders: the student's beside such a target
    processes = trained[0]["processes"] if trained else 1
    out = [shapes.training(cfg, view["num_frames"], len(trained), processes)]
    counts = {
        name: {part: len(load_manifest(path)) for part, path in source["manifests"].items()}
        for name, source in suite.sources().items()
    }
    for name, source in suite.sources().items():
        total = sum(counts[name].values())
        if source["task"]:
            out.append(Line(f"{name}, our probes", total, total * own, 4 * total * numbers([suite.pooling]), scored))
            out.append(_published(name, source["task"], counts[name], passes, width, scored))
        else:
            poolings = [r.pooling for r in CANDIDATES] if "val" in counts[name] else [suite.pooling]
            out.append(Line(f"{name}, frozen", total, total * own, 4 * total * numbers(poolings), scored))
            out += [_tuned(name, m, suite.tune, counts[name], own, scored) for m in suite.tune["methods"]]
    return out


def _untrained_target(job: Mapping[str, Any]) -> bool:
    return job["compat"] == "published" and job["config"]["target"]["mode"] == "online"


def _published(name: str, task: str, counts: Mapping[str, int], passes: Any, width: int, runs: int) -> Line:
    from vjepa_fast.evaluation import get_task
    from vjepa_fast.evaluation.probes.published import published_settings

    settings = published_settings(get_task(task))
    train, test = counts["train"], counts["test"]
    if settings.draw is not None:
        train, test = min(train, settings.draw[0]), min(test, settings.draw[1])
    forward, tokens = passes(settings.num_frames)
    read = tokens if settings.tokens == "all" else 1
    probe = BACKWARD * settings.epochs * train * 4 * (read + 1) * width**2  # keys and values of all tokens
    size = (train + test) * read * width * (4 if settings.storage == "float32" else 2)
    return Line(f"{name}, published probe", train + test, (train + test) * forward + probe, size, runs, kept=False)


def _tuned(
    name: str, method: str, options: Mapping[str, Any], counts: Mapping[str, int], own: float, runs: int
) -> Line:
    from vjepa_fast.evaluation.fewshot.tuning.methods import settings_of

    s: Any = settings_of(method, options)
    meta = s.meta
    episodes = meta.epochs * meta.steps * meta.episodes_per_step * meta.way * (meta.shot + meta.queries)
    looks = (meta.epochs + 3) * counts.get("val", 0) + 4 * counts["test"]
    if method == "meta-baseline":
        frozen = str(s.trunk) == "head"  # then clips are encoded once
        clips = sum(counts.values()) if frozen else s.classifier.epochs * counts["train"] + episodes
        return Line(f"{name}, {method}", clips, (1 if frozen else BACKWARD) * clips * own + looks * own, runs=runs)
    teacher, student = s.teacher.epochs * counts["train"], s.student.epochs * counts["train"]
    clips = teacher + 2 * student + episodes  # the student's clips pass the teacher too
    flops = (BACKWARD * (teacher + student + episodes) + student + looks) * own
    return Line(f"{name}, {method}", clips, flops, runs=runs)


def table(parts: Sequence[Line]) -> list[str]:
    """The parts as lines of text, with their sum."""
    rows = [("part", "runs", "clips a run", "PFLOP a run", "GPU-hours", "GB")]
    rows += [
        (p.name, str(p.runs), f"{p.clips:,}", f"{p.flops / 1e15:,.3g}", f"{p.hours:,.3g}", f"{_gb(p):,.3g}")
        for p in parts
    ]
    most = max((p.bytes for p in parts if not p.kept), default=0.0) / 1e9
    disk = sum(_gb(p) for p in parts if p.kept) + most
    rows.append(("all", "", "", "", f"{sum(p.hours for p in parts):,.3g}", f"{disk:,.3g}"))
    tokens = [
        "Tokens of published probes are removed when a probe is done: the largest count, once for each run at a time."
    ]
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    text = ["  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:]))]) for row in rows]
    return [
        *text,
        f"GPU-hours at {TFLOPS:g} TFLOP/s, which is assumed; decoding and probes of pooled features are not in them.",
        *(tokens if most else []),
    ]


def _gb(part: Line) -> float:
    return part.bytes * (part.runs if part.kept else 1) / 1e9
