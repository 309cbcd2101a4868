"""Class-balanced parts of a split: few labels, few shots, and what is held out."""

import numpy as np

from disco_jax.errors import UserError


def balanced(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """i64[C * per_class]: `per_class` rows of every class that occurs, in the stored order.

    With one seed the rows of a smaller number are among those of a larger one.

    Args:
      labels: i32[N], at least 0.
      per_class: rows a class.
      seed: of the choice.

    Raises:
      UserError: when a class has fewer.
    """
    chosen = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) < per_class:
            raise UserError(
                f"Class {label} has {len(rows)} labelled images, fewer than the {per_class} asked "
                "for a class: ask for fewer (config.labelled.per_class, .percent, config.shots)."
            )
        order = np.random.default_rng([seed, int(label)]).permutation(rows)
        chosen.append(order[:per_class])
    return np.sort(np.concatenate(chosen))


def share(labels: np.ndarray, percent: float, seed: int) -> np.ndarray:
    """`balanced` with `percent` of the split shared evenly between its classes, at least 1 each.

    1 % of ImageNet is 12 or 13 images a class, as SimCLR's lists have it; here it is 12.

    Args:
      labels: i32[N].
      percent: above 0, at most 100.
      seed: of the choice.

    Raises:
      UserError: for a percentage out of range, or a class that has too few.
    """
    if not 0 < percent <= 100:
        raise UserError(f"config.labelled.percent={percent} must lie above 0 and up to 100.")
    classes = len(np.unique(labels))
    return balanced(labels, max(int(len(labels) * percent / 100 / classes), 1), seed)


def even(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """i64[count]: rows drawn evenly over the classes, in the stored order.

    Classes that are too small give all of their rows, and the others more. Which of them give one
    more, where the rest does not divide, is drawn too.

    Args:
      labels: i32[N].
      count: rows, at most N.
      seed: of the draw.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    taken = np.zeros(len(classes), np.int64)
    while rest := count - int(taken.sum()):
        larger = np.flatnonzero(sizes > taken)
        if rest < len(larger):
            taken[np.random.default_rng([seed, count]).permutation(larger)[:rest]] += 1
        else:
            taken[larger] = np.minimum(sizes, taken + rest // len(larger))[larger]
    chosen = [
        np.random.default_rng([seed, int(label)]).permutation(np.flatnonzero(labels == label))[:n]
        for label, n in zip(classes, taken, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def held_out(labels: np.ndarray, percent: float, seed: int) -> np.ndarray:
    """bool[N]: about `percent` of every class, one row at least, but never all of it.

    Args:
      labels: i32[N].
      percent: in 0..100.
      seed: of the choice.

    Raises:
      UserError: when no class has two rows.
    """
    out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.random.default_rng([seed, int(label)]).permutation(
            np.flatnonzero(labels == label)
        )
        wanted = max(round(len(rows) * percent / 100), 1)
        out[rows[: min(wanted, len(rows) - 1)]] = True
    if not out.any():
        raise UserError("Every class has one labelled image: nothing can be held out to choose by.")
    return out
