"""What scores say: top-k, classes apart, confusions, and how sure a number is."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

_NORMAL_95 = 1.959963984540054  # the normal distribution's quantile at 0.975


def top_k(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Percent of rows whose label is among the k highest scores.

    A label tied with others counts as ranked after those of lower index, so that equal scores do
    not all count as right. A score that is no number ranks before all that are, and a label whose
    own score is none after all others, so that a layer that diverged is right about nothing.

    Args:
      scores: f32[N, C].
      labels: i32[N].
      k: how many guesses.
    """
    own = scores[np.arange(len(labels)), labels][:, None]
    lower_index = np.arange(scores.shape[1])[None, :] < labels[:, None]
    rank = (~(scores <= own)).sum(axis=1) + ((scores == own) & lower_index).sum(axis=1)
    return 100.0 * float((rank < k).mean())


def confusion(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """i64[C, C]: images of class row that are taken for class column; ties to the lower class.

    Args:
      scores: f32[N, C].
      labels: i32[N].
    """
    classes = scores.shape[1]
    pairs = labels.astype(np.int64) * classes + scores.argmax(axis=1)
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def wilson(percent: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of `count` independent images, in percent.

    Wilson's score interval (JASA 22, 1927): unlike mean +- 1.96 s it stays within 0..100 and does
    not shrink to nothing at the ends. It covers the choice of test images, not that of the
    training.

    Args:
      percent: the share found, 0..100.
      count: images, at least 1.
    """
    share, square = percent / 100, _NORMAL_95**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    spread = math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    half = _NORMAL_95 * spread / (1 + square / count)
    return 100 * max(middle - half, 0.0), 100 * min(middle + half, 1.0)


def summary(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """What a results' file says of scores.

    Args:
      scores: f32[N, C].
      labels: i32[N].

    Returns:
      {"top1", "top5": percent, "top1_interval": its 95 % interval (Wilson), "class_top1": percent
      for each class, None where it has no image, "images": N}.
    """
    table = confusion(scores, labels)
    counts, hits = table.sum(axis=1), np.diag(table)
    top1 = top_k(scores, labels, 1)
    return {
        "top1": top1,
        "top5": top_k(scores, labels, 5),
        "top1_interval": [round(end, 3) for end in wilson(top1, len(labels))],
        "class_top1": [
            round(100 * hit / count, 2) if count else None
            for hit, count in zip(hits.tolist(), counts.tolist(), strict=True)
        ],
        "images": len(labels),
    }


def line(result: Mapping[str, Any]) -> str:
    """A result for people: "top-1 71.20 % (70.80 to 71.59), top-5 90.10 % of 50000 images"."""
    low, high = result["top1_interval"]
    return (
        f"top-1 {result['top1']:.2f} % (95 %: {low:.2f} to {high:.2f}), "
        f"top-5 {result['top5']:.2f} % of {result['images']} images"
    )
