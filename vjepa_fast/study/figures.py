"""What all drawings share: colours, a matplotlib figure without global state, SVG text, PNG data URIs, smoothing.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#8a8f98"
INK = "#1f2733"


@contextmanager
def figure(
    width: float, height: float, rows: int = 1, cols: int = 1, **options: Any
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A matplotlib figure of ``rows x cols`` axes in the style of the reports; yields (figure, axes row by row).

    ``width`` and ``height`` are in inches; ``options`` go to ``Figure.subplots`` (such as ``sharey``).
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 10,
        "axes.edgecolor": "#c3c8d0",
        "axes.labelcolor": INK,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlecolor": INK,
        "xtick.color": "#4a5361",
        "ytick.color": "#4a5361",
        "axes.grid": True,
        "grid.color": "#e8ebf0",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "vjepa_fast",
        "legend.frameon": False,
        "lines.linewidth": 1.7,
        "text.parse_math": False,  # a name with a dollar sign is a name
    }
    with matplotlib.rc_context(style):
        made = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(made)
        yield made, list(made.subplots(rows, cols, squeeze=False, **options).flat)


def svg(drawn: Figure) -> str:
    """The figure as the text of an SVG file; equal figures give equal text."""
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="white")
    return buffer.getvalue()


def png(image: np.ndarray) -> str:
    """Data URI of uint8 ``[h, w, 3]``."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def smooth(y: np.ndarray, window: int) -> np.ndarray:
    """Running mean of ``y [N]`` over ``window`` points centred on each, fewer but as many on either side at both ends:
    a straight line stays where it is, so nothing lags.
    """
    n, total = len(y), np.cumsum(np.insert(np.asarray(y, dtype=np.float64), 0, 0.0))
    at = np.arange(n)
    reach = np.minimum(window // 2, np.minimum(at, n - 1 - at))
    return (total[at + reach + 1] - total[at - reach]) / (2 * reach + 1)


@contextmanager
def panels(
    n: int, columns: int, width: float, height: float, more: float, xlabel: str, **options: Any
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A `figure` of ``n`` panels, at most ``columns`` side by side; yields (figure, axes).

    ``height``: of a row of panels, in inches; ``more``: of what stands beside the rows. ``xlabel``: under the lowest
    panel of each column.
    """
    columns = min(columns, n)
    rows = -(-n // columns)
    with figure(width, rows * height + more, rows, columns, **options) as (drawn, axes):
        for axis in axes[n:]:
            axis.set_visible(False)
        for axis in axes[max(0, n - columns) : n]:
            axis.set_xlabel(xlabel)
        yield drawn, axes


def name_lines(axis: Axes, names: list[str], size: float = 9) -> None:
    """Give the y axis a line per name, the first on top."""
    axis.set_yticks(range(len(names)), names[::-1], fontsize=size)
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)


def legend(drawn: Figure, handles: Mapping[str, Any], columns: int, size: float = 9) -> None:
    """A legend of artists by name below the panels."""
    drawn.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=size)
