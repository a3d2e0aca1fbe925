"""The pictures of the demo's report as data URIs: SVG for curves, PNG for pixels.

Objectives differ by colour, regimes by line style, kinds of encoder by marker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vjepa_fast.evaluation import Row
from vjepa_fast.study.demo.records import ClipPicture, RunRecord
from vjepa_fast.study.figures import COLOURS, GREY, figure, legend, panels, png, smooth, svg

MARKERS = {"random": "s", "pixels": "D", "supervised": "^", "pretrained": "o"}
DASHES = ("-", (0, (4, 2)), ":", "-.")


def _curves(runs: Sequence[RunRecord], series: Mapping[str, dict[str, tuple]], smoothed: bool) -> str | None:
    """One panel per title; ``series[title][run] = (steps, values)``; None where there is nothing to draw."""
    if not any(series.values()):
        return None
    objectives, regimes = (list(dict.fromkeys(names)) for names in zip(*((r.objective, r.regime) for r in runs)))
    styles: dict[str, dict] = {}
    for r in runs:
        colour, dash = objectives.index(r.objective) % len(COLOURS), regimes.index(r.regime) % len(DASHES)
        styles[r.name] = {"color": COLOURS[colour], "linestyle": DASHES[dash]}
    with panels(len(series), 2, 8.2, 2.2, 0.6, "step") as (drawn, axes):
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
        legend(drawn, handles, min(4, len(handles)), 9.5)
        return svg(drawn)


def _series(runs: Sequence[RunRecord], values: Mapping[str, Sequence[str]]) -> dict[str, dict[str, tuple]]:
    """{title: {run: (steps, values)}} of what the metric rows have at each title's path of keys."""
    out: dict[str, dict[str, tuple]] = {}
    for title, path in values.items():
        for run in runs:
            found = []
            for row in run.metrics:
                value = row
                for key in path:
                    value = (value or {}).get(key)
                found += [] if value is None else [(row["step"], value)]
            if found:
                out.setdefault(title, {})[run.name] = tuple(zip(*found))
    return out


def loss_curves(runs: Sequence[RunRecord]) -> str | None:
    """One panel per loss term, one line per run (unweighted terms; the first panel is the weighted total)."""
    terms = dict.fromkeys(term for run in runs for row in run.metrics for term in row.get("terms", {}))
    values = {"total (weighted)": ["loss"], **{term: ["terms", term] for term in terms}}
    return _curves(runs, _series(runs, values), smoothed=True)


def monitor_curves(runs: Sequence[RunRecord]) -> str | None:
    """Collapse monitors over the steps, and the learning rate in force."""
    values = {
        "RankMe (effective rank)": ["monitors", "rankme"],
        "feature standard deviation": ["monitors", "feature_std"],
        "target variance": ["monitors", "target_var"],
        "learning rate": ["lr"],
    }
    return _curves(runs, _series(runs, values), smoothed=False)


def committed_curves(curves: Sequence[dict]) -> str | None:
    """Loss of the committed long run, one line per seed."""
    lines = {f"seed {c['seed']}": (c["step"], c["loss"]) for c in curves if c.get("step")}
    return _curves([RunRecord(name, name, "") for name in lines], {"loss": lines}, smoothed=True)


def _colours(labels: Sequence[str], kinds: Mapping[str, str]) -> dict[str, str]:
    """A colour per label: grey for the controls, one hue per run (a run's student, "name, student", shares its hue)."""
    runs = list(dict.fromkeys(k.split(",")[0] for k in labels if kinds[k] == "pretrained"))
    hues = {run: COLOURS[i % len(COLOURS)] for i, run in enumerate(runs)}
    return {k: hues[k.split(",")[0]] if kinds[k] == "pretrained" else GREY for k in labels}


def accuracy_dots(rows: Sequence[Row], probe_of: Mapping[str, str]) -> str | None:
    """Accuracy with its 95 % interval per row, one panel per suite and the probe to show of it; the band is the
    random-init interval.
    """
    if not probe_of:
        return None
    kinds = {r.label: r.kind for r in rows}
    labels, colour = list(kinds), _colours(list(kinds), kinds)
    with panels(len(probe_of), 2, 8.2, 0.24 * len(labels) + 0.9, 0, "accuracy, %", sharey=True) as (drawn, axes):
        for axis, (suite, probe) in zip(axes, probe_of.items()):
            here = {r.label: r for r in rows if r.suite == suite and r.probe in (probe, "supervised")}
            for r in here.values():
                y = len(labels) - 1 - labels.index(r.label)
                if r.kind == "random":
                    axis.axvspan(100 * r.low, 100 * r.high, color="#e9edf3", zorder=0)
                style = {"fmt": MARKERS[r.kind], "color": colour[r.label], "markersize": 5, "capsize": 2}
                axis.errorbar(100 * r.accuracy, y, xerr=_bars(r), **style)
            chance = next(iter(here.values())).chance if here else 0
            axis.axvline(100 * chance, color="#b8485a", linewidth=1, linestyle=(0, (2, 2)))
            axis.set_title(f"{suite} ({probe})", loc="left")
            axis.set_yticks(range(len(labels)), labels[::-1], fontsize=8.5)
            axis.grid(axis="y", visible=False)
        return svg(drawn)


