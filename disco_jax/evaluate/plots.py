"""Figures of evaluations, drawn without a display."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from disco_jax.evaluate import information

# Distinguishable with common colour vision deficiencies (Okabe and Ito).
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
    "#b0a000",
    "#7a4fb5",
    "#8c564b",
)
MARKERS = "osD^vP*X<>"


def plane(paths: Mapping[str, Sequence[Mapping[str, float]]], file: epath.Path) -> None:
    """Plots information plane trajectories: complete, and from transition to convergence.

    Args:
      paths: name -> points with "input_bits", "label_bits" and "top1", in training order.
      file: a PNG.
    """
    pyplot = agg()
    figure, (whole_axes, compression_axes) = pyplot.subplots(
        1, 2, figsize=(12, 4.8), layout="constrained"
    )
    for i, (name, path) in enumerate(paths.items()):
        style = dict(color=COLOURS[i % len(COLOURS)], lw=1.5, marker=".", ms=4)
        x, y = (np.array([p[key] for p in path]) for key in ("input_bits", "label_bits"))
        turn = information.turning_point(x)
        whole_axes.plot(x, y, **style)
        compression_axes.plot(
            x[turn:], y[turn:], **style, label=f"{name}: C {path[-1]['top1']:.1f} % top-1"
        )
        for axes in (whole_axes, compression_axes):
            axes.plot(x[turn], y[turn], "o", color=style["color"], ms=9, mfc="white", mew=1.8)
            axes.plot(x[-1], y[-1], "*", color=style["color"], ms=13)
    compression_axes.plot(
        [], [], "o", color="#555555", ms=8, mfc="white", mew=1.8, label="T, transition"
    )
    compression_axes.plot([], [], "*", color="#555555", ms=11, label="C, convergence")
    whole_axes.set(title="The whole training", xlabel="I(X;T) (bits)", ylabel="I(T;Y) (bits)")
    compression_axes.set(
        title="Compression: from T to C", xlabel="I(X;T) (bits)", ylabel="I(T;Y) (bits)"
    )
    for axes in (whole_axes, compression_axes):
        axes.margins(0.12)
        axes.ticklabel_format(useOffset=False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    _save(figure, file)


def embeddings(
    places: Mapping[str, np.ndarray],
    labels: np.ndarray,
    names: Sequence[str],
    file: epath.Path,
) -> None:
    """Plots 2-D embeddings side by side, with a colour and a marker per class.

    Args:
      places: title -> f32[N, 2].
      labels: i32[N], indices into `names`.
      names: class names.
      file: a PNG.
    """
    pyplot = agg()
    count = len(places)
    figure, all_axes = pyplot.subplots(
        1, count, figsize=(4.2 * count + 1.2, 4.4), layout="constrained", squeeze=False
    )
    for axes, (title, points) in zip(all_axes[0], places.items(), strict=True):
        for i, name in enumerate(names):
            of_class = points[labels == i]
            axes.scatter(
                of_class[:, 0],
                of_class[:, 1],
                s=9,
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                linewidths=0,
                alpha=0.75,
                label=name if axes is all_axes[0][0] else None,
            )
        axes.set(title=title, xticks=(), yticks=())
    figure.legend(loc="outside right center", frameon=False, fontsize=9, markerscale=2)
    _save(figure, file)


def accuracy_of_size(rows: Sequence[Mapping[str, Any]], file: epath.Path) -> None:
    """Plots top-1 against millions of parameters, with a point per run and a line per method.

    Args:
      rows: with "parameters", "top1", "method" and "backbone".
      file: a PNG.
    """
    figure, axes = _axes((7.5, 5.0))
    for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        of_method = sorted(
            (r for r in rows if r["method"] == method), key=lambda r: r["parameters"]
        )
        x, y = [r["parameters"] / 2**20 for r in of_method], [r["top1"] for r in of_method]
        colour, mark = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axes.plot(x, y, color=colour, marker=mark, ms=8, lw=1.2, label=method)
        for row, point in zip(of_method, zip(x, y, strict=True), strict=True):
            axes.annotate(
                row["backbone"], point, (0, 9), textcoords="offset points", fontsize=8, ha="center"
            )
    axes.set(xlabel="parameters of the backbone (M = 2^20)", ylabel="top-1 (%)")
    axes.margins(0.15)
    axes.legend(frameon=False, loc="best")
    _save(figure, file)


def _axes(size: tuple[float, float]):
    return agg().subplots(figsize=size, layout="constrained")


def agg():
    """Returns `matplotlib.pyplot` with the Agg backend, which draws to files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, file: epath.Path) -> None:
    with file.open("wb") as stream:
        figure.savefig(stream, format="png", dpi=130)
    agg().close(figure)
