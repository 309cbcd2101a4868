"""The core abstraction: a method is networks plus a sum of objectives.

An objective says which views it needs of which network, keeps its own memory and returns a
`Term`. What is encoded follows from the needs, so nothing is encoded that nobody reads.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.models.encoder import Encoded, Network
from disco_jax.ops.collectives import pmean
from disco_jax.ops.memory import Queue

NETWORKS = ("student", "momentum", "teacher")  # learned; its EMA copy; frozen
OUTPUTS = ("embedding", "features")  # after the head; after pooling


class Views(NamedTuple):
    """The numbers of the views that a recipe makes; 0 is the query, 1 the key."""

    globals: tuple[int, ...]
    locals: tuple[int, ...] = ()


class Record(NamedTuple):
    """Who encoded which view into what.

    Attributes:
      encoded: network -> view -> `Encoded`, of this replica's images.
      aux: whatever else the pipeline made, name -> array[B, ...].
      views: which views there are, and which of them are local.
      score: network -> f32[N, D] -> f32[N, K]: other embeddings on the network's prototypes as
        they are in this step, without a gradient.
    """

    encoded: Mapping[str, Mapping[int, Encoded]]
    aux: Mapping[str, Array]
    views: Views = Views((0, 1))
    score: Mapping[str, Callable[[Array], Array]] = {}

    def embedding(self, network: str, view: int) -> Array:
        """f32[B, D], not normalised."""
        return self.output(network, view, "embedding")

    def output(self, network: str, view: int, name: str) -> Array:
        """f32[B, D], not normalised: "embedding" or "features", see `OUTPUTS`."""
        found = getattr(self.encoded[network][view], name)
        assert found is not None, f"the {name} of the {network} was not kept"
        return found

    def scores(self, network: str, view: int) -> Array:
        """f32[B, K], of the embedding on the network's prototypes, which there must be."""
        scores = self.encoded[network][view].scores
        assert scores is not None, f"the {network} has no prototypes"
        return scores

    def maps(self, network: str, view: int) -> tuple[Array, ...]:
        """Feature maps of the network's backbone, which its objective must read (`reads_maps`)."""
        maps = self.encoded[network][view].maps
        assert maps is not None, f"nobody reads the maps of the {network}"
        return maps


class Term(NamedTuple):
    """What an objective makes of a record.

    Attributes:
      loss: f32[], the mean over this replica's batch, before the weight.
      memory: the objective's next memory, equal on all replicas.
      metrics: diagnostics, name -> f32[], averaged over replicas before they are logged.
    """

    loss: Array
    memory: Any
    metrics: Mapping[str, Array] = {}


class Objective(Protocol):
    """One term of a method's loss.

    Only `needs` and the call have to be written; the rest is for those that want more.

    Attributes:
      weight: of the term in the method's loss.
      reads_maps: whether it reads the backbones' feature maps.
      members: views that must show another image of the bag, see `data/bags.py`.
      aux: names of what it reads of `Record.aux`.
    """

    # Objectives are dataclasses: fields are filled in by `dataclasses.replace`.
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    weight: float
    reads_maps: ClassVar[bool] = False
    members: ClassVar[tuple[int, ...]] = ()
    aux: ClassVar[tuple[str, ...]] = ()

    @property
    def makes(self) -> tuple[int, ...]:
        """Views that `mix` adds to the recipe's."""
        return ()

    def needs(self, views: Views) -> Mapping[str, Iterable[int]]:
        """Network -> views that the objective reads."""
        ...

    def init(self, rng: Array, record: Record, inherited: Queue | None) -> Any:
        """The memory at step 0, () if none.

        Args:
          rng: a key of this objective.
          record: of shapes (`jax.ShapeDtypeStruct` leaves).
          inherited: the queue that came with the teacher, if one did.
        """
        return ()

    def matches(self) -> str | None:
        """What of the teacher is as wide as the student's embedding.

        "embedding" or "features"; None where the two may differ.
        """
        return None

    def reads(self, network: str) -> str:
        """Which output of a network in `needs`: a field of `Encoded`."""
        return "embedding"

    def check(self, setting: str, record: Record) -> None:
        """Refuses networks whose outputs it cannot compare.

        Args:
          setting: where the objective stands in the config, for messages.
          record: of shapes (`jax.ShapeDtypeStruct` leaves).

        Raises:
          UserError: with the shapes and what would do.
        """
        return None  # without a body type checkers take a protocol's method for an abstract one

    def mix(
        self, views: Mapping[int, Array], aux: Mapping[str, Array], rng: Array
    ) -> tuple[Mapping[int, Array], Mapping[str, Array]]:
        """Views and what else there is of a batch, with what the objective makes of them.

        Args:
          views: view -> f32[B, H, W, 3], normalised.
          aux: name -> array[B, ...] or what earlier objectives made.
          rng: a key of this step, equal on every replica.
        """
        return views, aux

    def __call__(self, record: Record, memory: Any, step: Array) -> Term: ...


