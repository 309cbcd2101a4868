"""Batches with the classes of their images."""

import numpy as np
import pytest

import helpers
from disco_jax.data.arrays import ArraySource
from disco_jax.data.contract import Position
from disco_jax.data.labelled import LabelledSource
from disco_jax.errors import UserError


def source(labels):
    images = np.arange(12, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 8), np.uint8)
    return LabelledSource(ArraySource({"train": (images, np.asarray(labels, np.int64))}), "label")


def first_batch(labelled):
    batches = labelled.train("train", {0: helpers.crop()}, 6, 0, Position.start(), 0)
    batch = next(batches)
    batches.close()
    return batch


def test_each_image_has_its_class():
    batch = first_batch(source(np.arange(12) % 3))
    brightness = batch.views[0][:, 0, 0].reshape(6, -1)[:, 0]
    np.testing.assert_array_equal(batch.aux["label"], brightness % 3)


def test_images_without_a_label_are_refused():
    labels = np.arange(12) % 3
    labels[::2] = -1
    with pytest.raises(UserError, match="images without a label"):
        first_batch(source(labels))


def test_more_classes_than_scores_are_refused():
    labelled = source(np.arange(12) % 3)
    labelled.check("train", 3)
    with pytest.raises(UserError, match=r"config\.student\.dim=3"):
        labelled.check("train", 2)
