"""Curves, times and confusions of runs, as PNGs."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np

from disco_jax.evaluate import plots
from disco_jax.report.runs import Run

_RATES = ("learning_rate", "ema_rate", "weight_decay", "gradient_norm")
_SPEED = ("images_per_s", "data_wait_share", "goodput/share")
# In metrics.jsonl, but no news in a picture: parts of others, or the time of the x axis.
_LEFT_OUT = ("epoch", "steps_per_s", "images_per_s_per_device")
_COLUMNS = 3
_MOST_CLASSES = 200  # a larger confusion matrix shows nothing


def group(key: str) -> str:
    """The figure that a metric belongs to; "" for none."""
    if key in _LEFT_OUT or (key.startswith("goodput/") and key not in _SPEED):
        return ""
    if key == "loss" or key.endswith("/loss"):
        return "losses"
    if key.startswith(("knn/", "test/", "plane/")):
        return "knn"
    if key in _RATES:
        return "rates"
    return "speed" if key in _SPEED else "health"


def of_group(keys: Sequence[str], name: str) -> list[str]:
    """Those of `keys` that are in a figure, the loss that is learned from first."""
    return sorted((key for key in keys if group(key) == name), key=lambda key: key != "loss")


def curves(runs: Sequence[Run], keys: Sequence[str]) -> bytes:
    """A panel a metric against the step, a line a run.

    Args:
      runs: at most as many as there are colours; more repeat them.
      keys: of metrics that some of the runs have; at least one.
    """
    pyplot = plots.agg()
    lines = math.ceil(len(keys) / _COLUMNS)
    figure, all_axes = pyplot.subplots(
        lines, _COLUMNS, figsize=(12.0, 2.6 * lines), layout="constrained", squeeze=False
    )
    for axes in all_axes.flat[len(keys) :]:
        axes.set_visible(False)
    for axes, key in zip(all_axes.flat, keys, strict=False):
        for i, run in enumerate(runs):
            steps, values = run.series(key)
            mark = "o" if len(steps) < 3 else None
            colour = plots.COLOURS[i % len(plots.COLOURS)]
            axes.plot(steps, values, color=colour, lw=1.4, marker=mark, ms=4, label=run.name)
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
    """A bar of where the time of a run went.

    Args:
      seconds: part -> seconds, all of them 0 or more and one above.
    """
    pyplot = plots.agg()
    figure, axes = pyplot.subplots(figsize=(12.0, 1.5), layout="constrained")
    total, left = sum(seconds.values()), 0.0
    for i, (part, spent) in enumerate(seconds.items()):
        share = 100 * spent / total
        label = f"{part} {share:.1f} %"
        axes.barh(0, share, left=left, color=plots.COLOURS[i % len(plots.COLOURS)], label=label)
        left += share
    axes.set(xlim=(0, 100), yticks=(), xlabel="share of the time (%)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(seconds), frameon=False, fontsize=8)
    return _png(figure)


def confusion(table: np.ndarray) -> bytes | None:
    """Shares of each class that went to each class; None where there are too many to see.

    Args:
      table: i[C, C], images of class i that were taken for class j.
    """
    if len(table) > _MOST_CLASSES:
        return None
    pyplot = plots.agg()
    figure, axes = pyplot.subplots(figsize=(4.6, 4.0), layout="constrained")
    shares = 100 * table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    axes.set(xlabel="taken for class", ylabel="class")
    figure.colorbar(image, ax=axes, label="%", shrink=0.8)
    return _png(figure)


def _png(figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    plots.agg().close(figure)
    return stream.getvalue()
