"""One claim about the published results, computed again from the published figures (how it is judged: docs/claims.md).

Nothing is adjusted to make a claim hold; where its words allow a second reading, that one is computed beside it
(``other_reading``) and does not change the status.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vjepa_fast.errors import DataError
from vjepa_fast.files import parse_json
from vjepa_fast.study.claims.published import BASELINES, DATA, Delta, Published

CONFIRMED, CONTRADICTED, NOT_COMPUTABLE = "confirmed", "contradicted", "not computable"
WIDTH_RECIPE = "mixed_4gpu_baseline"
NAMES = {"diving48": "Diving-48", "imagenet100": "ImageNet-100", "ssv2": "SSv2", "synth": "synthetic motion"}
REGIMES = {"mixed": "mixed", "ucf101": "UCF-101"}


@dataclass(frozen=True)
class Claim:
    """A claim as data. ``read_as`` replaces its data set or method where words must be read as names of figures;
    ``directions`` and ``value_on`` say which data sets a pattern lets go up or down, and which has the value.
    """

    id: int
    kind: str  # delta_top1 | delta_top1_range | count_below | pattern | embedding_dim
    dataset: str
    regime: str
    method: str
    value: Any
    verified_by_source: bool
    confidence_by_source: float
    read_as: dict = field(default_factory=dict)
    directions: dict = field(default_factory=dict)
    value_on: str | None = None
    other_reading: dict = field(default_factory=dict)
    caveat: str = ""

    @property
    def datasets(self) -> tuple[str, ...]:
        """Published data sets that the claim speaks of."""
        return tuple(self.directions) or (self.read_as.get("dataset", self.dataset),)

    @property
    def methods(self) -> str:
        """Pattern of the methods that the claim speaks of, as :meth:`Published.methods` takes it."""
        return self.read_as.get("method", self.method)

    @property
    def statement(self) -> str:
        """The claim in one line."""
        where = f"{REGIMES.get(self.regime, self.regime)}, {self.method}"
        name = NAMES.get(self.datasets[0], self.datasets[0])
        if self.kind == "delta_top1":
            return f"{where}: {name} {self.value:+.2f}"
        if self.kind == "delta_top1_range":
            return f"{where}: {name} {self.value[0]:+g} to {self.value[1]:+g}"
        if self.kind == "count_below":
            return f"{where}: {self.value['count']} of {self.value['of']} below {self.value['threshold']:+g} on {name}"
        if self.kind == "embedding_dim":
            return f"the encoder's embedding has {self.value} dimensions"
        if not self.directions:
            return self.dataset
        changes = [
            f"{NAMES[d]} {way}" + (f" {self.value:+.2f}" if d == self.value_on else "")
            for d, way in self.directions.items()
        ]
        return f"{where}: {', '.join(changes)}"


@dataclass(frozen=True)
class Outcome:
    """What the figures give: ``computed`` has the form of the claim's value, ``arithmetic`` is how, as text."""

    status: str
    computed: object
    arithmetic: str
    deltas: tuple[Delta, ...] = ()


