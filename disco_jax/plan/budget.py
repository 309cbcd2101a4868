"""Cost of runs in one line each, before compiling, or with a TPU's compiler."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from disco_jax.ops.collectives import AXIS
from disco_jax.plan import estimate, program, topology
from disco_jax.train import step
from disco_jax.train.experiment import Experiment

IMAGES = 1_281_167  # ImageNet's training images, for the number of steps in an epoch


def told(experiment: Experiment, slice_name: str = "") -> str:
    """Formats forward passes, parameters and operations of a run, and memory and speed on a slice.

    Args:
      experiment: a pretraining run.
      slice_name: e.g. "v5e:2x4"; "" skips compilation.
    """
    built, arguments = program.abstract(experiment.with_epoch_length(1), 1)
    passes = sum(map(len, built.learner.method.plan.values()))
    params = sum(x.size for x in jax.tree.leaves(arguments[0].student["params"]))
    per_image = flops(built.train_step, arguments) / experiment.settings.batch_size
    line = (
        f"{passes} forward passes, {params / 2**20:.2f} M parameters, "
        f"{per_image / 1e9:.3g} GFLOP an image"
    )
    return line + (on_slice(experiment, slice_name) if slice_name else "")


def on_slice(experiment: Experiment, name: str) -> str:
    """Formats memory and speed of a run on a TPU slice, as estimated by its compiler."""
    tpu_slice, batch_size = topology.open_slice(name), experiment.settings.batch_size
    steps_per_epoch = max(1, IMAGES // batch_size)
    compiled = program.compile_step(experiment.with_epoch_length(steps_per_epoch), tpu_slice)
    memory = f", {compiled.bytes / 2**30:.2f} of {compiled.limit / 2**30:.0f} GiB a chip"
    if not compiled.fits:
        return memory + ": too large"
    rate = batch_size / estimate.times(compiled, tpu_slice).step
    return memory + f", {rate:.0f} images/s on {name}"


def told_together(experiments: Mapping[str, Experiment]) -> str:
    """Formats the savings of training several runs in one step.

    Args:
      experiments: name -> run; they can train together.
    """
    separate, joint = costs(experiments)
    return (
        f"{joint / 1e9:.3g} GFLOP an image, {joint / separate:.2f} of the {separate / 1e9:.3g} of "
        "separate runs"
    )


def costs(experiments: Mapping[str, Experiment]) -> tuple[float, float]:
    """Returns the operations per image of all runs trained separately, and in one joint step."""
    abstract_steps = {
        name: program.abstract(run.with_epoch_length(1), 1) for name, run in experiments.items()
    }
    first = next(iter(experiments.values()))
    learners = {name: built.learner for name, (built, _) in abstract_steps.items()}
    joint = step.make_joint_step(learners, first.views, first.settings.seed)
    states = {name: arguments[0] for name, (_, arguments) in abstract_steps.items()}
    _, (_, frozen, batch) = next(iter(abstract_steps.values()))
    separate = sum(
        flops(built.train_step, arguments) for built, arguments in abstract_steps.values()
    )
    batch_size = first.settings.batch_size
    return separate / batch_size, flops(joint, (states, frozen, batch)) / batch_size


def flops(train_step: Callable[..., Any], arguments: tuple) -> float:
    """Counts the operations of a step of one replica, before compiler optimizations."""
    one = jax.vmap(train_step, in_axes=(None, None, 0), axis_name=AXIS)
    costs = jax.jit(one).lower(*arguments).cost_analysis()
    assert costs is not None, "the backend must provide a cost analysis"
    return costs["flops"]
