"""Features of a split: every image exactly once for any batch size, and clear error messages."""

import functools

import jax
import numpy as np
import pytest

import helpers
from disco_jax.data.arrays import ArraySource
from disco_jax.data.presets import PRESETS
from disco_jax.errors import UserError
from disco_jax.evaluate import features
from disco_jax.models.encoder import Encoder
from disco_jax.models.heads import ProjectionHead
from disco_jax.train.experiment import parse


@pytest.fixture(scope="module")
def trained():
    with helpers.tiny_backbone():
        return features.untrained(helpers.smoke_settings("moco_v2", **{"student.backbone": "tiny"}))


def test_padding_and_batches_change_nothing(trained):
    source = ArraySource(helpers.digits_splits())
    whole = features.of_split(trained, source, "test", 360)
    parts = features.of_split(trained, source, "test", 50)  # 52 on four devices; a partial last one
    np.testing.assert_array_equal(whole.labels, helpers.digits()["test_labels"])
    np.testing.assert_array_equal(whole.labels, parts.labels)
    np.testing.assert_allclose(whole.features, parts.features, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(whole.embedding, parts.embedding, rtol=1e-5, atol=1e-6)


def test_a_split_without_labels_or_images_is_refused(trained, monkeypatch):
    source = ArraySource({"bare": (helpers.digits()["test_images"][:8], None)})
    with pytest.raises(UserError, match="images without a label"):
        features.of_split(trained, source, "bare", 8)
    monkeypatch.setattr(source, "count", lambda split: 0)
    with pytest.raises(UserError, match="is empty"):
        features.of_split(trained, source, "bare", 8)


def test_settings_for_each_view_do_not_stand_in_the_way():
    """Evaluation makes no views, but reads the normalization of recipes with settings per view."""
    config = helpers.smoke_config("moco_v2", views=3, **{"student.backbone": "tiny"})
    per_view = {"blur_prob": (1.0, 0.1, 0.5), "solarize_prob": 0.0}
    config.augment = helpers.ConfigDict({**PRESETS["dino"], **per_view, "size": 16})
    source = ArraySource(helpers.digits_splits())
    with helpers.tiny_backbone():
        encoded = features.of_split(features.untrained(parse(config)), source, "test", 64)
    assert encoded.features.shape[0] == 360


def test_several_blocks_of_a_vit_end_with_the_last_and_leave_the_head_alone():
    backbone = helpers.cut_backbone("vit_tiny_p16", depth=3)
    encoder = Encoder(backbone, ProjectionHead(24, 8))
    variables = encoder.create(0, 16)
    images = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    outputs = ("features", "embedding", "hidden")

    @functools.partial(jax.jit, static_argnums=2)
    def read(variables, images, blocks):
        return encoder.apply(
            variables, images, norm="running", outputs=outputs, blocks=blocks, method="read"
        )

    one, two = (read(variables, images, blocks) for blocks in (1, 2))
    width = backbone.width
    assert two["features"].shape == (2, 2 * width) and one["hidden"].shape == (2, 24)
    np.testing.assert_allclose(two["features"][:, -width:], one["features"], rtol=1e-5, atol=1e-6)
    for name in ("embedding", "hidden"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-6)
    whole = jax.jit(lambda v, x: encoder.apply(v, x, norm="running"))(variables, images)
    np.testing.assert_allclose(one["embedding"], whole.embedding, rtol=1e-5, atol=1e-6)
    last = variables["params"]["head"]["out"]
    by_hand = one["hidden"] @ last["kernel"] + last["bias"][None]
    np.testing.assert_allclose(one["embedding"], by_hand, rtol=1e-4, atol=1e-5)