def load_claims(path: str | os.PathLike | None = None) -> list[Claim]:
    """The claims of a file (default: the 17 in the package). DataError where the file is something else."""
    path = Path(path or DATA / "claims.json")
    try:
        return [Claim(**c) for c in parse_json(path.read_text(encoding="utf-8"))["claims"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a file of claims ({error})") from None


def evaluate(
    claim: Claim, published: Published, baseline: str | None = None, also_measured_on: tuple[str, ...] = ()
) -> Outcome:
    """Compute a claim from the published figures.

    ``baseline``: the run to compare with (default: the paper's); ``also_measured_on``: only methods that have figures
    on these data sets too. DataError for a claim of an unknown kind.
    """
    if claim.kind == "embedding_dim":
        return _width(claim, published)
    if claim.kind == "pattern" and not claim.directions:
        return _open_pattern(published)
    if claim.kind not in JUDGES:
        raise DataError(f"claim {claim.id}: unknown kind {claim.kind!r}; expected one of {', '.join(JUDGES)}")
    base = baseline or BASELINES[claim.regime]
    methods = published.methods(claim.regime, claim.methods, also_measured_on)
    if not methods:
        return Outcome(NOT_COMPUTABLE, None, f"no published run of {claim.methods} in the regime {claim.regime}")
    based = [d for d in claim.datasets if published.has(base, d)]
    pairs = [(m, d) for m in methods for d in based]
    there = [(m, d) for m, d in pairs if published.has(f"{claim.regime}_4gpu_{m}", d)]
    deltas = tuple(published.delta(claim.regime, m, d, base) for m, d in there)
    missing = [f"{base} on {d}" for d in claim.datasets if d not in based]
    missing += [f"{m} on {d}" for m, d in pairs if (m, d) not in there]
    said, lacking = (
        [_named(x, deltas) for x in deltas],
        [f"no published figure: {', '.join(missing)}"] if missing else [],
    )
    # A difference needs its figure, a pattern all that could refute it; a range or a count speaks of what was tested.
    holds, computed, more = JUDGES[claim.kind](claim, deltas) if deltas else (False, None, [])
    needs_all = claim.kind == "delta_top1" or (claim.kind == "pattern" and holds)
    if not deltas or (needs_all and missing):
        return Outcome(NOT_COMPUTABLE, None, "; ".join(said + lacking), deltas)
    return Outcome(_status(holds), computed, "; ".join(said + more + lacking), deltas)


def tolerance(claim: Claim) -> float:
    """Half a unit of the last digit: of the figures for one difference, of the claim for the ends of a range."""
    if claim.kind != "delta_top1_range":
        return 0.005
    decimals = max(len(str(end).partition(".")[2]) for end in claim.value)
    return 0.5 * 10**-decimals


def _named(delta: Delta, deltas: Sequence[Delta]) -> str:
    """The arithmetic, with what it differs in from the others in front."""
    names = [delta.method] if len({x.method for x in deltas}) > 1 else []
    names += [NAMES[delta.dataset]] if len({x.dataset for x in deltas}) > 1 else []
    return ": ".join(filter(None, (" ".join(names), delta.arithmetic)))


def _status(holds: bool) -> str:
    return CONFIRMED if holds else CONTRADICTED


Judged = tuple[bool, object, list[str]]  # whether the claim holds, what was computed, and how beside the differences


def _single(claim: Claim, deltas: Sequence[Delta]) -> Judged:
    (delta,) = deltas
    return abs(delta.value - claim.value) <= tolerance(claim) + 1e-9, delta.value, []


def _range(claim: Claim, deltas: Sequence[Delta]) -> Judged:
    low, high = claim.value
    tol = tolerance(claim)
    outside = [x for x in deltas if not low - tol - 1e-9 <= x.value <= high + tol + 1e-9]
    computed = [min(x.value for x in deltas), max(x.value for x in deltas)]
    said = [f"from {computed[0]:+.2f} to {computed[1]:+.2f}"]
    if outside:
        names = ", ".join(f"{x.method} {x.value:+.2f}" for x in outside)
        said.append(f"outside {low:+g} to {high:+g} by more than rounding ({tol:g}): {names}")
    return not outside, computed, said


def _count(claim: Claim, deltas: Sequence[Delta]) -> Judged:
    threshold, of = claim.value["threshold"], len(deltas)
    count = sum(x.value < threshold for x in deltas)
    computed = {"count": count, "of": of, "threshold": threshold}
    return computed == claim.value, computed, [f"{count} of {of} below {threshold:+g}"]


def _pattern(claim: Claim, deltas: Sequence[Delta]) -> Judged:
    """One figure that is not as claimed is enough against a pattern, whatever the others would be."""
    held = [
        (x.value > 0 if claim.directions[x.dataset] == "up" else x.value < 0)
        and (x.dataset != claim.value_on or _single(claim, [x])[0])
        for x in deltas
    ]
    return all(held), {x.dataset: x.value for x in deltas}, []


JUDGES: dict[str, Callable[[Claim, Sequence[Delta]], Judged]] = {
    "delta_top1": _single,
    "delta_top1_range": _range,
    "count_below": _count,
    "pattern": _pattern,
}


def _width(claim: Claim, published: Published) -> Outcome:
    width, text = encoder_width(WIDTH_RECIPE)
    from vjepa_fast import config

    sizes = sorted({config.load(run).model.model_name for run in published.runs})
    text += f"; the recipes of all {len(published.runs)} published runs name {', '.join(sizes)}"
    holds = width == claim.value and sizes == [config.load(WIDTH_RECIPE).model.model_name]
    return Outcome(_status(holds), width, text)


def encoder_width(recipe: str) -> tuple[int, str]:
    """Channels of a token in the encoder that ``recipe`` builds, read off its weights (torch's meta device: shapes
    without memory), and where they were read.
    """
    import torch

    from vjepa_fast import config
    from vjepa_fast.models import encoder_from_config

    cfg = config.load(recipe)
    with torch.device("meta"):
        weight = encoder_from_config(cfg).patch_embed.proj.weight  # [embed_dim, 3, tubelet, patch, patch]
    shape = list(weight.shape)
    return shape[0], f"the patch embedding of {recipe} ({cfg.model.model_name}) has weights of shape {shape}"


def _open_pattern(published: Published) -> Outcome:
    """Claim 17. What two data sets say together is added as information; it decides nothing."""
    from scipy.stats import spearmanr

    text = (
        "it names no objectives, no measure of temporal stress or appearance, and no threshold for 'often' or "
        "'weaker', so no figure can confirm or contradict it"
    )
    methods = published.methods("mixed", "*", ("ssv2", "imagenet100"))
    if len(methods) > 2:
        ssv2, images = ([published.top1(f"mixed_4gpu_{m}", d) for m in methods] for d in ("ssv2", "imagenet100"))
        rho = spearmanr(ssv2, images).statistic  # pyright: ignore[reportAttributeAccessIssue]  # scipy has no types
        text += (
            f". For information: over the {len(methods)} mixed methods the rank correlation (Spearman) of SSv2 and "
            f"ImageNet-100 accuracy is {rho:+.2f}; a trade-off between the two would make it negative"
        )
    return Outcome(NOT_COMPUTABLE, None, text)
