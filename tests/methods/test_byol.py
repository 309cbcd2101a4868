"""Tests BYOL's loss against NumPy, and what it asks of the student."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax.errors import UserError
from disco_jax.methods.base import Record
from disco_jax.methods.byol import Byol
from disco_jax.models.encoder import Encoded
from disco_jax.ops.collectives import AXIS
from disco_jax.train import teacher
from disco_jax.train.experiment import assemble, parse
from disco_jax.train.state import shapes

N, D = 8, 6


def rows(seed):
    return np.random.default_rng(seed).normal(size=(N, D)).astype(np.float32)


def in_float64(predictions, targets):
    """Computes 2 - 2 cos of each view's prediction and the other view's target, added."""
    loss = 0.0
    for prediction, target in ((predictions[0], targets[1]), (predictions[1], targets[0])):
        p, t = (
            x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
            for x in (prediction, target)
        )
        loss += np.mean(2 - 2 * np.sum(p * t, axis=1))
    return loss


def test_the_loss_compares_predictions_with_targets_of_the_other_view():
    predictions, targets = [rows(0), rows(1)], [rows(2), rows(3)]

    def loss(predictions):
        student = {v: Encoded(rows(4), rows(5), prediction=x) for v, x in enumerate(predictions)}
        momentum = {v: Encoded(x, x) for v, x in enumerate(targets)}
        record = Record({"student": student, "momentum": momentum}, {})
        return Byol()(record, (), jnp.int32(0)).loss

    one = jax.vmap(jax.value_and_grad(loss), axis_name=AXIS)
    value, gradients = jax.jit(one)([x[None] for x in predictions])
    assert value[0] == pytest.approx(in_float64(predictions, targets), rel=1e-6)
    along = [rows(6), rows(7)]
    ahead, behind = (
        in_float64([p + s * d for p, d in zip(predictions, along, strict=True)], targets)
        for s in (1e-4, -1e-4)
    )
    slope = sum(np.sum(g[0] * d) for g, d in zip(gradients, along, strict=True))
    assert slope == pytest.approx((ahead - behind) / 2e-4, rel=1e-3)


def test_a_student_without_a_predictor_is_refused():
    with helpers.tiny_backbone():
        config = helpers.tiny_config("byol", **{"student.predictor": 0})
        method = assemble(config).method
        with pytest.raises(UserError, match=r"config\.student\.predictor"):
            method.check(shapes(method, (16, 16)))


def test_a_run_of_byol_teaches_with_its_predictor_in_place(tmp_path):
    """The weights load whole, although a teacher's predictions are not read."""
    tiny = {"student.backbone": "tiny", "teacher.backbone": "tiny"}
    with helpers.tiny_backbone():
        run = helpers.network_run(tmp_path / "byol", tmp_path / "digits.npz", "byol", **tiny)
        config = helpers.smoke_config("disco", **tiny, **{"teacher.weights": run})
        method = assemble(config).method
        spec = parse(config).method.teacher
        loaded = teacher.load(spec, method.networks["teacher"].encoder, 16)
    assert config.teacher.predictor == 32
    assert loaded.variables["params"]["predictor"]["out"]["kernel"].shape == (32, 16)