def _bars(row: Row) -> np.ndarray:
    return 100 * np.clip([[row.accuracy - row.low], [row.high - row.accuracy]], 0, 1)


def tradeoff(rows: Sequence[Row], up: tuple[str, str], right: tuple[str, str]) -> str | None:
    """Accuracy of two outcomes (suite, probe), with 95 % intervals; None where no encoder has both."""
    x, y = ({r.label: r for r in rows if r.suite == s and r.probe in (p, "supervised")} for s, p in (right, up))
    both = [label for label in x if label in y]
    if not both:
        return None
    colour = _colours(both, {label: x[label].kind for label in both})
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
        axis.set_xlabel(f"{' '.join(right)} accuracy, %")
        axis.set_ylabel(f"{' '.join(up)} accuracy, %")
        drawn.legend(loc="outside lower center", ncols=3, fontsize=8.5)
        return svg(drawn)


def _enlarge(image_ThwC: np.ndarray, size: int) -> np.ndarray:
    """Nearest-neighbour resize of ``[T, h, w, C]`` to ``[T, size, size, C]``."""
    rows = np.arange(size) * image_ThwC.shape[1] // size
    cols = np.arange(size) * image_ThwC.shape[2] // size
    return image_ThwC[:, rows][:, :, cols]


def strip(frames: np.ndarray, size: int = 96, gap: int = 4) -> str:
    """Data URI of frames uint8 ``[T, h, w, 3]`` side by side on white, each ``size`` pixels wide and high."""
    white = np.full((size, gap, 3), 255, np.uint8)
    parts = [part for frame in _enlarge(frames, size) for part in (white, frame)]
    return png(np.concatenate(parts[1:], axis=1))


def masked(frames: np.ndarray, predicted: np.ndarray, size: int = 96) -> np.ndarray:
    """Frames with the predicted tokens (bool ``[T, H, W]``) veiled and the edges of the veil drawn."""
    big = _enlarge(frames, size).astype(np.float32)
    veil = _enlarge(predicted[..., None], size)
    out = np.where(veil, 0.22 * big + 0.78 * np.array([232.0, 120.0, 60.0]), big)
    edge = np.zeros_like(veil)
    edge[:, 1:] |= veil[:, 1:] != veil[:, :-1]
    edge[:, :, 1:] |= veil[:, :, 1:] != veil[:, :, :-1]
    return np.where(edge, 255, out).astype(np.uint8)


def overlay(frames: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Frames uint8 ``[T, S, S, 3]`` in grey under the share of each token as heat, float ``[T, H, W]`` adding up to 1:
    0 is dark, twice the mean or more is bright.
    """
    from matplotlib import colormaps
    from PIL import Image

    size = frames.shape[1:3]
    level = np.clip(share * share.size / 2, 0, 1).astype(np.float32)
    wide = [np.asarray(Image.fromarray(x).resize(size[::-1], Image.Resampling.BICUBIC)) for x in level]
    heat = 255 * colormaps["magma"](np.clip(np.stack(wide), 0, 1))[..., :3]
    grey = frames.mean(-1, keepdims=True)
    return (0.4 * grey + 0.6 * heat).astype(np.uint8)


def strips(picture: ClipPicture) -> dict[str, str]:
    """Data URIs: the frames, the motion map, and both masks over the frames."""
    from matplotlib import colormaps

    heat = colormaps["magma"](np.clip(picture.saliency, 0, 1))[..., :3]
    return {
        "frames": strip(picture.frames),
        "plain": strip(masked(picture.frames, picture.plain)),
        "guided": strip(masked(picture.frames, picture.guided)),
        "saliency": strip((255 * heat).astype(np.uint8)),
    }


def pca_rgb(tokens: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """First three principal components of tokens float ``[N, D]`` as colours uint8 ``[T, H, W, 3]``, 2nd to 98th
    percentile; the sign of each is fixed so that its largest loading is positive.
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
