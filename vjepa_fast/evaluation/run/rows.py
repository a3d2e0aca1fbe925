"""Rows of an accuracy table: every probe of every encoder, each set against the random-init control on the same
samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from vjepa_fast.evaluation.extract.features import Features
from vjepa_fast.evaluation.extract.tokens import Tokens
from vjepa_fast.evaluation.fewshot.episodes import EpisodeResult
from vjepa_fast.evaluation.fewshot.protocols import EpisodeProtocol, evaluate_episodes
from vjepa_fast.evaluation.fewshot.tuning.embedder import TuneResult
from vjepa_fast.evaluation.intervals import mean_ci95, paired_difference
from vjepa_fast.evaluation.probes import PROBES, ProbeOptions, ProbeResult
from vjepa_fast.evaluation.readout import Choice, read
from vjepa_fast.evaluation.readout.choice import Encoder, Part


@dataclass(frozen=True)
class Row:
    """One accuracy in [0, 1] with its 95 % interval, and its difference from the control where there is one.

    ``hits``: right or wrong (1, 0) per test sample, in the order that all rows of a suite share; for episodes each
    sample's accuracy as a query (None: never one). ``difference``: {"value", "low", "high", "p"}, accuracy minus the
    control's, paired by test sample.
    """

    label: str
    kind: str  # pretrained | random | pixels | supervised
    suite: str
    probe: str  # name of a probe, "supervised", or e.g. "5-shot"
    accuracy: float
    low: float
    high: float
    n: int
    chance: float
    chosen: dict = field(default_factory=dict)
    hits: tuple = field(default=(), repr=False)
    difference: dict | None = None

    @property
    def verdict(self) -> str:
        """By the 95 % interval of the difference from the control: above, below or level; empty without a control."""
        if self.difference is None:
            return ""
        return "above" if self.difference["low"] > 0 else "below" if self.difference["high"] < 0 else "level"

    def to_dict(self) -> dict:
        """Plain types, for JSON."""
        return {**asdict(self), "hits": list(self.hits)}


def row_of(result: ProbeResult, *, label: str, kind: str, suite: str, probe: str, chance: float) -> Row:
    """The Row of a probe's result."""
    hits = tuple(int(v) for v in result.correct)
    return Row(label, kind, suite, probe, result.accuracy, *result.ci95, result.n, chance, dict(result.chosen), hits)


def probe_row(
    name: str,
    train: Features | Tokens,
    val: Features | Tokens | None,
    test: Features | Tokens,
    options: ProbeOptions,
    **of: str,
) -> Row:
    """The Row of the probe ``name``, ``of`` a label, kind and suite. Chance is the share of the commonest class in the
    test part.
    """
    result = PROBES[name]()(train, val, test, options)
    chance = float(np.unique(test.y, return_counts=True)[1].max() / len(test.y))
    return row_of(result, probe=name, chance=chance, **of)


def probe_rows(
    label: str,
    kind: str,
    suite: str,
    train: Features,
    val: Features | None,
    test: Features,
    *,
    probes: Sequence[str] = ("linear", "knn"),
    seed: int = 0,
) -> list[Row]:
    """Rows of one encoder on one suite, one per probe of pooled features."""
    options = ProbeOptions(seed=seed)
    return [probe_row(name, train, val, test, options, label=label, kind=kind, suite=suite) for name in probes]


def episode_rows(
    label: str,
    kind: str,
    suite: str,
    novel: Features,
    *,
    way: int = 5,
    shots: Sequence[int] = (1, 5),
    queries: int = 15,
    episodes: int = 1000,
    seed: int = 0,
) -> list[Row]:
    """Nearest-prototype rows, one per number of shots, on episodes that depend on the labels and ``seed`` alone."""
    protocol = EpisodeProtocol("probe", way, tuple(shots), queries, episodes, seed)
    rows = fewshot_rows(label, kind, suite, novel, protocol)
    return [replace(row, chosen={"way": way, "queries": queries}) for row in rows]


