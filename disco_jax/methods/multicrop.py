"""What methods share that compare the scores of many views with the targets of a few."""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from disco_jax.methods.base import Record, alpha
from disco_jax.ops.losses import rebalanced, target_cross_entropy


def pair_loss(
    record: Record, targets: Mapping[int, Array], temperature: float, global_share: float
) -> Array:
    """f32[]: cross-entropy of the student's views to the targets of other views, over all pairs.

    SwAV (arXiv:2006.09882) eq. 1 and DINO (arXiv:2104.14294) eq. 3, whose means over views are
    the mean over pairs; SSLight (arXiv:2210.02808) eq. 3 with a share.

    Args:
      record: with the student's scores of every view.
      targets: view -> f32[B, K], rows that sum to 1.
      temperature: tau > 0 of the student.
      global_share: alpha of the pairs of two global views; below 0: every pair counts the same.
    """
    between: list[Array] = []
    local: list[Array] = []
    for view in (*record.views.globals, *record.views.locals):
        scores = record.scores("student", view)
        for source, target in targets.items():
            if source != view:
                loss = target_cross_entropy(target, scores, temperature=temperature)
                (local if view in record.views.locals else between).append(jnp.mean(loss))
    return rebalanced(between, local, alpha(global_share))
