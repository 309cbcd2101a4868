"""Batches with the classes of their images."""

import json

import numpy as np
import pytest

import helpers
from disco_jax.data.arrays import ArraySource
from disco_jax.data.contract import Position
from disco_jax.data.labelled import LabelledSource
from disco_jax.errors import UserError
from disco_jax.workflows import pretrain


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


def test_a_supervised_run_learns_from_the_classes(tmp_path):
    """Takes two steps on one batch of one class: the loss falls."""
    images = np.random.default_rng(0).integers(0, 256, (16, 16, 16), np.uint8)
    digits = ArraySource({"train": (images, np.full(16, 3)), "test": (images, np.full(16, 3))})
    with helpers.tiny_networks():
        config = helpers.smoke_config("supervised")
        config.student.dim, config.learning_rate.base_lr = 10, 3.2
        config.optimizer.momentum, config.optimizer.weight_decay = 0.0, 0.0
        pretrain.run(config, str(tmp_path / "run"), digits)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["supervised/loss"] for line in lines if "supervised/loss" in line]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_a_supervised_run_needs_labels(tmp_path):
    images = np.zeros((16, 16, 16), np.uint8)
    unlabelled = ArraySource({"train": (images, None), "test": (images, None)})
    with helpers.tiny_networks(), pytest.raises(UserError, match="needs labels"):
        pretrain.run(helpers.smoke_config("supervised"), str(tmp_path / "run"), unlabelled)
