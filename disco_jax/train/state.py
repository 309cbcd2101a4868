"""The training state: arrays only, without a device axis, equal on all replicas.

The one exception is a sharded queue (`Queue.shared`): inside the step each replica holds only its
own rows. `replicate` shards such queues and `gather_to_host` gathers them. No other code depends
on the sharding.
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
from disco_jax.run import hosts

Tree = TypeVar("Tree")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a pretraining run.

    Attributes:
      step: i32[], the number of completed steps.
      student: {"params", "batch_stats"} of the trained network.
      momentum: the same of its EMA copy; {} if the method has none.
      memory: objective -> its memory (queues).
      opt_state: the state of the optimizer.
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
    """Creates the state at step 0 on the host, without compiling the networks.

    Args:
      method: networks and objectives.
      tx: the optimizer.
      seed: seed of the initial weights and queues.
      size: image size in px.
      inherited: the queue stored with the teacher, if there is one.
      reused: the teacher's variables; the student copies the parts listed in `method.reuse`.
      started: parts of the student's variables that replace the random ones, from `start.load`.
      record: the output of `shapes`, if it has been computed.
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


def rotate_oldest_first(tree: Tree, batch: int) -> Tree:
    """Rotates every queue so that the next push overwrites its oldest rows.

    Only queues that were filled by batches of another size are rotated. A queue whose length is
    not a multiple of `batch` is left unchanged, since a push may start at any of its rows.

    Args:
      tree: arrays on the host.
      batch: number of rows of a push.
    """

    def rotate(leaf: Any) -> Any:
        if isinstance(leaf, Queue) and not len(leaf.vectors) % batch and leaf.pointer % batch:
            return leaf.rewound()
        return leaf

    return jax.tree.map(rotate, tree, is_leaf=lambda leaf: isinstance(leaf, Queue))


def replicate(tree: Tree, devices: Sequence[jax.Device] | None = None) -> Tree:
    """Copies every leaf to each device of the pod, the layout that the step takes.

    Without it the first step would donate arrays that live on a single local device, which fails
    across hosts. A sharded queue is split: each device gets only its own rows, and a host sees
    those of its own devices as [local_devices, K / devices, D].

    Args:
      tree: arrays on the host.
      devices: target devices; None: all devices of all hosts.
    """
    mesh = jax.sharding.Mesh(np.array(devices or jax.devices()), (AXIS,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    here = sorted(sharding.addressable_devices, key=operator.attrgetter("id"))

    def place(leaf: Array | Queue) -> Any:
        if isinstance(leaf, Queue):
            queue = _shard_queue(leaf, devices)
            return dataclasses.replace(queue, pointer=place(queue.pointer))
        # From host memory, so that no two leaves share a device buffer. One device at a time,
        # because a single call for all hosts would first compare every leaf between them.
        host_array = np.array(leaf)
        copies = [jax.device_put(host_array, device) for device in here]
        return jax.make_array_from_single_device_arrays(host_array.shape, sharding, copies)

    return jax.tree.map(place, tree, is_leaf=_is_shared)


def gather_to_host(tree: Tree) -> Tree:
    """Gathers the rows of sharded queues on every host, the layout that checkpoints store.

    Undoes `replicate`. Every process must call it. All other leaves are returned unchanged.

    Args:
      tree: as returned by the step.

    Returns:
      The tree, with the rows of sharded queues on the host in the order of their pushes.
    """

    def gather(leaf: Any) -> Any:
        if not _is_shared(leaf):
            return leaf
        vectors = hosts.all_gather_rows(np.asarray(leaf.vectors))
        return dataclasses.replace(leaf, vectors=vectors).unshard()

    return jax.tree.map(gather, tree, is_leaf=_is_shared)


def axes(tree: Any) -> Any:
    """Returns the `jax.pmap` axes of a state: 0 for rows of sharded queues, None elsewhere."""

    def axis(leaf: Any) -> Any:
        if not _is_shared(leaf):
            return None
        return dataclasses.replace(leaf, vectors=0, pointer=None)

    return jax.tree.map(axis, tree, is_leaf=_is_shared)


def without_sharded_rows(tree: Any) -> Any:
    """Returns a state on the devices without the rows of its sharded queues."""

    def without_rows(leaf: Any) -> Any:
        return dataclasses.replace(leaf, vectors=None) if _is_shared(leaf) else leaf

    return jax.tree.map(without_rows, tree, is_leaf=_is_shared)


def shard_shapes(tree: Tree, replicas: int) -> Tree:
    """Converts the shapes of a stored state to its shapes inside the step of one process.

    Args:
      tree: `jax.ShapeDtypeStruct`s.
      replicas: number of replicas among which queues are sharded.
    """

    def shard(leaf: Any) -> Any:
        if not _is_shared(leaf):
            return leaf
        return jax.eval_shape(lambda queue: queue.shard(replicas), leaf)

    return jax.tree.map(shard, tree, is_leaf=_is_shared)


def _is_shared(leaf: Any) -> bool:
    return isinstance(leaf, Queue) and leaf.shared > 0


def _shard_queue(queue: Queue, devices: Sequence[jax.Device] | None) -> Queue:
    """Splits the rows of a queue on the host between the devices; the pointer stays there."""
    queue = jax.tree.map(np.asarray, rotate_oldest_first(queue, queue.shared))
    here = jax.process_index()
    local = [d for d in devices or jax.local_devices() if d.process_index == here]
    vectors = queue.shard(len(local) * jax.process_count()).vectors
    first = here * len(local)  # replicas are numbered by process
    local_vectors = vectors[first : first + len(local)]
    return dataclasses.replace(queue, vectors=_shard_rows(local_vectors, local))


def shard_batch(tree: Tree) -> Tree:
    """Moves row i of every leaf to this host's i-th device, the layout of a batch in the step.

    Called in the prefetch thread, it overlaps the transfer of a batch with the previous step.

    Args:
      tree: arrays [local_devices, ...] on the host.
    """
    return _shard_rows(tree, jax.local_devices())


def _shard_rows(tree: Tree, devices: Sequence[jax.Device]) -> Tree:
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))
    return jax.device_put(tree, sharding)


