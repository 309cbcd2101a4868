"""SimCLR: contrasts two views of an image with all other views in the batch."""

import dataclasses

import jax.numpy as jnp
from jax import Array

from disco_jax.methods.base import Objective, Record, Term, Views, embedding_std
from disco_jax.ops.losses import contrast_accuracy, nt_xent
from disco_jax.ops.vectors import l2_normalize


@dataclasses.dataclass(frozen=True)
class NtXent(Objective):
    """Normalized temperature-scaled cross-entropy. SimCLR (arXiv:2002.05709) eq. 1.

    The negatives are both views of the other images of the global batch: the loss depends on
    `config.batch_size`, not on the number of devices.

    Attributes:
      weight: factor of the term in the method's loss.
      first: view encoded by the student.
      second: other view of the same image, also encoded by the student.
      temperature: tau > 0; 0.1 in the official command for ImageNet.
    """

    weight: float = 1.0
    first: int = 0
    second: int = 1
    temperature: float = 0.1

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        return {"student": (self.first, self.second)}

    def __call__(self, record: Record, memory: tuple[()], step: Array) -> Term:
        views = self.first, self.second
        first, second = (l2_normalize(record.embedding("student", view)) for view in views)
        losses, nearest = nt_xent(first, second, temperature=self.temperature)
        anchors, others = jnp.concatenate([first, second]), jnp.concatenate([second, first])
        metrics = {
            "accuracy": jnp.mean(contrast_accuracy(anchors, others, nearest)),
            "student_std": embedding_std(first),
        }
        return Term(jnp.mean(losses), memory, metrics)
