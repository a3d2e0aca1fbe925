"""The pictures of a study's report, as SVG text. Nothing here computes a result.

Regimes differ by colour (single blue, mixed orange) in every picture; what is not judged is grey. Differences are drawn
in percentage points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from vjepa_fast.study.figures import COLOURS, GREY, INK, figure, legend, name_lines, panels, smooth, svg
from vjepa_fast.study.records import RANDOM, Study
from vjepa_fast.study.report.tables import (
    GEOMETRY_COLUMNS,
    compute_outcomes,
    compute_table,
    compute_unit,
    cost_table,
    geometry_table,
    tradeoff_axes,
)
from vjepa_fast.study.stats import MEAN, Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REGIME_COLOURS = {"single": COLOURS[0], "mixed": COLOURS[1]}
GEOMETRY = {key: name for key, (name, _) in GEOMETRY_COLUMNS.items() if key != "alpha_req"}


def _colour(name: str) -> str:
    return REGIME_COLOURS.get(name, COLOURS[2])


def forest(by_title: Mapping[str, Sequence[Comparison]], order: Sequence[str]) -> str | None:
    """Differences with their intervals, one panel per title, one line per variant in ``order``, one colour per regime.
    Thin with caps: t interval over seeds; thick and pale: bootstrap. Filled: above or below after correction; grey: not
    judged. A t interval that leaves the panel ends in an arrow.
    """
    shown = {title: found for title, found in by_title.items() if found}
    if not shown:
        return None
    order = [v for v in order if any(c.variant == v for found in shown.values() for c in found)]
    names = list(dict.fromkeys(c.regime for found in shown.values() for c in found))
    height = (0.17 + 0.14 * len(names)) * len(order) + 0.75
    with panels(len(shown), 2, 9.2, height, 0.5, "difference, percentage points", sharey=True) as (drawn, axes):
        for axis, (title, found) in zip(axes, shown.items()):
            limits = _limits(found)
            axis.axvline(0, color=INK, linewidth=0.9)
            for c in found:
                shift = (names.index(c.regime) - (len(names) - 1) / 2) * 0.62 / max(1, len(names))
                colour = GREY if c.barred else _colour(c.regime)
                _interval(axis, c, len(order) - 1 - order.index(c.variant) - shift, colour, limits)
            if MEAN in order:
                axis.axhline(len(order) - 1 - order.index(MEAN) + 0.5, color="#c3c8d0", linewidth=0.8)
            axis.set_xlim(limits)
            axis.set_ylim(-0.6, len(order) - 0.4)
            axis.set_title(title, loc="left")
            name_lines(axis, order)
        _forest_legend(drawn, names)
        return svg(drawn)


def answer(by_title: Mapping[str, Sequence[Comparison]], order: Sequence[str]) -> str | None:
    """The answer in one picture: mixed minus single few-shot accuracy, the mean over variants first and larger, each
    with its t interval, on a bar of the differences that this study may well miss (up to the minimum detectable one),
    between the margins of equivalence. One panel per outcome.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    shown = {title: found for title, found in by_title.items() if found}
    if not shown:
        return None
    order = [
        v for v in (MEAN, *(v for v in order if v != MEAN)) if any(c.variant == v for f in shown.values() for c in f)
    ]
    margin = 100 * next(iter(shown.values()))[0].margin
    with panels(
        len(shown), 2, 9.2, 0.3 * len(order) + 0.8, 0.55, "mixed minus single, percentage points", sharey=True
    ) as (drawn, axes):
        for axis, (title, found) in zip(axes, shown.items()):
            limits = _answer_limits(found)
            axis.axvspan(-margin, margin, color="#e3eefb", zorder=0)
            axis.axvline(0, color=INK, linewidth=0.9)
            for c in found:
                _answered(axis, c, len(order) - 1 - order.index(c.variant), limits)
            axis.set_xlim(limits)
            axis.set_ylim(-0.6, len(order) - 0.4)
            if MEAN in order and len(order) > 1:
                axis.axhline(len(order) - 1.5, color="#c3c8d0", linewidth=0.8)
            axis.set_title(title + (" (not judged)" if found[0].barred else ""), loc="left")
            name_lines(axis, list(order), 9.5)
        line = partial(Line2D, [], [], color=REGIME_COLOURS["mixed"])
        handles = {
            "difference, 95 % t interval over seeds": line(marker="o", markerfacecolor="white"),
            "filled: above or below after correction": line(marker="o", linewidth=0),
            "below the minimum detectable difference": Patch(color="#d4d8de"),
            f"equivalent: within {margin:g} points": Patch(color="#e3eefb"),
        }
        legend(drawn, handles, 2)
        return svg(drawn)


