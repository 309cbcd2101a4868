"""Scores of extracted features: by a linear classifier, and by nearest neighbours."""

from typing import Any

from disco_jax.evaluate import grid, knn, linear, scores
from disco_jax.evaluate.classifier import Classifier
from disco_jax.evaluate.features import Features
from disco_jax.evaluate.probe_settings import ProbeSettings


def linear_probe(
    settings: ProbeSettings,
    train: Features | list[Features],
    test: Features,
    num_classes: int | None = None,
) -> tuple[Classifier, dict[str, Any]]:
    """Trains a linear classifier on extracted features and returns it with its results.

    Args:
      settings: of the training.
      train: features of the training images, or a list that adds those of their mirror images.
      test: features of the test images.
      num_classes: number of classes; None for one more than the largest label.
    """
    variants = [train] if isinstance(train, Features) else train
    rows = [getattr(variant, settings.output) for variant in variants]
    labels, test_rows = variants[0].labels, getattr(test, settings.output)
    classes = num_classes or int(max(labels.max(), test.labels.max())) + 1
    if settings.grid.rates:
        layer, result = grid.train(settings, rows[0], labels, classes)
    else:
        eval_set = (test_rows, test.labels) if settings.evaluate_every_epochs else None
        layer, result = linear.train(settings, rows, labels, classes, test=eval_set)
    summary = scores.summary(layer.scores(test_rows), test.labels)
    train_top1 = scores.top_k(layer.scores(rows[0]), labels, 1)
    return layer, {**summary, **result, "train_top1": train_top1}


# Fields of `configs/knn.py` that `knn_probe` takes.
KNN_FIELDS = ("output", "k", "vote", "temperature")


def knn_probe(
    train: Features, test: Features, *, output: str, k: int, vote: str, temperature: float
) -> dict[str, Any]:
    """Classifies extracted features and returns their `scores.summary`.

    Args:
      train: features of the training images.
      test: features of the test images.
      output: network output to compare, see `encoder.OUTPUTS`.
      k: number of neighbours.
      vote: a name in `knn.VOTES`.
      temperature: of weighted votes, see `knn.scores`.
    """
    similarities, rows = knn.neighbours(getattr(train, output), getattr(test, output), k)
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    votes = knn.scores(
        similarities, train.labels[rows], classes, vote=vote, temperature=temperature
    )
    return scores.summary(votes, test.labels)
