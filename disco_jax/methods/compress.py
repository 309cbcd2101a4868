"""CompRess: matches the student's similarities to anchor points with the teacher's."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from disco_jax import errors
from disco_jax.methods.base import OUTPUTS, Objective, Record, Term, Views, embedding_std
from disco_jax.ops.collectives import gather
from disco_jax.ops.memory import Queue
from disco_jax.ops.relations import bank_divergence
from disco_jax.ops.vectors import l2_normalize

BANKS = ("momentum", "student", "teacher")


@dataclasses.dataclass(frozen=True)
class Compress(Objective):
    """KL divergence of similarities to anchor points. CompRess (arXiv:2010.14713) eq. 1-2.

    All networks encode the same view. The anchors are embeddings of past images: those of this step
    are pushed after the comparison, so an image is not its own anchor.

    Attributes:
      weight: factor of the term in the method's loss.
      view: view encoded by all networks.
      bank: network that encodes the student's anchors: "momentum" (CompRess-2q), "student" (2q
        without momentum) or "teacher" (1q, which requires equal widths of student and teacher).
      teacher_output: "features" after pooling, as published, or "embedding".
      temperature: of both softmaxes, > 0.
      queue_size: number of anchors; at least the global batch.
    """

    weight: float = 1.0
    view: int = 0
    bank: str = "momentum"
    teacher_output: str = "features"
    temperature: float = 0.04
    queue_size: int = 128_000

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys({"student", "teacher", self.bank}, (self.view,))

    def network_output(self, network: str) -> str:
        return self.teacher_output if network == "teacher" else "embedding"

    def match_width(self) -> str | None:
        return self.teacher_output if self.bank == "teacher" else None

    def check_queue(self, setting: str, size: int, batch_size: int) -> None:
        if size < batch_size:  # pushes may wrap around the end of the queue
            raise errors.UserError(
                f"{setting}={size} is below config.batch_size={batch_size}. Set it to at least the "
                "batch size."
            )

    def check(self, setting: str, record: Record) -> None:
        if self.bank not in BANKS:
            raise errors.unknown(f"{setting}.bank", self.bank, BANKS)
        if self.teacher_output not in OUTPUTS:
            raise errors.unknown(f"{setting}.teacher_output", self.teacher_output, OUTPUTS)

    def init(self, rng: Array, record: Record, inherited: Queue | None) -> dict[str, Queue]:
        dims = {"teacher": record.output("teacher", self.view, self.teacher_output).shape[-1]}
        if self.bank != "teacher":
            dims["student"] = record.embedding("student", self.view).shape[-1]
        return {
            name: Queue.uniform(jax.random.fold_in(rng, i), self.queue_size, dim)
            for i, (name, dim) in enumerate(dims.items())
        }

    def __call__(self, record: Record, memory: dict[str, Queue], step: Array) -> Term:
        student = l2_normalize(record.embedding("student", self.view))
        teacher = l2_normalize(record.output("teacher", self.view, self.teacher_output))
        anchors = memory["teacher" if self.bank == "teacher" else "student"]
        losses = bank_divergence(
            student,
            teacher,
            anchors.vectors,
            memory["teacher"].vectors,
            student_temperature=self.temperature,
            target_temperature=self.temperature,
        )
        queues = {"teacher": memory["teacher"].push(gather(teacher))}
        if self.bank != "teacher":
            keys = l2_normalize(jax.lax.stop_gradient(record.embedding(self.bank, self.view)))
            queues["student"] = anchors.push(gather(keys))
        metrics = {"student_std": embedding_std(student), "teacher_std": embedding_std(teacher)}
        return Term(jnp.mean(losses), queues, metrics)
