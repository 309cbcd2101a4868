"""Tests SimCLR's loss against NumPy in float64, on one device and on several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from disco_jax.ops.collectives import AXIS
from disco_jax.ops.losses import nt_xent
from disco_jax.ops.vectors import l2_normalize

N, D, TEMPERATURE = 8, 6, 0.3


def embeddings():
    """Returns two raw embeddings [N, D] of N images, which resemble each other."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=(N, D))
    return first.astype(np.float32), (first + 0.5 * rng.normal(size=(N, D))).astype(np.float32)


def in_float64(first, second):
    """Computes eq. 1 of the paper view by view, and averages over all 2N views."""
    rows = np.concatenate([first, second]).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    losses = []
    for i, row in enumerate(rows):
        scores = {k: rows[k] @ row / TEMPERATURE for k in range(2 * N) if k != i}
        losses.append(np.log(sum(map(np.exp, scores.values()))) - scores[(i + N) % (2 * N)])
    return np.mean(losses)


def on_replicas(first, second, replicas):
    """Returns the mean loss and the gradients averaged over replicas, as in a step."""

    def loss(first, second):
        return jnp.mean(
            nt_xent(l2_normalize(first), l2_normalize(second), temperature=TEMPERATURE)[0]
        )

    split = (x.reshape(replicas, -1, D) for x in (first, second))
    both = jax.vmap(jax.value_and_grad(loss, argnums=(0, 1)), axis_name=AXIS)
    values, gradients = jax.jit(both)(*split)
    return np.mean(values), [x.reshape(N, D) / replicas for x in gradients]


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_the_loss_and_its_gradient_are_those_of_the_formula_over_the_global_batch(replicas):
    first, second = embeddings()
    value, gradients = on_replicas(first, second, replicas)
    assert value == pytest.approx(in_float64(first, second), rel=1e-6)
    rng = np.random.default_rng(1)
    along = [rng.normal(size=x.shape) for x in (first, second)]
    ahead, behind = (
        in_float64(first + step * along[0], second + step * along[1]) for step in (1e-4, -1e-4)
    )
    slope = sum(np.sum(g * d) for g, d in zip(gradients, along, strict=True))
    assert slope == pytest.approx((ahead - behind) / 2e-4, rel=1e-4)


def test_the_nearest_other_view_is_of_another_image():
    first, second = (np.asarray(l2_normalize(x)) for x in embeddings())
    _, nearest = jax.vmap(lambda a, b: nt_xent(a, b, temperature=0.3), axis_name=AXIS)(
        first[None], second[None]
    )
    rows = np.concatenate([first, second])
    products = rows @ rows.T
    products[np.arange(2 * N)[:, None] % N == np.arange(2 * N) % N] = -2
    np.testing.assert_allclose(nearest[0], products.max(1), atol=1e-6)
