"""What a run is at a step: arrays only, with no device axis, equal on all replicas.

A queue that replicas share (`Queue.shared`) has another form inside the step, where each of them
has its own rows: `everywhere` makes that form, `whole` undoes it, and nobody else knows of it.
"""

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from disco_jax.methods.base import Method, Record
from disco_jax.models.encoder import Encoded, Network, Variables
from disco_jax.models.layers.feature_maps import COLLECTION, by_size
from disco_jax.ops.collectives import AXIS
from disco_jax.ops.memory import Queue
from disco_jax.train import hosts

Tree = TypeVar("Tree")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a pretraining run.

    Attributes:
      step: i32[], steps taken.
      student: {"params", "batch_stats"} of what is learned.
      momentum: the same of its EMA copy, {} if the method has none.
      memory: objective -> its memory (queues).
      opt_state: the optimizer's.
    """

    step: Array
    student: Variables
    momentum: Variables
    memory: Mapping[str, Any]
    opt_state: Any


def create(
    method: Method,
    tx: optax.GradientTransformation,
    seed: int,
    size: int,
    inherited: Queue | None = None,
    reused: Variables | None = None,
    started: Variables | None = None,
    record: Record | None = None,
) -> TrainState:
    """The state at step 0, on the host; nothing is compiled for the networks.

    Args:
      method: what is learned.
      tx: the optimizer.
      seed: of the initial weights and queues.
      size: of the images in px.
      inherited: the queue that came with the teacher, if one did.
      reused: the teacher's variables; `method.reuse` says which parts the student copies.
      started: parts of the student's variables that are given, see `start.load`.
      record: what `shapes` gave, if it is there already.
    """
    created = method.networks["student"].encoder.create(seed, size)
    student = _reusing(method, _starting(created, started or {}), reused)
    record = record or shapes(method, (size,))
    learned, _ = method.split(student["params"])
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        student=student,
        momentum=student if "momentum" in method.plan else {},
        memory=method.memory(jax.random.fold_in(jax.random.key(seed), 1), record, inherited),
        opt_state=tx.init(learned),
    )


def refilled_by(tree: Tree, batch: int) -> Tree:
    """The tree, its queues such that pushes of `batch` rows replace the oldest of them.

    Those that batches of another size filled are rewound. All others stay as they are, and those
    whose length is no multiple of the batch, into which it goes from any row on.

    Args:
      tree: arrays on the host.
      batch: rows of a push.
    """

    def put(leaf: Any) -> Any:
        if isinstance(leaf, Queue) and not len(leaf.vectors) % batch and leaf.pointer % batch:
            return leaf.rewound()
        return leaf

    return jax.tree.map(put, tree, is_leaf=lambda leaf: isinstance(leaf, Queue))


def everywhere(tree: Tree, devices: Sequence[jax.Device] | None = None) -> Tree:
    """A copy of every leaf on each device of the pod, as the step takes it.

    Without it the first step would donate arrays that live on one local device only, which fails
    across hosts. Of a queue that replicas share each device gets its own rows alone, and a host
    sees those of its devices: [local_devices, K / devices, D].

    Args:
      tree: arrays on the host.
      devices: where to; None: all of all hosts.
    """
    mesh = jax.sharding.Mesh(np.array(devices or jax.devices()), (AXIS,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    here = sorted(sharding.addressable_devices, key=operator.attrgetter("id"))

    def put(leaf: Array | Queue) -> Any:
        if isinstance(leaf, Queue):
            queue = _dealt(leaf, devices)
            return dataclasses.replace(queue, pointer=put(queue.pointer))
        # From host memory, so that no two leaves share a device buffer; a device at a time, as one
        # call for all hosts would first compare every leaf between them.
        own = np.array(leaf)
        copies = [jax.device_put(own, device) for device in here]
        return jax.make_array_from_single_device_arrays(own.shape, sharding, copies)

    return jax.tree.map(put, tree, is_leaf=_is_shared)


def whole(tree: Tree) -> Tree:
    """Undoes `everywhere`, for what is stored: queues that replicas share are put together.

    Every process must call it. All other leaves stay as they are.

    Args:
      tree: as the step returned it.

    Returns:
      The tree, the rows of such queues on the host and in the order in which they were pushed.
    """

    def put(leaf: Any) -> Any:
        if not _is_shared(leaf):
            return leaf
        vectors = hosts.rows(np.asarray(leaf.vectors))
        return dataclasses.replace(leaf, vectors=vectors).collected()

    return jax.tree.map(put, tree, is_leaf=_is_shared)


def axes(tree: Any) -> Any:
    """Which leaves differ by device inside the step, for `jax.pmap`: 0, or None where none does."""

    def axis(leaf: Any) -> Any:
        if not _is_shared(leaf):
            return None
        return dataclasses.replace(leaf, vectors=0, pointer=None)

    return jax.tree.map(axis, tree, is_leaf=_is_shared)


def copied(tree: Any) -> Any:
    """A state on the devices without what differs by device."""

    def rest(leaf: Any) -> Any:
        return dataclasses.replace(leaf, vectors=None) if _is_shared(leaf) else leaf

    return jax.tree.map(rest, tree, is_leaf=_is_shared)


def dealt_shapes(tree: Tree, replicas: int) -> Tree:
    """The shapes of a state inside the step of one process, of those of the state as it is stored.

    Args:
      tree: `jax.ShapeDtypeStruct`s.
      replicas: that share what is shared.
    """

    def dealt(leaf: Any) -> Any:
        if not _is_shared(leaf):
            return leaf
        return jax.eval_shape(lambda queue: queue.dealt(replicas), leaf)

    return jax.tree.map(dealt, tree, is_leaf=_is_shared)


def _is_shared(leaf: Any) -> bool:
    return isinstance(leaf, Queue) and leaf.shared > 0


def _dealt(queue: Queue, devices: Sequence[jax.Device] | None) -> Queue:
    """A whole queue on the host as `everywhere` makes it, but for the pointer."""
    queue = jax.tree.map(np.asarray, refilled_by(queue, queue.shared))
    here = jax.process_index()
    local = [d for d in devices or jax.local_devices() if d.process_index == here]
    vectors = queue.dealt(len(local) * jax.process_count()).vectors
    first = here * len(local)  # replicas go by process
    mine = vectors[first : first + len(local)]
    return dataclasses.replace(queue, vectors=_apart(mine, local))


def apart(tree: Tree) -> Tree:
    """Row i of every leaf on this host's i-th device, as the step takes its batch.

    In the thread that reads ahead, it moves a batch while the step before it is computed.

    Args:
      tree: arrays [local_devices, ...] on the host.
    """
    return _apart(tree, jax.local_devices())


def _apart(tree: Tree, devices: Sequence[jax.Device]) -> Tree:
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))
    return jax.device_put(tree, sharding)


def shapes(method: Method, sizes: Sequence[int]) -> Record:
    """What the networks make of one image: a record of `jax.ShapeDtypeStruct`s.

    Args:
      method: whose plan is followed.
      sizes: of each view that the recipe makes, in px; views that an objective mixes have the
        size of view 0.
    """
    encoded = {}
    for name, views in method.plan.items():
        network, maps = method.networks[name], method.reads_maps(name)
        of_size = functools.cache(functools.partial(_shape, network, maps))
        encoded[name] = {v: of_size(sizes[v if v < len(sizes) else 0]) for v in views}
    return Record(encoded, {}, method.views)


def _shape(network: Network, maps: bool, size: int) -> Encoded:
    def first(images: Array) -> Encoded:
        encoder = network.encoder
        out, kept = encoder.init_with_output(
            jax.random.key(0), images, norm="running", mutable=["params", "batch_stats", *wanted]
        )
        found = by_size(kept.get(COLLECTION, {})) if maps else None
        return out._replace(maps=found)

    wanted = [COLLECTION] if maps else []
    return jax.eval_shape(first, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))


def _starting(student: Variables, started: Variables) -> Variables:
    """The student with the parts that it starts from instead of fresh ones."""
    return {name: {**tree, **started.get(name, {})} for name, tree in student.items()}


def _reusing(method: Method, student: Variables, teacher: Variables | None) -> Variables:
    """The student with the parts of the teacher that it reuses."""
    if not method.reuse:
        return student
    assert teacher is not None, "the parts to reuse come from the teacher"
    made = {}
    for collection, tree in student.items():
        theirs = {p: teacher[collection][p] for p in method.reuse if p in teacher[collection]}
        mine = {part: value for part, value in tree.items() if part not in method.reuse}
        made[collection] = {**mine, **theirs}
    return made
