"""Class-balanced subsets of a split: few labels, few shots, and held-out rows."""

import numpy as np

from disco_jax.errors import UserError


def balanced(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Selects `per_class` rows of every class, i64[C * per_class], in the stored order.

    For one seed, the rows of a smaller `per_class` are a subset of those of a larger one.

    Args:
      labels: i32[N], at least 0.
      per_class: number of rows per class.
      seed: seed of the selection.

    Raises:
      UserError: if a class has fewer rows.
    """
    selected = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < per_class:
            raise UserError(
                f"Class {label} has {len(rows)} labelled images, fewer than the {per_class} "
                "requested per class: reduce config.labelled.per_class, config.labelled.percent, "
                "config.held_out.per_class or config.shots."
            )
        order = np.random.default_rng([seed, int(label)]).permutation(rows)
        selected.append(order[:per_class])
    return np.sort(np.concatenate(selected))


def share(labels: np.ndarray, percent: float, seed: int) -> np.ndarray:
    """Selects `percent` of the rows with `balanced`, at least one row per class.

    1 % of ImageNet is 12 or 13 images per class in SimCLR's lists; here it is 12.

    Args:
      labels: i32[N].
      percent: above 0, at most 100.
      seed: seed of the selection.

    Raises:
      UserError: if `percent` is out of range, or a class has too few rows.
    """
    if not 0 < percent <= 100:
        raise UserError(f"config.labelled.percent={percent} must be above 0 and at most 100.")
    classes = len(np.unique(labels))
    return balanced(labels, max(int(len(labels) * percent / 100 / classes), 1), seed)


def even(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draws rows evenly over the classes, i64[count], in the stored order.

    Classes that are too small contribute all their rows, and the others contribute more. If the
    remaining number is not divisible, the classes that contribute one more are drawn, too.

    Args:
      labels: i32[N].
      count: number of rows, at most N.
      seed: seed of the draw.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    per_class = np.zeros(len(classes), np.int64)
    while remaining := count - int(per_class.sum()):
        larger = np.flatnonzero(sizes > per_class)
        if remaining < len(larger):
            per_class[np.random.default_rng([seed, count]).permutation(larger)[:remaining]] += 1
        else:
            per_class[larger] = np.minimum(sizes, per_class + remaining // len(larger))[larger]
    selected = [
        np.random.default_rng([seed, int(label)]).permutation(np.flatnonzero(labels == label))[:n]
        for label, n in zip(classes, per_class, strict=True)
    ]
    return np.sort(np.concatenate(selected))


def folds(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Divides rows into parts of equal size, class by class, for a cross-validation.

    Args:
      labels: i32[N].
      count: number of parts, at least 2.
      seed: seed of the division.

    Returns:
      i64[N], the part of each row in 0..count - 1.

    Raises:
      UserError: if there are fewer than 2 parts, or a class has fewer rows than parts.
    """
    if count < 2:
        raise UserError(f"config.grid.folds={count}: a cross-validation needs 2 parts or more.")
    parts = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < count:
            raise UserError(
                f"config.grid.folds={count}: class {label} has only {len(rows)} training images."
            )
        order = np.random.default_rng([seed, int(label)]).permutation(rows)
        parts[order] = np.arange(len(rows)) % count
    return parts


def held_out(labels: np.ndarray, percent: float, seed: int) -> np.ndarray:
    """Selects about `percent` of every class, bool[N]: at least one row, but never all rows.

    Classes with a single row are not held out.

    Args:
      labels: i32[N].
      percent: in 0..100.
      seed: seed of the selection.

    Raises:
      UserError: if no class has two rows.
    """
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.random.default_rng([seed, int(label)]).permutation(
            np.flatnonzero(labels == label)
        )
        count = max(round(len(rows) * percent / 100), 1)
        mask[rows[: min(count, len(rows) - 1)]] = True
    if not mask.any():
        raise UserError(
            "Every class has only one labelled image: no image can be held out to select by."
        )
    return mask