@dataclasses.dataclass(frozen=True)
class Method:
    """Networks and the objectives that are summed over what they encode.

    Attributes:
      networks: name -> network; only those that some objective reads, and the student.
      objectives: name -> objective.
      views: what the recipe makes of an image.
      reuse: parts of the student that are the teacher's, copied and never changed, e.g. "head".
    """

    networks: Mapping[str, Network]
    objectives: Mapping[str, Objective]
    views: Views
    reuse: tuple[str, ...] = ()

    @property
    def plan(self) -> dict[str, tuple[int, ...]]:
        """Network -> the views that it encodes, in order, once each."""
        wanted: dict[str, set[int]] = {}
        for objective in self.objectives.values():
            for network, views in objective.needs(self.views).items():
                wanted.setdefault(network, set()).update(views)
        return {name: tuple(sorted(wanted[name])) for name in NETWORKS if name in wanted}

    def reads_maps(self, network: str) -> bool:
        """Whether some objective reads the feature maps of a network."""
        return any(
            objective.reads_maps and network in objective.needs(self.views)
            for objective in self.objectives.values()
        )

    def teacher_outputs(self, record: Record) -> dict[int, dict[str, int]]:
        """View -> field of `Encoded` -> width: what the objectives read of the teacher.

        Args:
          record: of shapes (`jax.ShapeDtypeStruct` leaves).
        """
        readers = [o for o in self.objectives.values() if "teacher" in o.needs(self.views)]
        names = sorted({objective.reads("teacher") for objective in readers})
        return {
            view: {name: record.output("teacher", view, name).shape[-1] for name in names}
            for view in self.plan.get("teacher", ())
        }

    def split(self, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The student's parameters that are learned, and those that are the teacher's."""
        learned = {part: tree for part, tree in params.items() if part not in self.reuse}
        return learned, {part: params[part] for part in self.reuse if part in params}

    def mix(
        self, views: Mapping[int, Array], aux: Mapping[str, Array], rng: Array
    ) -> tuple[Mapping[int, Array], Mapping[str, Array]]:
        """See `Objective.mix`, of all objectives."""
        for i, (_, objective) in enumerate(sorted(self.objectives.items())):
            views, aux = objective.mix(views, aux, jax.random.fold_in(rng, i))
        return views, aux

    def paced(self, steps_per_epoch: int) -> "Method":
        """The method whose objectives know how long an epoch is, where they ask."""
        objectives = {
            name: dataclasses.replace(objective, steps_per_epoch=steps_per_epoch)
            if hasattr(objective, "steps_per_epoch")
            else objective
            for name, objective in self.objectives.items()
        }
        return dataclasses.replace(self, objectives=objectives)

    def check(self, record: Record) -> None:
        """See `Objective.check`, of all objectives."""
        for name, objective in self.objectives.items():
            objective.check(f"config.objectives.{name}", record)

    def memory(self, rng: Array, record: Record, inherited: Queue | None = None) -> dict[str, Any]:
        """Every objective's memory at step 0; see `Objective.init`."""
        return {
            name: objective.init(jax.random.fold_in(rng, i), record, inherited)
            for i, (name, objective) in enumerate(sorted(self.objectives.items()))
        }

    def total(self, terms: Mapping[str, Term]) -> Array:
        """f32[]: the weighted sum of the terms' losses."""
        weighted = [self.objectives[name].weight * term.loss for name, term in terms.items()]
        return jnp.sum(jnp.stack(weighted))


def alpha(global_share: float) -> float | None:
    """A config's `global_share` as `rebalanced` takes it: below 0, every pair counts the same."""
    return None if global_share < 0 else global_share


def usage(scores: Array, temperature: float) -> Array:
    """f32[]: the share of the prototypes in use, 1 if all are alike, 1/K if it is one for all.

    exp(entropy) / K of the mean over the global batch of softmax(scores / temperature).

    Args:
      scores: f32[B, K], of this replica.
      temperature: > 0.
    """
    mean = pmean(jnp.mean(jax.nn.softmax(scores / temperature, axis=-1), axis=0))
    entropy = -jnp.sum(mean * jnp.log(jnp.maximum(mean, 1e-30)))
    return jax.lax.stop_gradient(jnp.exp(entropy) / scores.shape[-1])


def spread(embedding: Array) -> Array:
    """f32[]: how far unit rows spread over the global batch, 1 if evenly, 0 if collapsed.

    The square root of the variance summed over the dimensions.

    Args:
      embedding: f32[B, D], unit rows of this replica.
    """
    mean, power = pmean((jnp.mean(embedding, axis=0), jnp.mean(jnp.square(embedding))))
    return jnp.sqrt(jnp.maximum(embedding.shape[-1] * power - jnp.sum(jnp.square(mean)), 0.0))
