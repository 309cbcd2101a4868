"""Curves, time breakdowns and confusion matrices of runs, as PNGs."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np

from disco_jax.evaluate import plots
from disco_jax.report.runs import Run

_RATES = ("learning_rate", "ema_rate", "weight_decay", "gradient_norm")
_SPEED = ("images_per_s", "data_wait_share", "goodput/share")
# Metrics that are not plotted, because other metrics or the x axis already show them.
_NOT_PLOTTED = ("epoch", "steps_per_s", "images_per_s_per_device")
_COLUMNS = 3
_MAX_CLASSES = 200  # larger confusion matrices are not readable


def group(key: str) -> str:
    """Returns the figure that a metric belongs to, or "" if it is not plotted."""
    if key in _NOT_PLOTTED or (key.startswith("goodput/") and key not in _SPEED):
        return ""
    if key == "loss" or key.endswith("/loss"):
        return "losses"
    if key.startswith(("knn/", "test/", "plane/")):
        return "knn"
    if key in _RATES:
        return "rates"
    return "speed" if key in _SPEED else "health"


def keys_in_group(keys: Sequence[str], name: str) -> list[str]:
    """Returns those of `keys` that belong to a figure, the total loss first."""
    return sorted((key for key in keys if group(key) == name), key=lambda key: key != "loss")


def curves(runs: Sequence[Run], keys: Sequence[str]) -> bytes:
    """Plots metrics against the step, with a panel per metric and a line per run.

    Args:
      runs: runs to plot; the colours repeat if there are more runs than colours.
      keys: metrics that at least one of the runs has; at least one.
    """
    pyplot = plots.agg()
    panel_rows = math.ceil(len(keys) / _COLUMNS)
    figure, all_axes = pyplot.subplots(
        panel_rows, _COLUMNS, figsize=(12.0, 2.6 * panel_rows), layout="constrained", squeeze=False
    )
    for axes in all_axes.flat[len(keys) :]:
        axes.set_visible(False)
    for axes, key in zip(all_axes.flat, keys, strict=False):
        for i, run in enumerate(runs):
            steps, values = run.series(key)
            marker = "o" if len(steps) < 3 else None
            colour = plots.COLOURS[i % len(plots.COLOURS)]
            axes.plot(steps, values, color=colour, lw=1.4, marker=marker, ms=4, label=run.name)
        axes.set_title(key, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.set_xlabel("step", fontsize=8)
        axes.ticklabel_format(useOffset=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        handles, names = all_axes.flat[0].get_legend_handles_labels()
        figure.legend(
            handles, names, loc="outside lower center", ncols=min(len(runs), 4), frameon=False
        )
    return _png(figure)


def times(seconds: Mapping[str, float]) -> bytes:
    """Plots a bar that shows how the time of a run was spent.

    Args:
      seconds: part -> seconds, none negative and at least one positive.
    """
    pyplot = plots.agg()
    figure, axes = pyplot.subplots(figsize=(12.0, 1.5), layout="constrained")
    total, offset = sum(seconds.values()), 0.0
    for i, (part, part_seconds) in enumerate(seconds.items()):
        share = 100 * part_seconds / total
        label = f"{part} {share:.1f} %"
        axes.barh(0, share, left=offset, color=plots.COLOURS[i % len(plots.COLOURS)], label=label)
        offset += share
    axes.set(xlim=(0, 100), yticks=(), xlabel="share of the time (%)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(seconds), frameon=False, fontsize=8)
    return _png(figure)


def confusion(table: np.ndarray) -> bytes | None:
    """Plots the percentage of each class that was predicted as each class, or returns None.

    Args:
      table: i[C, C], number of images of class i predicted as class j; None is returned if C is
        above `_MAX_CLASSES`.
    """
    if len(table) > _MAX_CLASSES:
        return None
    pyplot = plots.agg()
    figure, axes = pyplot.subplots(figsize=(4.6, 4.0), layout="constrained")
    shares = 100 * table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    axes.set(xlabel="predicted class", ylabel="class")
    figure.colorbar(image, ax=axes, label="%", shrink=0.8)
    return _png(figure)


def _png(figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    plots.agg().close(figure)
    return stream.getvalue()
