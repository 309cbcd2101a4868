"""The core abstraction: a method consists of networks and a sum of objectives.

An objective declares which views it needs from which network, maintains its own memory and returns
a `Term`. The forward passes follow from the declared needs, so no unused output is computed.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from disco_jax.methods.rules import (
    POSITIVE,
    QUEUE_INITS,
    check_choice,
    check_positive,
    check_queue_size,
    check_share,
)
from disco_jax.models.encoder import Encoded, Network
from disco_jax.ops.collectives import pmean
from disco_jax.ops.memory import DEFAULT_SETTINGS, Queue, QueueSettings

NETWORKS = ("student", "momentum", "teacher")  # trained; its EMA copy; frozen
OUTPUTS = ("embedding", "features")  # after the head; after pooling
LABEL = "label"  # key of the classes in `Record.aux`; all other keys come from bags

_SET_BY_RUN = "set_by_run"


def set_by_run(default: Any) -> Any:
    """Declares a dataclass field that the run sets and that is not part of the config."""
    return dataclasses.field(default=default, metadata={_SET_BY_RUN: True})


def config_fields(cls: type["Objective"]) -> dict[str, Any]:
    """Returns the config fields of an objective and their defaults, in the order of declaration."""
    fields = dataclasses.fields(cls)
    return {field.name: field.default for field in fields if not field.metadata.get(_SET_BY_RUN)}


class Views(NamedTuple):
    """Indices of the views that a recipe creates; 0 is the query, 1 the key."""

    globals: tuple[int, ...]
    locals: tuple[int, ...] = ()


class Record(NamedTuple):
    """Outputs of all networks for the views of a batch.

    Attributes:
      encoded: network -> view -> `Encoded`, for this replica's images.
      aux: other arrays from the data pipeline, name -> array[B, ...].
      views: indices of the global and local views.
      score: network -> function f32[N, D] -> f32[N, K] that scores any embeddings on the network's
        prototypes of this step, without a gradient.
    """

    encoded: Mapping[str, Mapping[int, Encoded]]
    aux: Mapping[str, Array]
    views: Views = Views((0, 1))
    score: Mapping[str, Callable[[Array], Array]] = {}

    def embedding(self, network: str, view: int) -> Array:
        """Returns the embedding of a view, f32[B, D], not normalised."""
        return self.output(network, view, "embedding")

    def output(self, network: str, view: int, name: str) -> Array:
        """Returns an output of a network for a view, f32[B, D], not normalised.

        Args:
          network: a name in `NETWORKS`.
          view: index of the view.
          name: an element of `OUTPUTS`.

        Raises:
          AssertionError: if the record does not contain this output.
        """
        output = getattr(self.encoded[network][view], name)
        assert output is not None, f"the record has no {name} of the {network}"
        return output

    def scores(self, network: str, view: int) -> Array:
        """Returns the scores of a view's embedding on the network's prototypes, f32[B, K].

        Raises:
          AssertionError: if the network has no prototypes.
        """
        scores = self.encoded[network][view].scores
        assert scores is not None, f"the {network} has no prototypes"
        return scores

    def prediction(self, network: str, view: int) -> Array:
        """Returns the predictor's output for a view, f32[B, D], not normalised.

        Raises:
          AssertionError: if the network has no predictor.
        """
        prediction = self.encoded[network][view].prediction
        assert prediction is not None, f"the {network} has no predictor"
        return prediction

    def maps(self, network: str, view: int) -> tuple[Array, ...]:
        """Returns the feature maps of the network's backbone.

        Raises:
          AssertionError: if no objective that uses the network sets `reads_maps`.
        """
        maps = self.encoded[network][view].maps
        assert maps is not None, f"no objective sets reads_maps for the {network}"
        return maps


class Term(NamedTuple):
    """Result of an objective for one step.

    Attributes:
      loss: f32[], the mean over this replica's batch, not yet weighted.
      memory: the objective's memory for the next step, equal on all replicas.
      metrics: diagnostics, name -> f32[], averaged over replicas before logging.
    """

    loss: Array
    memory: Any
    metrics: Mapping[str, Array] = {}


class Objective(Protocol):
    """One term of a method's loss.

    A subclass is a frozen dataclass whose fields are its config section; each has a default. It
    must define `needs` and `__call__`; all other members have defaults.

    Attributes:
      weight: factor of the term in the method's loss.
      reads_maps: whether the objective uses the backbones' feature maps.
      reads_scores: whether it compares the student's scores on prototypes between views.
      half_queues: whether its queues may be stored in bfloat16 (`config.fast.half_queue`).
      shard_queues: whether replicas may each store a part of its queues
        (`config.fast.shard_queue`). It must push with `Queue.push_all` and pass `Queue.shared` on.
      bag_views: views that must show another image of the same bag; see `data/bags.py`.
      aux: keys of `Record.aux` that the objective uses: `LABEL`, or the name of an array that the
        bags provide.
      positive: names of fields that must be above 0; those that the objective lacks are ignored.
    """

    # Objectives are dataclasses; `dataclasses.replace` changes their fields.
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    weight: float
    reads_maps: ClassVar[bool] = False
    reads_scores: ClassVar[bool] = False
    half_queues: ClassVar[bool] = False
    shard_queues: ClassVar[bool] = False
    bag_views: ClassVar[tuple[int, ...]] = ()
    aux: ClassVar[tuple[str, ...]] = ()
    positive: ClassVar[tuple[str, ...]] = POSITIVE

    @property
    def synthetic_views(self) -> tuple[int, ...]:
        """Indices of the views that `augment_batch` adds to those of the recipe."""
        return ()

    @property
    def reads_bags(self) -> bool:
        """True if the objective uses bags of images."""
        return bool(self.bag_views or set(self.aux) - {LABEL})

    def needs(self, views: Views) -> Mapping[str, Iterable[int]]:
        """Returns the views whose outputs the objective uses, by network."""
        ...

    def init(self, rng: Array, record: Record, inherited: Queue | None) -> Any:
        """Returns the memory at step 0; () for an objective without memory.

        `Method.memory` applies the run's `QueueSettings` to the queues in it.

        Args:
          rng: a random key for this objective.
          record: a record with `jax.ShapeDtypeStruct` leaves.
          inherited: the queue stored in the teacher's checkpoint, or None.
        """
        return ()

    def match_width(self) -> str | None:
        """Returns the teacher output whose width must equal the student's embedding, or None.

        The output is an element of `OUTPUTS`; None means that widths may differ.
        """
        return None

    def network_output(self, network: str) -> str:
        """Returns the name of the output used from a network in `needs`, a field of `Encoded`."""
        return "embedding"

    def check_settings(self, setting: str, batch_size: int) -> None:
        """Checks values that would fail, or have another meaning, inside the step.

        The default checks the fields `positive`, global_share and queue_init, and `check_queue`.
        An objective with further rules extends it.

        Args:
          setting: path of the objective in the config, for messages.
          batch_size: images of all devices in a step.

        Raises:
          UserError: a value is not allowed; names the setting and the allowed values.
        """
        values = {name: getattr(self, name) for name in config_fields(type(self))}
        for name in self.positive:
            check_positive(f"{setting}.{name}", values.get(name, 1.0))
        check_share(f"{setting}.global_share", values.get("global_share", 0.0))
        init = values.get("queue_init", "random")
        check_choice(f"{setting}.queue_init", init, QUEUE_INITS)
        if "queue_size" in values:
            self.check_queue(f"{setting}.queue_size", values["queue_size"], batch_size)

    def check_queue(self, setting: str, size: int, batch_size: int) -> None:
        """Checks the size of the objective's queue: by default one or more whole batches.

        Args:
          setting: path of the size in the config, for messages.
          size: number of entries.
          batch_size: images of all devices in a step.

        Raises:
          UserError: with the nearest sizes that are allowed.
        """
        check_queue_size(setting, size, batch_size)

    def check(self, setting: str, record: Record) -> None:
        """Checks that the objective can compare the outputs of the networks.

        Args:
          setting: path of the objective in the config, for messages.
          record: a record with `jax.ShapeDtypeStruct` leaves.

        Raises:
          UserError: if it cannot, with the shapes and the settings to change.
        """
        return None  # type checkers treat a protocol's method without a body as abstract

    def augment_batch(
        self, views: Mapping[int, Array], aux: Mapping[str, Array], rng: Array
    ) -> tuple[Mapping[int, Array], Mapping[str, Array]]:
        """Returns a batch's views and auxiliary arrays with the objective's additions.

        Args:
          views: view -> f32[B, H, W, 3], normalised.
          aux: name -> array[B, ...], or a value added by an earlier objective.
          rng: a random key for this step, equal on all replicas.
        """
        return views, aux

    def __call__(self, record: Record, memory: Any, step: Array) -> Term: ...


@dataclasses.dataclass(frozen=True)
class Method:
    """Networks and the sum of objectives on their outputs.

    Attributes:
      networks: name -> network; only the student and networks that an objective uses.
      objectives: name -> objective.
      views: indices of the views that the recipe creates from an image.
      reuse: parts of the student that are copied from the teacher and stay frozen, e.g. "head".
      queues: how queues in the objectives' memory are stored.
    """

    networks: Mapping[str, Network]
    objectives: Mapping[str, Objective]
    views: Views
    reuse: tuple[str, ...] = ()
    queues: QueueSettings = DEFAULT_SETTINGS

    @property
    def plan(self) -> dict[str, tuple[int, ...]]:
        """The views that each network encodes, sorted and without duplicates."""
        needs: dict[str, set[int]] = {}
        for objective in self.objectives.values():
            for network, views in objective.needs(self.views).items():
                needs.setdefault(network, set()).update(views)
        return {name: tuple(sorted(needs[name])) for name in NETWORKS if name in needs}

    def reads_maps(self, network: str) -> bool:
        """Returns whether any objective uses the feature maps of a network."""
        return any(
            objective.reads_maps and network in objective.needs(self.views)
            for objective in self.objectives.values()
        )

    def teacher_outputs(self, record: Record) -> dict[int, dict[str, int]]:
        """Returns the widths of the teacher outputs that objectives use.

        Args:
          record: a record with `jax.ShapeDtypeStruct` leaves.

        Returns:
          view -> field of `Encoded` -> width.
        """
        readers = [o for o in self.objectives.values() if "teacher" in o.needs(self.views)]
        names = sorted({objective.network_output("teacher") for objective in readers})
        return {
            view: {name: record.output("teacher", view, name).shape[-1] for name in names}
            for view in self.plan.get("teacher", ())
        }

    def split(self, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Splits the student's parameters into trained ones and those reused from the teacher."""
        learned = {part: tree for part, tree in params.items() if part not in self.reuse}
        return learned, {part: params[part] for part in self.reuse if part in params}

    def augment_batch(
        self, views: Mapping[int, Array], aux: Mapping[str, Array], rng: Array
    ) -> tuple[Mapping[int, Array], Mapping[str, Array]]:
        """Applies `Objective.augment_batch` of all objectives, in the order of their names."""
        for i, (_, objective) in enumerate(sorted(self.objectives.items())):
            views, aux = objective.augment_batch(views, aux, jax.random.fold_in(rng, i))
        return views, aux

    def with_epoch_length(self, steps_per_epoch: int) -> "Method":
        """Returns the method with `steps_per_epoch` set in every objective that has this field."""
        objectives = dict(self.objectives)
        for name, objective in objectives.items():
            if any(field.name == "steps_per_epoch" for field in dataclasses.fields(objective)):
                objectives[name] = dataclasses.replace(objective, steps_per_epoch=steps_per_epoch)
        return dataclasses.replace(self, objectives=objectives)

    def check(self, record: Record) -> None:
        """Calls `Objective.check` of all objectives."""
        for name, objective in self.objectives.items():
            objective.check(f"config.objectives.{name}", record)

    def memory(self, rng: Array, record: Record, inherited: Queue | None = None) -> dict[str, Any]:
        """Returns every objective's memory at step 0, by name; see `Objective.init`."""
        return {
            name: self._stored(
                objective, objective.init(jax.random.fold_in(rng, i), record, inherited)
            )
            for i, (name, objective) in enumerate(sorted(self.objectives.items()))
        }

    def _stored(self, objective: Objective, memory: Any) -> Any:
        """Applies `queues`, as far as the objective supports them, to the queues in its memory."""
        half = self.queues.half and objective.half_queues
        shared = self.queues.shared if objective.shard_queues else 0

        def store(leaf: Any) -> Any:
            if isinstance(leaf, Queue):
                # A queue shorter than the batch, whose last rows it holds, is not sharded.
                parts = shared if shared <= len(leaf.vectors) else 0
                return leaf.stored(half, parts, self.queues.access)
            return leaf

        return jax.tree.map(store, memory, is_leaf=lambda leaf: isinstance(leaf, Queue))

    def total(self, terms: Mapping[str, Term]) -> Array:
        """Returns the weighted sum of the terms' losses, f32[]."""
        weighted = [self.objectives[name].weight * term.loss for name, term in terms.items()]
        return jnp.sum(jnp.stack(weighted))


