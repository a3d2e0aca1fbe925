"""Whether a suite can tell a good encoder from a bad one, from the rows of its controls: a verdict and its reasons.

Accuracies are fractions. The limits are of point estimates; the intervals stand beside them in the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

ENCODERS = ("supervised", "half", "random", "pixels", "shuffled")


@dataclass(frozen=True)
class Limit:
    """What the controls must reach in one outcome. None: not asked.

    ``supervised``: at least. ``random``: at most. ``lead``, ``gap``: by how much the supervised encoder must lead
    random weights, and raw pixels. ``shuffled``: by how much an encoder trained with shuffled labels may lead
    random weights.
    """

    supervised: float
    random: float | None = None
    lead: float | None = None
    gap: float | None = None
    shuffled: float | None = 0.1


LIMITS: dict[str, dict[str, Limit]] = {  # by kind of suite and outcome
    "fewshot": {"1-shot": Limit(0.6), "5-shot": Limit(0.8, random=0.45, gap=0.2)},
    "probe": {"linear": Limit(0.8, lead=0.2)},
}


@dataclass(frozen=True)
class Verdict:
    """``passed``; ``reasons``: one sentence for each limit that is missed; ``notes``: what is odd but no failure."""

    passed: bool
    reasons: tuple[str, ...]
    notes: tuple[str, ...]


def verdict(kind: str, rows: Iterable[Mapping]) -> Verdict:
    """Judge one suite of ``kind`` ("fewshot" or "probe") by its rows: dicts with encoder, outcome and accuracy.

    A control without a row is a reason, so that a check that was cut short does not pass.
    """
    found = {(row["encoder"], row["outcome"]): row["accuracy"] for row in rows}
    reasons, notes = [], []
    for outcome, limit in LIMITS[kind].items():
        lacking = [name for name in ENCODERS if (name, outcome) not in found]
        if lacking:
            reasons.append(f"{outcome}: no row of {', '.join(lacking)}")
            continue
        at = {name: found[name, outcome] for name in ENCODERS}
        reasons += _missed(outcome, limit, at)
        if not at["supervised"] > at["half"] > at["random"]:
            order = ", ".join(f"{name} {_percent(at[name])}" for name in ("supervised", "half", "random"))
            notes.append(f"{outcome}: more training with labels does not read as better at every step: {order}")
    return Verdict(not reasons, tuple(reasons), tuple(notes))


def _missed(outcome: str, limit: Limit, at: Mapping[str, float]) -> list[str]:
    out = []
    if at["supervised"] < limit.supervised:
        out.append(
            f"{outcome}: an encoder trained with labels reaches {_percent(at['supervised'])}, "
            f"under {_percent(limit.supervised)}: the outcome has no ceiling to reach for"
        )
    if limit.random is not None and at["random"] > limit.random:
        out.append(
            f"{outcome}: random weights reach {_percent(at['random'])}, over {_percent(limit.random)}: "
            "the outcome asks for too little"
        )
    if limit.lead is not None and at["supervised"] - at["random"] < limit.lead:
        out.append(
            f"{outcome}: random weights reach {_percent(at['random'])}, less than {100 * limit.lead:.0f} points under "
            f"the supervised encoder's {_percent(at['supervised'])}: little has to be learned for the outcome"
        )
    if limit.gap is not None and at["supervised"] - at["pixels"] < limit.gap:
        out.append(
            f"{outcome}: raw pixels reach {_percent(at['pixels'])}, less than {100 * limit.gap:.0f} points under the "
            f"supervised encoder's {_percent(at['supervised'])}: the outcome asks for little more than pixels"
        )
    if limit.shuffled is not None and at["shuffled"] - at["random"] > limit.shuffled:
        out.append(
            f"{outcome}: an encoder trained with shuffled labels reaches {_percent(at['shuffled'])}, more than "
            f"{100 * limit.shuffled:.0f} points over random weights ({_percent(at['random'])}): labels are not what "
            "the supervised encoder has learned from"
        )
    return out


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
