"""The train step of a config, compiled for a slice that is not there."""

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
from disco_jax.train.experiment import assemble

# The compiler's words when a program is too large: all that it needs and has, or of what lives for
# one step only.
_AMOUNT = r"([\d.]+)([KMGT]?)"
_ALL = re.compile(rf"Used {_AMOUNT} of {_AMOUNT} hbm", re.IGNORECASE)
_TEMPORARY = re.compile(rf"temporaries \({_AMOUNT}\) exceeds available HBM \({_AMOUNT}\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def as_on_tpus(config: Any) -> None:
    """Gives those choices of a config that ask where they are the values that TPUs take."""
    if config.dtype == "auto":
        config.dtype = "bfloat16"
    taken = {"exchange": "all_to_all", "columns": "on", "statistics": "on", "shifts": "off"}
    for choice, value in taken.items():
        if config.fast.get(choice, "auto") == "auto":
            config.fast[choice] = value


@dataclasses.dataclass(frozen=True)
class Program:
    """One step on one chip, as the compiler sees it.

    Attributes:
      parts: bytes of memory by what they hold: "student" (and its statistics), "momentum",
        "optimizer", "queues", "teacher", "batch", "activations" (and all else that lives for one
        step only) and "program".
      limit: bytes that a program may have.
      flops: floating-point operations.
      traffic: bytes that instructions read and write, on-chip memory included.
      streamed: bytes that cross the memory's border at least: what is there when the step begins
        and ends.
      cycles: see `hlo.cycles`; 0 for what does not fit.
      collectives: see `hlo.collective_bytes`.
      compile_s: seconds that the compiler took.
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
        """Of all parts."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether a chip's memory holds it."""
        return self.cycles > 0


def compile_step(config: Any, where: topology.Slice, steps_per_epoch: int) -> Program:
    """Compiles the step that `disco-jax pretrain` would take.

    Args:
      config: of a pretraining run, resolved; its batch is a multiple of the slice's chips.
      where: the slice.
      steps_per_epoch: for the schedules, which are part of the step.

    Returns:
      The program; what does not fit has its parts and nothing else.

    Raises:
      UserError: the settings of a method, a recipe or the optimizer will not do.
    """
    count = len(where.devices)
    built, arguments = abstract(config, count, steps_per_epoch)
    held = _held(arguments, count)
    begin = time.monotonic()
    lowered = step.parallel(built.train_step, where.devices).lower(*arguments)
    try:
        with _uncached():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return too_large(str(error), held)
    seconds = time.monotonic() - begin
    memory, costs, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    assert memory is not None and costs is not None and text is not None, "libtpu tells all three"
    crossing = memory.argument_size_in_bytes + memory.output_size_in_bytes
    # Arguments lie in tiles, with some padding; it counts as what lives for a step.
    held["activations"] = max(
        crossing - memory.alias_size_in_bytes + memory.temp_size_in_bytes - sum(held.values()), 0
    )
    held["program"] = memory.generated_code_size_in_bytes
    return Program(
        held,
        int(where.chip.hbm_bytes),
        flops=costs["flops"],
        traffic=costs["bytes accessed"],
        streamed=crossing,
        cycles=hlo.cycles(text),
        collectives=hlo.collective_bytes(text),
        compile_s=seconds,
    )


def too_large(message: str, held: dict[str, int]) -> Program:
    """What is known of a program that does not fit.

    Args:
      message: the compiler's.
      held: bytes of what is there when a step begins, by part.

    Raises:
      RuntimeError: the message is about something else.
    """
    everything, temporary = _ALL.search(message), _TEMPORARY.search(message)
    found = everything or temporary
    if found is None:
        raise RuntimeError(f"The compiler failed: {message}")
    needed, limit = (round(float(found[i]) * _UNITS[found[i + 1].upper()]) for i in (1, 3))
    if everything:
        needed -= sum(held.values())
    return Program({**held, "activations": max(needed, 0)}, limit)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Without the cache of compiled programs, which cannot be read without their devices."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, float("inf"))
    try:
        yield
    finally:
        jax.config.update(name, before)


def abstract(config: Any, replicas: int, steps_per_epoch: int) -> tuple[step.Built, tuple]:
    """The step of one replica, and the shapes of (state, frozen, batch).

    Args:
      config: of a pretraining run, resolved.
      replicas: that share a batch.
      steps_per_epoch: for the schedules.
    """
    experiment = assemble(config, steps_per_epoch=steps_per_epoch)
    method, record, built = experiment.method, experiment.record, experiment.build_step()
    taught, frozen = None, {}
    if "teacher" in experiment.needs:
        encoder, size = method.networks["teacher"].encoder, config.augment.size
        taught = jax.eval_shape(lambda: encoder.create(0, size))
        frozen = jax.eval_shape(lambda: experiment.frozen(encoder.create(0, size)))
    begin = jax.eval_shape(lambda teacher: experiment.initial_state(built, teacher=teacher), taught)
    begin = state.dealt_shapes(begin, replicas)
    batch = experiment.batch_shapes(replicas)
    if taught and config.teacher.cache:
        shape = (replicas, config.batch_size // replicas)
        frozen, batch["aux"][KEY] = {}, _kept(method.teacher_outputs(record), shape)
    return built, (begin, frozen, batch)


def _kept(outputs: Any, shape: tuple[int, ...]) -> Any:
    """What a cache of the teacher's outputs adds to a batch."""
    return jax.tree.map(lambda dim: jax.ShapeDtypeStruct((*shape, dim), jnp.bfloat16), outputs)


def _held(arguments: tuple, replicas: int) -> dict[str, int]:
    """Bytes that a chip holds when a step begins, without padding."""
    begin, frozen, batch = arguments
    copies = _bytes(state.copied(begin.memory))
    return {
        "student": _bytes(begin.student),
        "momentum": _bytes(begin.momentum),
        "optimizer": _bytes(begin.opt_state),
        "queues": copies + (_bytes(begin.memory) - copies) // replicas,
        "teacher": _bytes(frozen),
        "batch": _bytes(batch) // replicas,
    }


def _bytes(tree: Any) -> int:
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