def shapes(method: Method, sizes: Sequence[int]) -> Record:
    """Evaluates the shapes of the networks' outputs for one image, without any computation.

    Args:
      method: its plan lists the networks and the views that each of them encodes.
      sizes: size in px of each view of the recipe; views that an objective mixes have the size
        of view 0.

    Returns:
      A record of `jax.ShapeDtypeStruct`s.
    """
    encoded = {}
    for name, views in method.plan.items():
        network, maps = method.networks[name], method.reads_maps(name)
        shape_of = functools.cache(functools.partial(_output_shape, network, maps))
        encoded[name] = {v: shape_of(sizes[v if v < len(sizes) else 0]) for v in views}
    return Record(encoded, {}, method.views)


def _output_shape(network: Network, maps: bool, size: int) -> Encoded:
    """Returns the shapes of a network's outputs for one image of `size` px."""

    def encode(images: Array) -> Encoded:
        collections = ["params", "batch_stats", *([COLLECTION] if maps else [])]
        out, variables = network.encoder.init_with_output(
            jax.random.key(0), images, norm="running", mutable=collections
        )
        return out._replace(maps=by_size(variables.get(COLLECTION, {})) if maps else None)

    return jax.eval_shape(encode, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))


def _starting(student: Variables, started: Variables) -> Variables:
    """Replaces parts of the student's variables by those in `started`."""
    return {name: {**tree, **started.get(name, {})} for name, tree in student.items()}


def _reusing(method: Method, student: Variables, teacher: Variables | None) -> Variables:
    """Replaces the parts of the student in `method.reuse` by those of the teacher."""
    if not method.reuse:
        return student
    assert teacher is not None, "`method.reuse` needs the teacher's variables"
    variables = {}
    for collection, tree in student.items():
        own = {part: value for part, value in tree.items() if part not in method.reuse}
        reused = {p: teacher[collection][p] for p in method.reuse if p in teacher[collection]}
        variables[collection] = {**own, **reused}
    return variables
