"""Information plane: mutual information of an output with the input and with the label."""

import numpy as np

from disco_jax import errors

GROUPINGS = ("rows", "official")


def binned(scores: np.ndarray, bins: int = 30) -> np.ndarray:
    """Returns the bin of every class probability, i64[N, C]; bin i is (i / bins, (i + 1) / bins].

    Args:
      scores: f[N, C], logits; their softmax is computed in float64.
      bins: number of equal bins on (0, 1].
    """
    scores = scores.astype(np.float64)
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities = powers / powers.sum(axis=1, keepdims=True)
    return np.digitize(probabilities, np.linspace(0, 1, bins + 1)[1:-1], right=True)


def mutual_information(
    rows: np.ndarray, labels: np.ndarray, grouping: str = "rows"
) -> tuple[float, float]:
    """Estimates I(X;T) and I(T;Y) in bits, for T the value of a row and X its index.

    The binning estimator of "Evaluating Capability of Deep Neural Networks for Image Classification
    via Information Plane" (ECCV 2018), which DisCo's figure 7 uses. T is a function of X, so I(X;T)
    is the entropy of T; I(T;Y) subtracts its mean entropy within each label.

    Args:
      rows: integers [N, C]; see `binned`.
      labels: integers [N].
      grouping: "rows": equal rows are one value of T. "official" reproduces the grouping of that
        paper's code. It compares a row with row number g of the data instead of the first row of
        group g, and therefore treats some equal rows as different.

    Raises:
      UserError: if `grouping` is unknown.
    """
    if grouping not in GROUPINGS:
        raise errors.unknown("config.information_plane.grouping", grouping, GROUPINGS)
    _, first, values = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    values = values.ravel()
    if grouping == "official":
        values = _official_groups(first[values])
    total_entropy = _entropy(values)
    by_label = [(np.mean(labels == y), _entropy(values[labels == y])) for y in np.unique(labels)]
    return total_entropy, total_entropy - sum(fraction * entropy for fraction, entropy in by_label)


def turning_point(inputs: np.ndarray) -> int:
    """Returns the index of the highest I(X;T) (ties: the last), where compression begins.

    Args:
      inputs: f[P], I(X;T) along a training.
    """
    return len(inputs) - 1 - int(np.argmax(inputs[::-1]))


def _official_groups(first: np.ndarray) -> np.ndarray:
    """Returns group ids i64[N], from the index of the first occurrence of each row's value."""
    groups, count = np.empty(len(first), np.int64), 0
    for i, index in enumerate(first.tolist()):
        if index < count:
            groups[i] = index
        else:
            groups[i] = count
            count += 1
    return groups


def _entropy(values: np.ndarray) -> float:
    fractions = np.unique(values, return_counts=True)[1] / len(values)
    return float(-np.sum(fractions * np.log2(fractions)))
