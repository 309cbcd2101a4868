"""The information plane: how much an output tells of its input and of its label."""

import numpy as np

from disco_jax import errors

GROUPINGS = ("rows", "official")


def binned(scores: np.ndarray, bins: int = 30) -> np.ndarray:
    """i64[N, C]: the bin of every class's probability, (i / bins, (i + 1) / bins] being bin i.

    Args:
      scores: f[N, C], logits; their softmax is taken in float64.
      bins: equal ones on (0, 1].
    """
    scores = scores.astype(np.float64)
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares = powers / powers.sum(axis=1, keepdims=True)
    return np.digitize(shares, np.linspace(0, 1, bins + 1)[1:-1], right=True)


def mutual_information(
    rows: np.ndarray, labels: np.ndarray, grouping: str = "rows"
) -> tuple[float, float]:
    """I(X;T) and I(T;Y) in bits, T being the value of a row and X which row it is.

    The estimator by binning of "Evaluating Capability of Deep Neural Networks for Image
    Classification via Information Plane" (ECCV 2018), which DisCo's figure 7 uses. As T follows
    from X, I(X;T) is the entropy of T; I(T;Y) is that less its mean over the labels.

    Args:
      rows: whole numbers [N, C]; see `binned`.
      labels: whole numbers [N].
      grouping: "rows": equal rows are one value of T. "official": as that paper's code finds equal
        rows: it compares a row with row number g of the data where it means the first row of group
        g, and so takes some equal rows for different.

    Raises:
      UserError: for another grouping.
    """
    if grouping not in GROUPINGS:
        raise errors.unknown("config.plane.grouping", grouping, GROUPINGS)
    _, first, values = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    values = values.ravel()
    if grouping == "official":
        values = _official(first[values])
    whole = _entropy(values)
    of_labels = [(np.mean(labels == y), _entropy(values[labels == y])) for y in np.unique(labels)]
    return whole, whole - sum(share * entropy for share, entropy in of_labels)


def turning_point(inputs: np.ndarray) -> int:
    """Where fitting turns into compression: the place of the highest I(X;T), the last of equals.

    Args:
      inputs: f[P] I(X;T) along a training.
    """
    return len(inputs) - 1 - int(np.argmax(inputs[::-1]))


def _official(first: np.ndarray) -> np.ndarray:
    """i64[N]: groups, given where a row's value occurs first."""
    groups, count = np.empty(len(first), np.int64), 0
    for i, place in enumerate(first.tolist()):
        if place < count:
            groups[i] = place
        else:
            groups[i] = count
            count += 1
    return groups


def _entropy(values: np.ndarray) -> float:
    shares = np.unique(values, return_counts=True)[1] / len(values)
    return float(-np.sum(shares * np.log2(shares)))