def _answer_limits(found: Sequence[Comparison]) -> tuple[float, float]:
    """Ends of a panel of the answer in points, around zero: all values, the margin, the mean's interval and detectable
    difference; what single variants have beyond twice of that is cut.
    """
    first = next((c for c in found if c.variant == MEAN), found[0])
    inner = [c.value for c in found] + [x for x in (first.low, first.high, first.detectable, first.margin) if x]
    wide = [x for c in found for x in (c.low, c.high, c.detectable) if x is not None]
    reach = 1.3 * max(map(abs, inner))
    return -100 * (end := min(max([reach, *map(abs, wide)]) * 1.05, 2 * reach)), 100 * end


def _answered(axis: Axes, c: Comparison, y: float, limits: tuple[float, float]) -> None:
    """One line of the answer."""
    whole = c.variant == MEAN
    colour = GREY if c.barred else REGIME_COLOURS["mixed"]
    if c.detectable is not None:
        half = min(100 * c.detectable, limits[1])
        axis.barh(y, 2 * half, left=-half, height=0.62 if whole else 0.42, color="#9aa3b0", alpha=0.42, zorder=1)
    if c.low is not None and c.high is not None:
        low, high = max(100 * c.low, limits[0]), min(100 * c.high, limits[1])
        axis.plot([low, high], [y, y], color=colour, linewidth=2.6 if whole else 1.3, zorder=2)
        for x, cut, arrow in ((low, 100 * c.low < limits[0], "<"), (high, 100 * c.high > limits[1], ">")):
            axis.plot(x, y, marker=arrow if cut else "|", color=colour, markersize=8 if whole else 5, clip_on=False)
    filled = colour if c.decided else "white"
    size = 9 if whole else 5
    axis.plot(100 * c.value, y, marker="o", markersize=size, color=colour, markerfacecolor=filled, zorder=3)


def _limits(found: Sequence[Comparison]) -> tuple[float, float]:
    """Ends of a panel in points: zero, all values and bootstrap ends, and t intervals as far as twice that."""
    inner = [x for c in found for x in (c.value, c.boot_low, c.boot_high) if x is not None]
    low, high = min(0.0, *inner), max(0.0, *inner)
    reach = 2 * max(-low, high, 0.0025)
    low = min([low, *(max(c.low, -reach) for c in found if c.low is not None)])
    high = max([high, *(min(c.high, reach) for c in found if c.high is not None)])
    edge = 0.06 * max(high - low, 0.005)
    return 100 * (low - edge), 100 * (high + edge)


def _interval(axis: Axes, c: Comparison, y: float, colour: str, limits: tuple[float, float]) -> None:
    if c.boot_low is not None and c.boot_high is not None:
        ends = [100 * c.boot_low, 100 * c.boot_high]
        axis.plot(ends, [y, y], color=colour, alpha=0.3, linewidth=5, solid_capstyle="butt")
    if c.low is not None and c.high is not None:
        low, high = max(100 * c.low, limits[0]), min(100 * c.high, limits[1])
        axis.plot([low, high], [y, y], color=colour, linewidth=1.2)
        for x, cut, arrow in ((low, 100 * c.low < limits[0], "<"), (high, 100 * c.high > limits[1], ">")):
            axis.plot(x, y, marker=arrow if cut else "|", color=colour, markersize=5, clip_on=False)
    filled = colour if c.decided else "white"
    axis.plot(100 * c.value, y, marker="o", markersize=5, color=colour, markerfacecolor=filled, zorder=3)


