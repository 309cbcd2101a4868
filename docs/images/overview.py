"""Draws `overview.svg`, the picture of one DisCo training step in README.md.

python docs/images/overview.py [OUTPUT.svg]
"""

import pathlib
import sys

import matplotlib

matplotlib.use("svg")
from matplotlib import patches, pyplot

TEACHER, STUDENT, MOMENTUM, LOSS, GREY = "#4c78a8", "#e45756", "#f2a45c", "#54a24b", "#666666"


def box(axes, x, y, width, height, text, color, style="solid"):
    """Draws a rounded box with its lower left corner at (x, y)."""
    axes.add_patch(
        patches.FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=color + "26",
            edgecolor=color,
            linestyle=style,
            linewidth=1.4,
        )
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def arrow(axes, start, end, color=GREY, style="solid", bend=0.0):
    """Draws an arrow between two points."""
    axes.annotate(
        "",
        xy=end,
        xytext=start,
        arrowprops=dict(
            arrowstyle="-|>",
            color=color,
            linestyle=style,
            linewidth=1.3,
            shrinkA=0,
            shrinkB=0,
            connectionstyle=f"arc3,rad={bend}",
        ),
    )


def label(axes, x, y, text, color=GREY):
    axes.text(x, y, text, ha="center", va="center", fontsize=8, color=color)


def draw():
    """Returns the figure: images on the left, three networks, losses on the right."""
    figure, axes = pyplot.subplots(figsize=(9.4, 3.9))
    axes.set_xlim(0, 15.2)
    axes.set_ylim(-0.1, 6.2)
    axes.axis("off")
    box(axes, 0.0, 2.45, 1.7, 1.1, "unlabelled\nimage", GREY)
    box(axes, 2.5, 3.55, 1.4, 0.8, "view 0", GREY)
    box(axes, 2.5, 1.65, 1.4, 0.8, "view 1", GREY)
    arrow(axes, (1.7, 3.2), (2.5, 3.95))
    arrow(axes, (1.7, 2.8), (2.5, 2.05))
    for y, name, color, style in (
        (4.75, "Teacher (frozen)", TEACHER, "dashed"),
        (2.6, "Student", STUDENT, "solid"),
        (0.45, "Momentum network", MOMENTUM, "dashed"),
    ):
        box(axes, 5.0, y, 2.0, 0.9, "backbone", color, style)
        box(axes, 7.4, y, 1.5, 0.9, "head", color, style)
        arrow(axes, (7.0, y + 0.45), (7.4, y + 0.45), color)
        label(axes, 6.95, y + (1.1 if color != MOMENTUM else -0.22), name, color)
    for start in ((3.9, 4.05), (3.9, 2.15)):  # both views
        arrow(axes, start, (5.0, 5.2), TEACHER)
        arrow(axes, start, (5.0, 3.05), STUDENT)
    arrow(axes, (3.9, 1.95), (5.0, 0.9), MOMENTUM)
    arrow(axes, (6.0, 2.6), (6.0, 1.35), MOMENTUM, "dotted")
    label(axes, 7.75, 1.97, "exponential moving average", MOMENTUM)
    box(axes, 10.9, 3.75, 4.1, 1.0, "Distillation: squared distance\nof the embeddings", LOSS)
    box(axes, 10.9, 1.6, 4.1, 1.0, "Contrast: InfoNCE, the key\nagainst a queue of old keys", LOSS)
    arrow(axes, (8.9, 5.2), (10.9, 4.45), TEACHER)
    arrow(axes, (8.9, 3.15), (10.9, 4.05), STUDENT)
    arrow(axes, (8.9, 2.95), (10.9, 2.25), STUDENT)
    arrow(axes, (8.9, 0.9), (10.9, 1.9), MOMENTUM)
    label(axes, 9.95, 5.15, "embedding", TEACHER)
    label(axes, 9.75, 2.3, "query", STUDENT)
    label(axes, 9.95, 1.1, "key", MOMENTUM)
    label(axes, 12.95, 0.35, "Deployed: the student's backbone alone.", "#222222")
    return figure


def main(output):
    """Writes the picture; the same input gives the same file (no date, fixed ids)."""
    pyplot.rcParams["svg.hashsalt"] = "disco_jax"
    figure = draw()
    figure.savefig(output, facecolor="white", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).with_suffix(".svg"))
