"""Scores of extracted features: by a linear classifier, and by nearest neighbours."""

from typing import Any

from ml_collections import ConfigDict

from disco_jax.evaluate import grid, knn, linear, scores
from disco_jax.evaluate.classifier import Classifier
from disco_jax.evaluate.features import Features


def linear_probe(
    config: ConfigDict,
    train: Features | list[Features],
    test: Features,
    num_classes: int | None = None,
) -> tuple[Classifier, dict[str, Any]]:
    """Trains a linear classifier on extracted features and returns it with its results.

    Args:
      config: see `probes.classification`.
      train: features of the training images, or a list that adds those of their mirror images.
      test: features of the test images.
      num_classes: number of classes; None for one more than the largest label.
    """
    variants = [train] if isinstance(train, Features) else train
    rows = [getattr(variant, config.output) for variant in variants]
    labels, test_rows = variants[0].labels, getattr(test, config.output)
    classes = num_classes or int(max(labels.max(), test.labels.max())) + 1
    if config.grid.rates:
        layer, result = grid.train(config, rows[0], labels, classes)
    else:
        eval_set = (test_rows, test.labels) if config.evaluate_every_epochs else None
        layer, result = linear.train(config, rows, labels, classes, test=eval_set)
    summary = scores.summary(layer.scores(test_rows), test.labels)
    train_top1 = scores.top_k(layer.scores(rows[0]), labels, 1)
    return layer, {**summary, **result, "train_top1": train_top1}


def knn_probe(config: ConfigDict, train: Features, test: Features) -> dict[str, Any]:
    """Classifies extracted features and returns their `scores.summary`.

    Args:
      config: see `configs/knn.py`.
      train: features of the training images.
      test: features of the test images.
    """
    similarities, rows = knn.neighbours(
        getattr(train, config.output), getattr(test, config.output), config.k
    )
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    votes = knn.scores(
        similarities, train.labels[rows], classes, vote=config.vote, temperature=config.temperature
    )
    return scores.summary(votes, test.labels)