def _forest_legend(drawn: Figure, names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    line = partial(Line2D, [], [], color=_colour(names[0]) if len(names) == 1 else GREY)
    handles = {
        **({n: line(color=_colour(n), marker="o") for n in names} if len(names) > 1 else {}),
        "95 % t interval over seeds": line(marker="|", linewidth=1.2),
        "bootstrap": line(alpha=0.35, linewidth=5),
        "above or below after correction": line(marker="o", linewidth=0),
        "not so": line(marker="o", linewidth=0, markerfacecolor="white"),
    }
    legend(drawn, handles, 3 if len(handles) > 4 else 4)


def _axis_points(found: list[Comparison], outcomes: list) -> dict[str, np.ndarray]:
    """Per variant the mean over outcomes of its deltas, float [S] in points; variants with all outcomes only."""
    out: dict[str, list] = {}
    for c in found:
        if c.outcome in outcomes:
            out.setdefault(c.variant, []).append(dict(zip(c.seeds, c.deltas)))
    points = {}
    for variant, rows in out.items():
        seeds = set.intersection(*(set(r) for r in rows))
        if len(rows) == len(outcomes) and seeds:
            points[variant] = 100 * np.array([np.mean([r[s] for r in rows]) for s in sorted(seeds)])
    return points


def tradeoff(comparisons: Sequence[Comparison], study: Study) -> str | None:
    """Temporal against appearance deltas to the baseline, one panel per regime; bars are the range over seeds."""
    temporal, appearance = tradeoff_axes(study.outcomes)
    shown = {}
    for regime in study.regimes:
        found = [c for c in comparisons if (c.kind, c.regime, c.compat) == ("baseline", regime, study.compat)]
        x, y = _axis_points(found, appearance), _axis_points(found, temporal)
        if temporal and appearance and set(x) & set(y):
            shown[regime] = {v: (x[v], y[v]) for v in x if v in y}
    if not shown:
        return None
    crowded = max(len(points) for points in shown.values()) > 10  # one panel below the other then
    rows, cols = (len(shown), 1) if crowded or len(shown) == 1 else (1, len(shown))
    with figure(9.2, 5.4 * rows, rows, cols, sharex=True, sharey=True) as (drawn, axes):
        for axis, (regime, points) in zip(axes, shown.items()):
            axis.axhline(0, color=INK, linewidth=0.9)
            axis.axvline(0, color=INK, linewidth=0.9)
            for x, y in points.values():
                style = {"color": _colour(regime), "linewidth": 0.9, "alpha": 0.18 if crowded else 0.4}
                axis.plot([x.min(), x.max()], [y.mean()] * 2, **style)
                axis.plot([x.mean()] * 2, [y.min(), y.max()], **style)
                axis.plot(x.mean(), y.mean(), "o", color=_colour(regime), markersize=6)
            axis.set_title(regime, loc="left")
            axis.margins(0.12)
        drawn.supylabel(f"temporal: {_names(temporal)}, delta to baseline, points", fontsize=10, color=INK)
        drawn.supxlabel(f"appearance: {_names(appearance)}, delta to baseline, points", fontsize=10, color=INK)
        _settle(drawn)
        for axis, points in zip(axes, shown.values()):
            bars = [(x.min(), y.mean(), x.max(), y.mean()) for x, y in points.values()]
            bars += [(x.mean(), y.min(), x.mean(), y.max()) for x, y in points.values()]
            place_labels(axis, {v: (x.mean(), y.mean()) for v, (x, y) in points.items()}, bars)
        return svg(drawn)


def _settle(drawn: Figure) -> None:
    """Lay the figure out now and for good, so that what is placed by pixel stays where it was put."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(drawn).draw()  # it can measure text, which the SVG canvas cannot
    drawn.set_layout_engine("none")


def _names(outcomes: list[tuple[str, str]]) -> str:
    return " and ".join(s for s, _ in outcomes) + f" ({outcomes[0][1]})"


def place_labels(
    axis: Axes,
    points: Mapping[str, tuple[float, float]],
    bars: Sequence[tuple[float, float, float, float]] = (),
    size: float = 8.5,
) -> dict[str, tuple]:
    """Write each point's name where no other name, point or error bar is: the nearest free of 16 directions x 7
    distances, with a line back to the point where it is far. ``bars``: (left, bottom, right, top) in data units. The
    figure must be settled. Returns {name: (left, bottom, right, top)} in pixels.
    """
    renderer = axis.figure.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue]  # Agg, by _settle
    frame, scale = axis.get_window_extent(renderer), axis.figure.dpi / 72
    dots = {name: axis.transData.transform(xy) for name, xy in points.items()}
    taken = [(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in dots.values()]
    for bar in bars:
        (left, bottom), (right, top) = axis.transData.transform([bar[:2], bar[2:]])
        taken.append((left - scale, bottom - scale, right + scale, top + scale))
    boxes = {}
    for name, (x, y) in sorted(dots.items(), key=lambda item: -item[1][1]):
        text = axis.annotate(name, (0, 0), fontsize=size, color=INK, annotation_clip=False)
        extent = text.get_window_extent(renderer)
        text.remove()
        places = []
        for reach, turn in product((8, 14, 22, 32, 44, 60, 80), range(16)):
            angle = 2 * math.pi * turn / 16
            left = x + reach * scale * math.cos(angle) - extent.width * (1 - math.cos(angle)) / 2
            bottom = y + reach * scale * math.sin(angle) - extent.height / 2
            box = (left, bottom, left + extent.width, bottom + extent.height)
            outside = left < frame.x0 or box[2] > frame.x1 or bottom < frame.y0 or box[3] > frame.y1
            places.append((sum(_overlap(box, t) for t in taken) + (1e4 if outside else 0), reach, box))
        _, distance, box = min(places, key=itemgetter(0))  # the first of the best, so the nearest
        taken.append(box)
        boxes[name] = box
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        axis.annotate(
            name,
            points[name],
            tuple(axis.transData.inverted().transform(middle)),
            fontsize=size,
            color=INK,
            ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.7} if distance > 8 else None,
        )
    return boxes


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Area that two boxes share, in pixels."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def cost(study: Study) -> str | None:
    """What a step of each variant costs: milliseconds and, where measured, megabytes. Small marks are seeds."""
    table = cost_table(study)
    shown = [k for k in ("step_ms", "peak_mb") if any(r[k] is not None for r in table)]
    if not shown:
        return None
    order = study.variants
    titles = {"step_ms": "median ms per step", "peak_mb": "peak MB"}
    with figure(9.2, 0.29 * len(order) + 1.1, 1, len(shown), sharey=True) as (drawn, axes):
        for axis, key in zip(axes, shown):
            for row in (r for r in table if r[key] is not None):
                place = study.regimes.index(row["regime"])
                y = len(order) - 1 - order.index(row["variant"]) - (place - (len(study.regimes) - 1) / 2) * 0.34
                axis.barh(y, row[key], height=0.3, color=_colour(row["regime"]), alpha=0.75, label=row["regime"])
                seeds = row["values"][key]
                axis.plot(seeds, [y] * len(seeds), "|", color=INK, markersize=6, markeredgewidth=0.9)
            axis.set_title(titles[key], loc="left")
            name_lines(axis, order)
        legend(drawn, dict(zip(*reversed(axes[0].get_legend_handles_labels()))), 2)
        return svg(drawn)


def compute(study: Study) -> str | None:
    """Few-shot accuracy against what training cost: a row of panels per outcome and measure (time; FLOP where they were
    counted), a column per regime. Bars are the range over seeds; the dashed line is random init, which is not trained.
    """
    table, outcomes, unit = compute_table(study), compute_outcomes(study), compute_unit(study)
    axes_of = {"time": f"{unit}s of training", "pflop": "PFLOP of training"}
    places = list(product(outcomes, [k for k in axes_of if any(r[k] for r in table)], study.regimes))
    if not places:
        return None
    random, cols = study.runs(RANDOM, "none", "intended").values(), len(study.regimes)
    with figure(9.2, 3.3 * len(places) / cols, len(places) // cols, cols, sharey=True) as (drawn, axes):
        named = []
        for axis, (outcome, key, regime) in zip(axes, places):
            here = {r["variant"]: r for r in table if r["regime"] == regime and r[key] and outcome in r["outcomes"]}
            found = {
                v: (r[key], *(100 * r["outcomes"][outcome][k] for k in ("accuracy", "low", "high")))
                for v, r in here.items()
            }
            for at, value, low, high in found.values():
                axis.plot([at, at], [low, high], color=_colour(regime), linewidth=1, alpha=0.5)
                axis.plot(at, value, "o", color=_colour(regime), markersize=5.5)
            if levels := [100 * c.rows[outcome].accuracy for c in random if outcome in c.rows]:
                axis.axhline(float(np.mean(levels)), color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
            axis.set_title(f"{' '.join(outcome)}, {regime}", loc="left")
            axis.set_xlabel(axes_of[key])
            axis.margins(0.16)
            named.append(
                (axis, {v: p[:2] for v, p in found.items()}, [(x, low, x, high) for x, _, low, high in found.values()])
            )
        drawn.supylabel("accuracy, %", fontsize=10, color=INK)
        _settle(drawn)
        for axis, points, bars in named:
            place_labels(axis, points, bars, 8)
        return svg(drawn)


def curves(study: Study) -> str | None:
    """Loss over the steps, one panel per variant: seeds thin, their mean thick, regimes by colour. Losses of different
    objectives are sums of different terms, so every panel has its own axis.
    """
    found: dict[str, dict[str, list[dict]]] = {}
    for variant, regime in product(study.variants, study.regimes):
        lines = [c.curve for c in study.runs(variant, regime, study.compat).values() if c.curve.get("step")]
        if lines:
            found.setdefault(variant, {})[regime] = lines
    if not found:
        return None
    with panels(len(found), 4, 9.2, 1.75, 0.6, "step") as (drawn, axes):
        handles = {}
        for axis, (variant, by_regime) in zip(axes, found.items()):
            for regime, lines in by_regime.items():
                for line in lines:
                    y = smooth(np.asarray(line["loss"], dtype=float), max(1, len(line["loss"]) // 20))
                    axis.plot(line["step"], y, color=_colour(regime), linewidth=0.7, alpha=0.4)
                common = sorted(set.intersection(*(set(line["step"]) for line in lines)))
                mean = np.mean([[dict(zip(line["step"], line["loss"]))[s] for s in common] for line in lines], axis=0)
                if common:
                    y = smooth(mean, max(1, len(common) // 20))
                    (handles[regime],) = axis.plot(common, y, color=_colour(regime), linewidth=1.7)
            axis.set_title(variant, loc="left", fontsize=9.5)
            axis.xaxis.label.set_fontsize(9)
            axis.tick_params(labelsize=8)
            axis.locator_params(nbins=4)
            axis.margins(x=0.02)
        legend(drawn, handles, 2)
        return svg(drawn)


def geometry(study: Study) -> str | None:
    """Figures of the features' geometry per level (colour), one line per variant, one row of panels per regime."""
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    table = [r for r in geometry_table(study) if r["subspace"] == "all"]
    shown = [k for k in GEOMETRY if any(r[k] is not None for r in table)]
    if not shown:
        return None
    regimes = [r for r in study.regimes if any(t["regime"] == r for t in table)] or ["none"]
    order = [v for v in (RANDOM, *study.variants) if any(t["variant"] == v for t in table)]
    levels = sorted({t["level"] for t in table if t["level"] != "all"})
    shades = colormaps["viridis"](np.linspace(0.05, 0.9, max(1, len(levels))))
    height = len(regimes) * (0.22 * len(order) + 0.75) + 0.5
    with figure(9.2, height, len(regimes), len(shown), sharey=True, sharex="col") as (drawn, axes):
        for i, axis in enumerate(axes):
            regime, key = regimes[i // len(shown)], shown[i % len(shown)]
            for t in table:
                if t[key] is None or t["regime"] not in (regime, "none"):
                    continue
                y = len(order) - 1 - order.index(t["variant"])
                style: dict[str, Any] = {"marker": "D", "markerfacecolor": "none", "color": INK}
                if t["level"] != "all":
                    style = {"marker": "o", "color": shades[levels.index(t["level"])]}
                axis.plot(t[key], y, markersize=4.5, linewidth=0, **style)
            title = GEOMETRY[key] if regime == "none" else f"{GEOMETRY[key]}, {regime}"
            axis.set_title(title, loc="left", fontsize=9.5)
            axis.set_yticks(range(len(order)), order[::-1], fontsize=8.5)
            axis.tick_params(axis="y", length=0)
            axis.tick_params(axis="x", labelsize=8)
            axis.locator_params(axis="x", nbins=4)
        dot = partial(Line2D, [], [], linewidth=0)
        handles = {f"level {k + 1}": dot(color=s, marker="o") for s, k in zip(shades, levels)}
        if any(t["level"] == "all" for t in table):
            handles["all levels together"] = dot(color=INK, marker="D", markerfacecolor="none")
        legend(drawn, handles, len(handles))
        return svg(drawn)
