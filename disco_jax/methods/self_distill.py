"""DINO: the student's scores predict the centred and sharpened scores of its EMA copy."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.methods.base import (
    Objective,
    Record,
    Term,
    Views,
    embedding_std,
    prototype_perplexity,
    set_by_run,
)
from disco_jax.methods.multicrop import pair_loss
from disco_jax.ops import schedules
from disco_jax.ops.collectives import pmean
from disco_jax.ops.losses import sharpened
from disco_jax.ops.memory import Queue
from disco_jax.ops.vectors import l2_normalize


@dataclasses.dataclass(frozen=True)
class SelfDistill(Objective):
    """Self-distillation without labels. DINO (arXiv:2104.14294) eq. 1 to 4.

    The momentum network encodes the views `targets`, the student all views; the loss is the mean
    over all pairs of different views. The centre is an EMA of the scores' mean over the global
    batch. Targets use the centre before the update by this step's scores.

    Attributes:
      weight: factor of the term in the method's loss.
      targets: global views encoded by the momentum network.
      student_temperature: tau_s > 0.
      momentum_temperature: tau_t > 0 after the warm-up.
      warmup_temperature: tau_t in the first epoch.
      warmup_epochs: length of the linear warm-up of tau_t, which is constant within an epoch.
      centre_rate: EMA rate of the centre, the weight of its previous value.
      global_share: weight of the pairs of two global views in the loss, alpha in SSLight's eq. 3
        (arXiv:2210.02808); -1: all pairs weigh equally.
      steps_per_epoch: unit of `warmup_epochs`; set by the run.
    """

    reads_scores: ClassVar[bool] = True

    weight: float = 1.0
    targets: tuple[int, ...] = (0, 1)
    student_temperature: float = 0.1
    momentum_temperature: float = 0.04
    warmup_temperature: float = 0.04
    warmup_epochs: int = 0
    centre_rate: float = 0.9
    global_share: float = -1.0
    steps_per_epoch: int = set_by_run(1)

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        return {"student": (*views.globals, *views.locals), "momentum": self.targets}

    def init(self, rng: Array, record: Record, inherited: Queue | None) -> Array:
        return jnp.zeros(record.scores("momentum", self.targets[0]).shape[-1:], jnp.float32)

    def temperature_at(self, step: Array) -> Array:
        """Returns tau_t at a step, f32[]."""
        ramp = schedules.line(
            self.warmup_temperature, self.momentum_temperature, self.warmup_epochs
        )
        return ramp(step // self.steps_per_epoch)

    def __call__(self, record: Record, memory: Array, step: Array) -> Term:
        temperature = self.temperature_at(step)
        scores = {view: record.scores("momentum", view) for view in self.targets}
        targets = {view: sharpened(x, memory, temperature) for view, x in scores.items()}
        loss = pair_loss(record, targets, self.student_temperature, self.global_share)
        mean = pmean(jnp.mean(jnp.concatenate(list(scores.values())), axis=0))
        centre = self.centre_rate * memory + (1 - self.centre_rate) * mean
        first = self.targets[0]
        metrics = {
            "confidence": jnp.mean(jnp.max(targets[first], axis=-1)),
            "usage": prototype_perplexity(
                record.scores("student", first), self.student_temperature
            ),
            "student_std": embedding_std(l2_normalize(record.embedding("student", first))),
            "temperature": temperature,
        }
        return Term(loss, jax.lax.stop_gradient(centre), metrics)
