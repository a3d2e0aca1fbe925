"""The pictures of the demo's report as data URIs: SVG for curves, PNG for pixels.

Objectives differ by colour, regimes by line style, kinds of encoder by marker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vjepa_fast.evaluation import Row
from vjepa_fast.study.demo.records import MaskPicture, PcaPicture, RunRecord
from vjepa_fast.study.figures import COLOURS, GREY, figure, finish_panels, panels, png, smooth, svg

MARKERS = {"random": "s", "pixels": "D", "supervised": "^", "pretrained": "o"}
DASHES = ("-", (0, (4, 2)), ":", "-.")


# ---------------------------------------------------------------- curves


def _styles(runs: Sequence[RunRecord]) -> dict[str, dict]:
    objectives = list(dict.fromkeys(r.objective for r in runs))
    regimes = list(dict.fromkeys(r.regime for r in runs))
    return {
        r.name: {
            "color": COLOURS[objectives.index(r.objective) % len(COLOURS)],
            "linestyle": DASHES[regimes.index(r.regime) % len(DASHES)],
        }
        for r in runs
    }


def _curves(runs: Sequence[RunRecord], series: Mapping[str, dict[str, tuple]], smoothed: bool) -> str | None:
    """One panel per title; ``series[title][run] = (steps, values)``; None where there is nothing to draw."""
    series = {title: lines for title, lines in series.items() if lines}
    if not series:
        return None
    styles = _styles(runs)
    rows, cols = panels(len(series), 2)
    with figure(8.2, 2.2 * rows + 0.6, rows, cols) as (drawn, axes):
        handles = {}
        for axis, (title, lines) in zip(axes, series.items()):
            for run, (steps, values) in lines.items():
                y = np.asarray(values, dtype=float)
                if smoothed:
                    axis.plot(steps, y, **{**styles[run], "linewidth": 0.7, "alpha": 0.3})
                    y = smooth(y, max(1, len(y) // 12))
                (handles[run],) = axis.plot(steps, y, marker="o" if len(y) < 3 else None, markersize=3, **styles[run])
            axis.set_title(title, loc="left")
            axis.margins(x=0.02)
        finish_panels(axes, len(series), cols, "step")
        drawn.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)), fontsize=9.5
        )
        return svg(drawn)


def _line(metrics: Sequence[dict], value: Callable[[dict], float | None]) -> tuple:
    """(steps, values) of the metric rows that have the value."""
    found = [(m["step"], v) for m in metrics if (v := value(m)) is not None]
    return tuple(zip(*found)) if found else ((), ())


def loss_curves(runs: Sequence[RunRecord]) -> str | None:
    """One panel per loss term, one line per run (unweighted terms; the first panel is the weighted total)."""
    series: dict[str, dict] = {"total (weighted)": {}}
    for run in runs:
        total = _line(run.metrics, lambda m: m.get("loss"))
        if total[0]:
            series["total (weighted)"][run.name] = total
        for term in dict.fromkeys(t for m in run.metrics for t in m.get("terms", {})):
            line = _line(run.metrics, lambda m, term=term: m.get("terms", {}).get(term))
            series.setdefault(term, {})[run.name] = line
    return _curves(runs, series, smoothed=True)


MONITORS = {
    "rankme": "RankMe (effective rank)",
    "feature_std": "feature standard deviation",
    "target_var": "target variance",
}


def monitor_curves(runs: Sequence[RunRecord]) -> str | None:
    """Collapse monitors over the steps, and the learning rate in force."""
    series: dict[str, dict] = {title: {} for title in MONITORS.values()}
    for run in runs:
        for key, title in MONITORS.items():
            line = _line(run.metrics, lambda m, key=key: (m.get("monitors") or {}).get(key))
            if line[0]:
                series[title][run.name] = line
        rate = _line(run.metrics, lambda m: m.get("lr"))
        if rate[0]:
            series.setdefault("learning rate", {})[run.name] = rate
    return _curves(runs, series, smoothed=False)


def committed_curves(curves: Sequence[dict]) -> str | None:
    """Loss of the committed long run, one line per seed."""
    lines = {f"seed {c['seed']}": (c["step"], c["loss"]) for c in curves if c.get("step")}
    return _curves([RunRecord(name, name, "") for name in lines], {"loss": lines}, smoothed=True)


# ---------------------------------------------------------------- accuracies


def palette(labels: list[str], kinds: dict[str, str]) -> dict[str, str]:
    """A colour per label: grey for the controls, one hue per run (a run's student, "name, student", shares its hue)."""
    runs = list(dict.fromkeys(_run(label) for label in labels if kinds[label] == "pretrained"))
    return {k: COLOURS[runs.index(_run(k)) % len(COLOURS)] if kinds[k] == "pretrained" else GREY for k in labels}


def _run(label: str) -> str:
    return label.split(",")[0]


def accuracy_dots(rows: Sequence[Row], suites: list[str], probe_of: dict[str, str]) -> str | None:
    """Accuracy with its 95 % interval per row, one panel per suite; the band is the random-init interval."""
    suites = [s for s in suites if any(r.suite == s for r in rows)]
    if not suites:
        return None
    labels = list(dict.fromkeys(r.label for r in rows))
    kinds = {r.label: r.kind for r in rows}
    colour = palette(labels, kinds)
    lines, cols = panels(len(suites), 2)
    with figure(8.2, lines * (0.24 * len(labels) + 0.9), lines, cols, sharey=True) as (drawn, axes):
        for axis, suite in zip(axes, suites):
            probe = probe_of[suite]
            here = {r.label: r for r in rows if r.suite == suite and r.probe in (probe, "supervised")}
            for r in here.values():
                y = len(labels) - 1 - labels.index(r.label)
                if r.kind == "random":
                    axis.axvspan(100 * r.low, 100 * r.high, color="#e9edf3", zorder=0)
                axis.errorbar(
                    100 * r.accuracy,
                    y,
                    xerr=_bars(r),
                    fmt=MARKERS[r.kind],
                    color=colour[r.label],
                    markersize=5,
                    capsize=2,
                )
            chance = next(iter(here.values())).chance if here else 0
            axis.axvline(100 * chance, color="#b8485a", linewidth=1, linestyle=(0, (2, 2)))
            axis.set_title(f"{suite} ({probe})", loc="left")
            axis.set_yticks(range(len(labels)), labels[::-1], fontsize=8.5)
            axis.grid(axis="y", visible=False)
        finish_panels(axes, len(suites), cols, "accuracy, %")
        return svg(drawn)


def _bars(row: Row) -> np.ndarray:
    return 100 * np.clip([[row.accuracy - row.low], [row.high - row.accuracy]], 0, 1)


def tradeoff(rows: Sequence[Row], motion: str, appearance: str, probe: str) -> str | None:
    """Accuracy on the motion suite against the appearance suite, both with 95 % intervals."""
    x, y = (
        {r.label: r for r in rows if r.suite == s and r.probe in (probe, "supervised")} for s in (appearance, motion)
    )
    both = [label for label in x if label in y]
    if not both:
        return None
    colour = palette(both, {label: x[label].kind for label in both})
    with figure(7.6, 5.0) as (drawn, (axis,)):
        for label in both:
            axis.errorbar(
                100 * x[label].accuracy,
                100 * y[label].accuracy,
                xerr=_bars(x[label]),
                yerr=_bars(y[label]),
                color=colour[label],
                fmt=MARKERS[x[label].kind],
                markersize=7,
                capsize=2.5,
                elinewidth=1.1,
                label=label,
                markerfacecolor="white" if label.endswith("student") else colour[label],
            )
        for label in both:
            if x[label].kind == "random":
                axis.axvline(100 * x[label].accuracy, color=GREY, linewidth=0.8, linestyle=(0, (3, 3)))
                axis.axhline(100 * y[label].accuracy, color=GREY, linewidth=0.8, linestyle=(0, (3, 3)))
        axis.set_xlabel(f"appearance: {appearance} accuracy, %")
        axis.set_ylabel(f"motion: {motion} accuracy, %")
        drawn.legend(loc="outside lower center", ncols=3, fontsize=8.5)
        return svg(drawn)


# ---------------------------------------------------------------- pixels


def _enlarge(image_ThwC: np.ndarray, size: int) -> np.ndarray:
    """Nearest-neighbour resize of ``[T, h, w, C]`` to ``[T, size, size, C]``."""
    rows = np.arange(size) * image_ThwC.shape[1] // size
    cols = np.arange(size) * image_ThwC.shape[2] // size
    return image_ThwC[:, rows][:, :, cols]


def strip(frames: np.ndarray, size: int = 96, gap: int = 4) -> np.ndarray:
    """Frames uint8 ``[T, h, w, 3]`` side by side on white: ``[size, T*size + gaps, 3]``."""
    big = _enlarge(frames, size)
    out = np.full((size, len(big) * (size + gap) - gap, 3), 255, np.uint8)
    for t, frame in enumerate(big):
        out[:, t * (size + gap) : t * (size + gap) + size] = frame
    return out


def masked(frames: np.ndarray, predicted: np.ndarray, size: int = 96) -> np.ndarray:
    """Frames with the predicted tokens (bool ``[T, H, W]``) veiled and the edges of the veil drawn."""
    big = _enlarge(frames, size).astype(np.float32)
    veil = _enlarge(predicted[..., None], size)
    out = np.where(veil, 0.22 * big + 0.78 * np.array([232.0, 120.0, 60.0]), big)
    edge = np.zeros_like(veil)
    edge[:, 1:] |= veil[:, 1:] != veil[:, :-1]
    edge[:, :, 1:] |= veil[:, :, 1:] != veil[:, :, :-1]
    return np.where(edge, 255, out).astype(np.uint8)


def heat(saliency: np.ndarray, size: int = 96) -> np.ndarray:
    """Saliency float ``[T, H, W]`` in [0, 1] as colours uint8 ``[T, size, size, 3]``."""
    from matplotlib import colormaps

    rgb = colormaps["magma"](np.clip(saliency, 0, 1))[..., :3]
    return _enlarge((255 * rgb).astype(np.uint8), size)


def mask_strips(picture: MaskPicture, size: int = 96) -> dict[str, str]:
    """Data URIs: the frames, the motion map, and both masks over the frames."""
    out = {
        "frames": png(strip(picture.frames, size)),
        "plain": png(strip(masked(picture.frames, picture.plain, size), size)),
        "guided": png(strip(masked(picture.frames, picture.guided, size), size)),
    }
    if picture.saliency is not None:
        out["saliency"] = png(strip(heat(picture.saliency, size), size))
    return out


def pca_rgb(tokens: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """First three principal components of tokens float ``[N, D]`` as colours uint8 ``[T, H, W, 3]``, 2nd to 98th
    percentile.

    The sign of each component is fixed so that its largest loading is positive.
    """
    x = np.asarray(tokens, dtype=np.float64)
    x = x - x.mean(0)
    _, _, axes = np.linalg.svd(x, full_matrices=False)
    axes = axes[:3]
    axes = axes * np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]
    y = x @ axes.T
    if y.shape[1] < 3:
        y = np.pad(y, ((0, 0), (0, 3 - y.shape[1])))
    low, high = np.percentile(y, 2, axis=0), np.percentile(y, 98, axis=0)
    y = np.clip((y - low) / np.maximum(high - low, 1e-12), 0, 1)
    return (255 * y).astype(np.uint8).reshape(*grid, 3)


def pca_strips(picture: PcaPicture, size: int = 96) -> dict[str, str]:
    """Data URIs: the frames under "frames", then one strip per encoder."""
    return {"frames": png(strip(picture.frames, size)), **{k: png(strip(m, size)) for k, m in picture.maps.items()}}
