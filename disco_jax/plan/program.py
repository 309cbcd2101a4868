"""The train step of a run, compiled for a TPU slice without the hardware."""

import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from disco_jax.data.targets import KEY
from disco_jax.plan import hlo, topology
from disco_jax.train import state, step
from disco_jax.train.experiment import Experiment

# The compiler's error messages for programs that are too large: either the total memory needed and
# available, or only that of temporaries.
_AMOUNT = r"([\d.]+)([KMGT]?)"
_TOTAL = re.compile(rf"Used {_AMOUNT} of {_AMOUNT} hbm", re.IGNORECASE)
_TEMPORARY = re.compile(rf"temporaries \({_AMOUNT}\) exceeds available HBM \({_AMOUNT}\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Program:
    """One step on one chip, as compiled.

    Attributes:
      parts: bytes of memory by content: "student" (with its statistics), "momentum", "optimizer",
        "queues", "teacher", "batch", "activations" (and all other temporaries of a step) and
        "program".
      limit: bytes of memory available to a program.
      flops: floating-point operations.
      traffic: bytes that instructions read and write, including on-chip memory.
      streamed: minimum bytes of main memory traffic: the arguments and the results of the step.
      cycles: see `hlo.cycles`; 0 if the program does not fit.
      collectives: see `hlo.collective_bytes`.
      compile_s: compilation time in seconds.
    """

    parts: dict[str, int]
    limit: int
    flops: float = 0.0
    traffic: float = 0.0
    streamed: int = 0
    cycles: float = 0.0
    collectives: dict[str, hlo.Collective] = dataclasses.field(default_factory=dict)
    compile_s: float = 0.0

    @property
    def bytes(self) -> int:
        """Total bytes of all parts."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """True if the program fits into a chip's memory."""
        return self.cycles > 0


def compile_step(experiment: Experiment, where: topology.Slice) -> Program:
    """Compiles the train step of `disco-jax pretrain`.

    Args:
      experiment: a pretraining run with its number of steps per epoch; its batch is a multiple of
        the slice's chips.
      where: the slice.

    Returns:
      The program; one that does not fit has only `parts` and `limit`.

    Raises:
      UserError: if settings of a method, a recipe or the optimizer are invalid.
    """
    count = len(where.devices)
    built, arguments = abstract(experiment, count)
    parts = _argument_bytes(arguments, count)
    start = time.monotonic()
    lowered = step.parallel(built.train_step, where.devices).lower(*arguments)
    try:
        with _uncached():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return too_large(str(error), parts)
    seconds = time.monotonic() - start
    memory, costs, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    assert memory is not None and costs is not None and text is not None, (
        "libtpu must provide all three"
    )
    crossing = memory.argument_size_in_bytes + memory.output_size_in_bytes
    # Arguments are stored in tiles; their padding counts as activations.
    parts["activations"] = max(
        crossing - memory.alias_size_in_bytes + memory.temp_size_in_bytes - sum(parts.values()), 0
    )
    parts["program"] = memory.generated_code_size_in_bytes
    return Program(
        parts,
        int(where.chip.hbm_bytes),
        flops=costs["flops"],
        traffic=costs["bytes accessed"],
        streamed=crossing,
        cycles=hlo.cycles(text),
        collectives=hlo.collective_bytes(text),
        compile_s=seconds,
    )


def too_large(message: str, argument_bytes: dict[str, int]) -> Program:
    """Returns the known sizes of a program that does not fit.

    Args:
      message: the compiler's error message.
      argument_bytes: bytes of the arguments of a step, by part.

    Raises:
      RuntimeError: if the message has another cause.
    """
    total, temporary = _TOTAL.search(message), _TEMPORARY.search(message)
    match = total or temporary
    if match is None:
        raise RuntimeError(f"The compiler failed: {message}")
    needed, limit = (round(float(match[i]) * _UNITS[match[i + 1].upper()]) for i in (1, 3))
    if total:
        needed -= sum(argument_bytes.values())
    return Program({**argument_bytes, "activations": max(needed, 0)}, limit)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Disables the compilation cache, whose entries need the devices to be read."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


def abstract(experiment: Experiment, replicas: int) -> tuple[step.Built, tuple]:
    """Returns the step of one replica, and the shapes of (state, frozen, batch).

    Args:
      experiment: a pretraining run with its number of steps per epoch, for the schedules.
      replicas: number of replicas that share a batch.
    """
    method, record, built = experiment.method, experiment.record, experiment.build_step()
    teacher_shapes, frozen = None, {}
    if "teacher" in experiment.needs:
        encoder, size = method.networks["teacher"].encoder, experiment.settings.augment.size
        teacher_shapes = jax.eval_shape(lambda: encoder.create(0, size))
        frozen = jax.eval_shape(lambda: experiment.frozen(encoder.create(0, size)))
    initial_state = jax.eval_shape(
        lambda teacher: experiment.initial_state(built, teacher=teacher), teacher_shapes
    )
    initial_state = state.shard_shapes(initial_state, replicas)
    batch = experiment.batch_shapes(replicas)
    if teacher_shapes and experiment.settings.teacher.cache:
        shape = (replicas, experiment.settings.batch_size // replicas)
        outputs = method.teacher_outputs(record)
        frozen, batch["aux"][KEY] = {}, _cached_shapes(outputs, shape)
    return built, (initial_state, frozen, batch)


def _cached_shapes(outputs: Any, shape: tuple[int, ...]) -> Any:
    """Returns the shapes that a cache of the teacher's outputs adds to a batch."""
    return jax.tree.map(lambda dim: jax.ShapeDtypeStruct((*shape, dim), jnp.bfloat16), outputs)


def _argument_bytes(arguments: tuple, replicas: int) -> dict[str, int]:
    """Returns the bytes of a step's arguments on one chip, by part, without padding."""
    initial_state, frozen, batch = arguments
    replicated = _bytes(state.without_sharded_rows(initial_state.memory))
    return {
        "student": _bytes(initial_state.student),
        "momentum": _bytes(initial_state.momentum),
        "optimizer": _bytes(initial_state.opt_state),
        "queues": replicated + (_bytes(initial_state.memory) - replicated) // replicas,
        "teacher": _bytes(frozen),
        "batch": _bytes(batch) // replicas,
    }


def _bytes(tree: Any) -> int:
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
