"""Few-shot ridge regression: equals scikit-learn's, and its leave-one-out equals refitting."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from disco_jax.evaluate import ridge


def rows(count, dim, seed=0, classes=3):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = np.random.default_rng(9).normal(size=(classes, dim))
    return 2 * centres[labels] + rng.normal(size=(count, dim)), labels


@pytest.mark.parametrize("shape", [(12, 5), (12, 40)])
def test_equals_scikit_learns_ridge_of_the_strength_chosen_by_leaving_one_out(shape, monkeypatch):
    x, labels = rows(*shape)
    targets = np.where(labels[:, None] == np.arange(3), 1.0, -1.0)
    scale = np.sum((x - x.mean(0)) ** 2) / x.shape[1]
    best, chosen = -1, None
    for strength in sorted(ridge.STRENGTHS, reverse=True):
        hits = 0
        for i in range(len(x)):
            rest = np.arange(len(x)) != i
            model = Ridge(alpha=strength * scale).fit(x[rest], targets[rest])
            hits += model.predict(x[i : i + 1]).argmax() == labels[i]
        if hits > best:
            best, chosen = hits, strength
    expected = Ridge(alpha=chosen * scale).fit(x, targets)
    kernel, bias = ridge.fit(x, labels, 3)
    np.testing.assert_allclose(kernel, expected.coef_.T, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(bias, expected.intercept_, rtol=1e-6, atol=1e-9)


def test_classes_that_lie_apart_are_told_apart_from_five_images():
    x, labels = rows(15, 20)
    kernel, bias = ridge.fit(x.astype(np.float32), labels, 3)
    more, truth = rows(300, 20, seed=1)
    assert np.mean((more @ kernel + bias).argmax(1) == truth) > 0.9
