"""Loss over pairs of views, shared by the multi-crop methods."""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from disco_jax.methods.base import Record, alpha
from disco_jax.ops.losses import rebalanced, target_cross_entropy


def pair_loss(
    record: Record, targets: Mapping[int, Array], temperature: float, global_share: float
) -> Array:
    """Averages the cross-entropy of student views with the targets of other views over all pairs.

    SwAV (arXiv:2006.09882) eq. 1 and DINO (arXiv:2104.14294) eq. 3, whose means over views equal
    the mean over pairs; SSLight (arXiv:2210.02808) eq. 3 for a nonnegative `global_share`.

    Args:
      record: has the student's scores of every view.
      targets: view -> f32[B, K], rows that sum to 1.
      temperature: tau > 0 of the student.
      global_share: weight alpha of the pairs of two global views; negative: all pairs weigh
        equally.

    Returns:
      f32[], the mean over this replica's batch.
    """
    global_losses: list[Array] = []
    local_losses: list[Array] = []
    for view in (*record.views.globals, *record.views.locals):
        scores = record.scores("student", view)
        for source, target in targets.items():
            if source != view:
                loss = target_cross_entropy(target, scores, temperature=temperature)
                is_local = view in record.views.locals
                (local_losses if is_local else global_losses).append(jnp.mean(loss))
    return rebalanced(global_losses, local_losses, alpha(global_share))
