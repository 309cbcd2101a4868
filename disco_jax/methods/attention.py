"""Attention transfer: matches the spatial attention of student and teacher feature maps."""

import dataclasses
from typing import ClassVar, TypeVar

import jax.numpy as jnp
from jax import Array

from disco_jax import errors
from disco_jax.methods.base import Objective, Record, Term, Views
from disco_jax.ops.relations import attention_distance

LAYERS = ("all", "last")
RESIZES = ("none", "linear")

Layers = TypeVar("Layers", tuple[Array, ...], list[tuple[int, int]])


@dataclasses.dataclass(frozen=True)
class Attention(Objective):
    """Squared difference of activation-based attention. AT (arXiv:1612.03928) eq. 2.

    DisCo reports results with AT, but its code does not run it (disagreement A3). The layers, the
    sum over layers and the weight are those of AT.

    Attributes:
      weight: factor of the term; AT's beta for this mean over positions is 1e3.
      view: view encoded by student and teacher.
      layers: "all": the maps at the ends of all stages of the backbones; "last": only the coarsest
        map. The losses of the layers are summed.
      resize: "none": the student must have a map of the size of every teacher map. "linear": maps
        are paired from the coarsest on, and the teacher's are resized to the student's.
    """

    reads_maps: ClassVar[bool] = True

    weight: float = 1000.0
    view: int = 0
    layers: str = "all"
    resize: str = "none"

    def needs(self, views: Views) -> dict[str, tuple[int, ...]]:
        return {"student": (self.view,), "teacher": (self.view,)}

    def check(self, setting: str, record: Record) -> None:
        if self.layers not in LAYERS:
            raise errors.unknown(f"{setting}.layers", self.layers, LAYERS)
        if self.resize not in RESIZES:
            raise errors.unknown(f"{setting}.resize", self.resize, RESIZES)
        sizes: dict[str, list[tuple[int, int]]] = {}
        for name in ("student", "teacher"):
            sizes[name] = [(x.shape[1], x.shape[2]) for x in record.maps(name, self.view)]
            if not sizes[name]:
                raise errors.UserError(
                    f"{setting}: config.{name}.backbone has no feature maps to compare. Set it to "
                    "a ResNet, an EfficientNet or a MobileNet, or use another objective."
                )
        missing = [
            size for size in self._selected(sizes["teacher"]) if size not in sizes["student"]
        ]
        if self.resize == "none" and missing:
            raise errors.UserError(
                f"{setting}: the teacher has a map of {missing[0][0]}x{missing[0][1]}, the student "
                f"has maps of {', '.join(f'{h}x{w}' for h, w in sizes['student'])}. Set "
                f"{setting}.resize=linear, or set config.student.stem=config.teacher.stem."
            )

    def __call__(self, record: Record, memory: tuple[()], step: Array) -> Term:
        student, teacher = (record.maps(name, self.view) for name in ("student", "teacher"))
        pairs = self._pairs(student, teacher)
        losses = [jnp.mean(attention_distance(*pair)) for pair in pairs]
        sizes = [f"size_{student_map.shape[1]}" for student_map, _ in pairs]
        metrics = dict(zip(sizes, losses, strict=True))
        return Term(jnp.sum(jnp.stack(losses)), memory, metrics)

    def _pairs(
        self, student: tuple[Array, ...], teacher: tuple[Array, ...]
    ) -> list[tuple[Array, Array]]:
        """Returns the student's and the teacher's map of each layer."""
        teacher = self._selected(teacher)
        if self.resize == "none":
            by_size = {x.shape[1:3]: x for x in student}
            return [(by_size[x.shape[1:3]], x) for x in teacher]
        count = min(len(student), len(teacher))
        return list(zip(student[-count:], teacher[-count:], strict=True))

    def _selected(self, layers: Layers) -> Layers:
        return layers if self.layers == "all" else layers[-1:]
