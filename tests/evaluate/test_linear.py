"""The linear probe learns what is linear, and nothing from noise."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from disco_jax import flags
from disco_jax.errors import UserError
from disco_jax.evaluate import linear, scores
from disco_jax.evaluate.features import Features


def blobs(count, seed, spread=4.0):
    """Overlapping Gaussian classes, so that no classifier is perfect."""
    centres = np.random.default_rng(0).normal(size=(5, 16)) * 2
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, count)
    features = (centres[labels] + spread * rng.normal(size=(count, 16))).astype(np.float32)
    return Features(features, features, labels.astype(np.int32))


def config(rate=0.05, epochs=30):
    made = flags.load("configs/linear.py")
    made.learning_rate.per_256 = rate
    made.total_epochs = epochs
    made.learning_rate.milestones = (18, 24)
    return made


def fit(config, train, **options):
    return linear.train(config, train.features, train.labels, 5, **options)[0]


def accuracy(config, train, test):
    return scores.summary(fit(config, train).scores(test.features), test.labels)


def test_agrees_with_logistic_regression():
    train, test = blobs(1500, 1), blobs(1500, 2)
    ours = accuracy(config(), train, test)
    reference = LogisticRegression(max_iter=500).fit(train.features, train.labels)
    expected = 100 * reference.score(test.features, test.labels)
    assert 70 < expected < 99
    assert ours["top1"] == pytest.approx(expected, abs=1.5)
    assert ours["top5"] == 100


def test_labels_without_meaning_give_chance():
    train, test = blobs(800, 1), blobs(800, 2)
    shuffled = Features(
        train.features, train.embedding, np.random.default_rng(3).permutation(train.labels)
    )
    assert accuracy(config(epochs=10), shuffled, test)["top1"] < 45


def test_the_same_seed_gives_the_same_bits():
    train = blobs(300, 1)
    one, two = (fit(config(epochs=3), train) for _ in range(2))
    np.testing.assert_array_equal(one.kernel, two.kernel)


def test_too_few_images_for_the_devices():
    with pytest.raises(UserError, match="fewer than the 4 devices"):
        fit(config(), blobs(3, 1))