def alpha(global_share: float) -> float | None:
    """Converts a config's `global_share` for `rebalanced`: negative values become None."""
    return None if global_share < 0 else global_share


def prototype_perplexity(scores: Array, temperature: float) -> Array:
    """Returns the perplexity of the prototypes' mean assignment divided by K, f32[].

    exp(entropy) / K of the mean over the global batch of softmax(scores / temperature). It is 1 if
    all prototypes are used equally and 1/K if all examples share one prototype.

    Args:
      scores: f32[B, K], of this replica.
      temperature: > 0.
    """
    mean = pmean(jnp.mean(jax.nn.softmax(scores / temperature, axis=-1), axis=0))
    entropy = -jnp.sum(mean * jnp.log(jnp.maximum(mean, 1e-30)))
    return jax.lax.stop_gradient(jnp.exp(entropy) / scores.shape[-1])


def embedding_std(embedding: Array) -> Array:
    """Returns the standard deviation of unit rows over the global batch, f32[].

    The square root of the variance summed over the dimensions: 1 for rows with mean zero, 0 for a
    collapsed embedding.

    Args:
      embedding: f32[B, D], unit rows of this replica.
    """
    mean, power = pmean((jnp.mean(embedding, axis=0), jnp.mean(jnp.square(embedding))))
    return jnp.sqrt(jnp.maximum(embedding.shape[-1] * power - jnp.sum(jnp.square(mean)), 0.0))