def fewshot_rows(
    label: str,
    kind: str,
    suite: str,
    novel: Features,
    protocol: EpisodeProtocol,
    classifier: str = "prototype",
    **options: Any,
) -> list[Row]:
    """One row per number of shots of ``protocol``; ``options`` as `evaluate_episodes`."""
    shown = {k: v for k, v in options.items() if k != "base"}
    rows = []
    for r in evaluate_episodes(novel, protocol, classifier, **options):
        chosen = {"protocol": protocol.name, "way": r.way, "queries": r.queries, "classifier": classifier, **shown}
        rows.append(_episode_row(r, label, kind, suite, f"{r.shot}-shot", chosen))
    return rows


def readout_rows(
    label: str,
    kind: str,
    suite: str,
    encoder: Encoder,
    choice: Choice,
    novel: Part,
    protocol: EpisodeProtocol,
    **how: Any,
) -> list[Row]:
    """One row per number of shots of ``protocol``, read once with a chosen readout; ``how`` as `readout.read`."""
    chosen = {"protocol": protocol.name, "way": protocol.way, "queries": protocol.queries, **choice.readout.to_dict()}
    results = read(encoder, choice, novel, protocol, **how)
    return [_episode_row(r, label, kind, suite, f"{r.shot}-shot", chosen) for r in results]


def tune_rows(result: TuneResult, *, label: str, kind: str, suite: str) -> list[Row]:
    """Rows of a tuned model, one per stage and number of shots; ``probe`` is e.g. "sun meta 5-shot", so that `against`
    pairs the same stage of another encoder.
    """
    chosen = {"method": result.method, "trunk": result.settings.trunk, "best_epoch": result.best_epoch}
    chosen |= {"temperature": result.temperature, "notes": list(result.notes)}
    rows = []
    for stage, by_shot in result.test.items():
        for shot, r in by_shot.items():
            probe, more = f"{result.method} {stage} {shot}-shot", {"way": r.way, "queries": r.queries}
            rows.append(_episode_row(r, label, kind, suite, probe, {**chosen, **more}))
    return rows


def _episode_row(r: EpisodeResult, label: str, kind: str, suite: str, probe: str, chosen: dict) -> Row:
    low, high = max(0.0, r.mean - r.ci95), min(1.0, r.mean + r.ci95)
    hits = tuple(None if np.isnan(a) else round(float(a), 6) for a in r.by_sample)
    return Row(label, kind, suite, probe, r.mean, low, high, r.episodes, 1 / r.way, chosen, hits)


def against(rows: list[Row], controls: list[Row], seed: int = 0) -> list[Row]:
    """``rows`` with the difference from the control row of the same suite and probe filled in (bootstrap over test
    samples; for episodes 1.96 std / sqrt(n) over query samples, because an interval over episodes shrinks without end
    while the same clips are drawn again). The random-init rows themselves, and rows without a control, stay as they
    are. A supervised row is set against the linear control.
    """
    by_key = {(c.suite, c.probe): c for c in controls}
    out = []
    for row in rows:
        control = by_key.get((row.suite, "linear" if row.probe == "supervised" else row.probe))
        if control is None or row.kind == "random" or len(control.hits) != len(row.hits):
            out.append(row)
            continue
        if row.probe.endswith("-shot"):
            gaps = [a - b for a, b in zip(row.hits, control.hits) if a is not None and b is not None]
            value, half = row.accuracy - control.accuracy, mean_ci95(gaps)[1]
            difference = {"value": value, "low": value - half, "high": value + half, "p": None}
        else:
            pair = paired_difference(row.hits, control.hits, seed=seed)
            difference = {"value": pair.difference, "low": pair.ci95[0], "high": pair.ci95[1], "p": pair.p_value}
        out.append(replace(row, difference=difference))
    return out
