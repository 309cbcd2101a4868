"""Metrics of logits: top-k, per-class accuracy, confusion matrix and confidence interval."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

_NORMAL_95 = 1.959963984540054  # 0.975 quantile of the normal distribution


def top_k(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Computes the percentage of rows whose label is among the k highest scores.

    Ties rank by class index, so that equal scores do not all count as correct. A NaN score ranks
    above every number, and a label whose own score is NaN ranks last, so that a diverged classifier
    is never correct.

    Args:
      scores: f32[N, C].
      labels: i32[N].
      k: number of guesses.
    """
    own = scores[np.arange(len(labels)), labels][:, None]
    lower_index = np.arange(scores.shape[1])[None, :] < labels[:, None]
    rank = (~(scores <= own)).sum(axis=1) + ((scores == own) & lower_index).sum(axis=1)
    return 100.0 * float((rank < k).mean())


def confusion(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Counts i64[C, C] images by true class (row) and predicted class (column); ties: lowest index.

    Args:
      scores: f32[N, C].
      labels: i32[N].
    """
    classes = scores.shape[1]
    pairs = labels.astype(np.int64) * classes + scores.argmax(axis=1)
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def wilson(percent: float, count: int) -> tuple[float, float]:
    """Computes the 95 % confidence interval of a proportion of `count` independent images.

    Wilson's score interval (JASA 22, 1927). Unlike mean +- 1.96 s it stays within 0..100 and does
    not vanish at the ends. It covers the sampling of test images, not the variance of training.

    Args:
      percent: observed proportion, 0..100.
      count: number of images, at least 1.
    """
    proportion, z2 = percent / 100, _NORMAL_95**2
    centre = (proportion + z2 / (2 * count)) / (1 + z2 / count)
    deviation = math.sqrt(proportion * (1 - proportion) / count + z2 / (4 * count**2))
    half_width = _NORMAL_95 * deviation / (1 + z2 / count)
    return 100 * max(centre - half_width, 0.0), 100 * min(centre + half_width, 1.0)


def summary(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Computes the metrics for a results file.

    Args:
      scores: f32[N, C].
      labels: i32[N].

    Returns:
      {"top1", "top5": percent, "top1_interval": its 95 % interval (Wilson), "class_top1": percent
      for each class, None for a class without images, "images": N}.
    """
    table = confusion(scores, labels)
    counts, hits = table.sum(axis=1), np.diag(table)
    top1 = top_k(scores, labels, 1)
    return {
        "top1": top1,
        "top5": top_k(scores, labels, 5),
        "top1_interval": [round(bound, 3) for bound in wilson(top1, len(labels))],
        "class_top1": [
            round(100 * hit / count, 2) if count else None
            for hit, count in zip(hits.tolist(), counts.tolist(), strict=True)
        ],
        "images": len(labels),
    }


def line(result: Mapping[str, Any]) -> str:
    """Formats a result: "top-1 71.20 % (95 %: 70.80 to 71.59), top-5 90.10 % of 50000 images"."""
    low, high = result["top1_interval"]
    return (
        f"top-1 {result['top1']:.2f} % (95 %: {low:.2f} to {high:.2f}), "
        f"top-5 {result['top5']:.2f} % of {result['images']} images"
    )
