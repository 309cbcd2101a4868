"""Few-shot evaluation: closed-form ridge regression on a few images per class."""

import numpy as np

# Candidate regularization strengths, scaled by the mean square of a feature and the row count.
STRENGTHS = tuple(10.0 ** (i / 2) for i in range(-12, 7))


def fit(rows: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Fits a linear classifier by ridge regression to targets +1 (own class) and -1 (others).

    The protocol of ViT (arXiv:2010.11929, section 4.1). The bias is not penalized. The strength is
    the one in `STRENGTHS` with the best leave-one-out accuracy on the rows themselves (ties: the
    strongest); that accuracy has a closed form, so no validation images are needed.

    Args:
      rows: f[N, F].
      labels: i[N].
      num_classes: C.

    Returns:
      kernel f64[F, C] and bias f64[C].
    """
    rows = rows.astype(np.float64)
    targets = np.where(labels[:, None] == np.arange(num_classes)[None], 1.0, -1.0)
    mean, target_mean = rows.mean(0), targets.mean(0)
    u, values, vt = np.linalg.svd(rows - mean, full_matrices=False)
    projected = u.T @ (targets - target_mean)
    scale = max(float(np.sum(values**2)) / rows.shape[1], 1e-30)
    best, kernel = -1.0, np.zeros((rows.shape[1], num_classes))
    for strength in sorted(STRENGTHS, reverse=True):
        shrunk = values**2 / (values**2 + strength * scale)
        fitted = target_mean + u @ (shrunk[:, None] * projected)
        leverage = 1 / len(rows) + np.sum(u**2 * shrunk, axis=1)
        residual_factor = np.maximum(1 - leverage, 1e-9)[:, None]
        left_out = targets - (targets - fitted) / residual_factor
        accuracy = np.mean(left_out.argmax(1) == labels)
        if accuracy > best:
            best = accuracy
            factors = values / (values**2 + strength * scale)
            kernel = vt.T @ (factors[:, None] * projected)
    return kernel, target_mean - mean @ kernel
