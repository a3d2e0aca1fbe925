"""All claims about the published results, computed again and set against what the seeds differ by."""

from __future__ import annotations

from collections.abc import Sequence

from vjepa_fast.study.claims.evaluate import NAMES, Claim, Outcome, evaluate, load_claims, tolerance
from vjepa_fast.study.claims.published import SAME_SEED, Delta, Published, load_published
from vjepa_fast.study.pages import plain_markdown

TOLERANCE_TEXT = (
    "Rounding: one difference must equal the claimed one to two decimals; the ends of a range hold up to half a unit "
    "of the last digit that the claim gives; counts and thresholds are exact."
)


def check_claims(published: Published | None = None, claims: Sequence[Claim] | None = None) -> list[dict]:
    """Every claim as a plain dict: what it states, its status, the arithmetic, the ``figures`` and ``deltas`` used,
    their ``placement`` against the seeds of the baseline, and ``same_seed``, the claim against the baseline of the
    variants' own seed (None: it is the same run).
    """
    published = published or load_published()
    return [_entry(claim, published) for claim in (load_claims() if claims is None else claims)]


def _entry(claim: Claim, published: Published) -> dict:
    outcome = evaluate(claim, published)
    figures = {(f.run, f.dataset): f.to_dict() for x in outcome.deltas for f in (x.figure, x.base)}
    spread = _against_spread(claim, outcome.deltas, published)
    notes = [
        f"{x.method} on {NAMES[x.dataset]}: probed for {x.epochs[0]} epochs, the baseline for {x.epochs[1]}"
        for x in outcome.deltas
        if x.epochs[0] != x.epochs[1]
    ]
    return {
        "id": claim.id,
        "statement": claim.statement,
        "kind": claim.kind,
        "status": outcome.status,
        "published": claim.value,
        "computed": outcome.computed,
        "arithmetic": outcome.arithmetic,
        "tolerance": tolerance(claim) if outcome.deltas and claim.kind != "count_below" else 0,
        "figures": list(figures.values()),
        "deltas": [x.to_dict() for x in outcome.deltas],
        "spread": spread,
        "placement": _placement(spread, outcome.deltas),
        "same_seed": _same_seed(claim, outcome, published),
        "other_reading": _other_reading(claim, published),
        "notes": [*notes, *([claim.caveat] if claim.caveat else [])],
        "source": {k: getattr(claim, k) for k in ("verified_by_source", "confidence_by_source")},
    }


def _against_spread(claim: Claim, deltas: Sequence[Delta], published: Published) -> list[dict]:
    """Per data set: the distance of the two baseline seeds, and which methods' deltas are within or beyond it."""
    out = []
    for dataset in dict.fromkeys(x.dataset for x in deltas):
        spread = published.spread(dataset)
        points, arithmetic = spread or (None, "")
        within = {x.method: abs(x.value) <= spread[0] for x in deltas if x.dataset == dataset} if spread else {}
        out.append(
            {
                "dataset": dataset,
                "points": points,
                "arithmetic": arithmetic,
                "borrowed": spread is not None and claim.regime != "mixed",  # only the mixed baseline has two seeds
                "within": [method for method, there in within.items() if there],
                "beyond": [method for method, there in within.items() if not there],
            }
        )
    return out


def _placement(spread: Sequence[dict], deltas: Sequence[Delta]) -> str:
    """One line for the table: within or beyond the distance of the seeds; without one, the error of the test part."""
    parts = []
    for s in spread:
        name = f"{NAMES[s['dataset']]}: " if len(spread) > 1 else ""
        if s["points"] is None:
            mine = [x for x in deltas if x.dataset == s["dataset"]]
            beyond = sum(abs(x.value) > x.sampling95 for x in mine)
            where = _side(len(mine) - beyond, beyond)
            parts.append(f"{name}no second seed; {where} the test part's {max(x.sampling95 for x in mine):.2f}")
        else:
            borrowed = " of the mixed baseline" if s["borrowed"] else ""
            parts.append(f"{name}{_side(len(s['within']), len(s['beyond']))} {s['points']:.2f}{borrowed}")
    return "; ".join(parts)


def _side(within: int, beyond: int) -> str:
    return "within" if not beyond else "beyond" if not within else f"{beyond} of {within + beyond} beyond"


def _same_seed(claim: Claim, outcome: Outcome, published: Published) -> dict | None:
    """The claim's figures against the baseline that has the variants' seed, and which differences turn by it."""
    run = SAME_SEED.get(claim.regime)
    if run is None or not outcome.deltas:
        return None
    other = evaluate(claim, published, baseline=run)
    before = {(x.method, x.dataset): x.value for x in outcome.deltas}
    turned = [f"{x.method} on {NAMES[x.dataset]}" for x in other.deltas if x.value * before[x.method, x.dataset] < 0]
    verdict = "no figure" if not other.deltas else f"reversed: {', '.join(turned)}" if turned else "same direction"
    return {
        "baseline": run,
        "computed": other.computed,
        "arithmetic": other.arithmetic,
        "reversed": turned,
        "verdict": verdict,
    }


def _other_reading(claim: Claim, published: Published) -> dict | None:
    needed = tuple(claim.other_reading.get("also_measured_on", ()))
    if not needed:
        return None
    other = evaluate(claim, published, also_measured_on=needed)
    names = " and ".join(NAMES[d] for d in needed)
    return {
        "reading": f"only methods that also have a figure on {names}",
        "status": other.status,
        "computed": other.computed,
        "arithmetic": other.arithmetic,
    }


def value_text(value: object) -> str:
    """A computed value in a table's cell."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return f"{value[0]:+.2f} to {value[1]:+.2f}"
    if isinstance(value, dict) and "count" in value:
        return f"{value['count']} of {value['of']}"
    if isinstance(value, dict):
        return ", ".join(f"{NAMES[d]} {v:+.2f}" for d, v in value.items())
    return str(value) if isinstance(value, int) else f"{value:+.2f}"


def same_seed_text(entry: dict) -> str:
    """The claim against the baseline of the same seed, in a table's cell."""
    same = entry["same_seed"]
    if same is None:
        return ""
    return same["verdict"] if same["computed"] is None else f"{value_text(same['computed'])}, {same['verdict']}"


def markdown_table(entries: Sequence[dict]) -> str:
    """The entries of :func:`check_claims` as a Markdown table, a line per claim."""
    head = ("id", "claim", "status", "computed", "arithmetic", "two baseline seeds", "baseline of the same seed")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for e in entries:
        arithmetic, computed, other = e["arithmetic"], value_text(e["computed"]), e["other_reading"]
        if other:
            arithmetic += f"; {other['reading']}: {other['status']}, {value_text(other['computed'])}"
        cells = (str(e["id"]), e["statement"], e["status"], computed, arithmetic, e["placement"], same_seed_text(e))
        lines.append("| " + " | ".join(plain_markdown(c) for c in cells) + " |")
    return "\n".join(lines)
