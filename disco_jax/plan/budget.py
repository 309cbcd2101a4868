"""What runs cost, told in a line each, before any of them is compiled or with a TPU's compiler."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from disco_jax.ops.collectives import AXIS
from disco_jax.plan import estimate, program, topology
from disco_jax.train import step
from disco_jax.train.experiment import assemble

IMAGES = 1_281_167  # of ImageNet, where only the speed of an epoch is told


def told(config: Any, slice_name: str = "") -> str:
    """Forward passes, parameters and operations of a run; on a slice also memory and hours.

    Args:
      config: of a pretraining run, resolved.
      slice_name: e.g. "v5e:2x4"; "": nothing is compiled.
    """
    built, arguments = program.abstract(config, 1, 1)
    passes = sum(map(len, built.learner.method.plan.values()))
    params = sum(x.size for x in jax.tree.leaves(arguments[0].student["params"]))
    line = (
        f"{passes} forward passes, {params / 2**20:.2f} M parameters, "
        f"{flops(built.train_step, arguments) / config.batch_size / 1e9:.3g} GFLOP an image"
    )
    return line + (on_slice(config, slice_name) if slice_name else "")


def on_slice(config: Any, name: str) -> str:
    """Memory and speed of a run on a TPU slice, by its compiler."""
    where = topology.open_slice(name)
    made = program.compile_step(config, where, max(1, IMAGES // config.batch_size))
    memory = f", {made.bytes / 2**30:.2f} of {made.limit / 2**30:.0f} GiB a chip"
    if not made.fits:
        return memory + ": too large"
    rate = config.batch_size / estimate.times(made, where).step
    return memory + f", {rate:.0f} images/s on {name}"


def told_together(configs: Mapping[str, Any]) -> str:
    """What training several runs in one step saves.

    Args:
      configs: name -> config, resolved, of runs that can train together.
    """
    alone, joint = costs(configs)
    return (
        f"{joint / 1e9:.3g} GFLOP an image, {joint / alone:.2f} of the {alone / 1e9:.3g} of as "
        "many runs alone"
    )


def costs(configs: Mapping[str, Any]) -> tuple[float, float]:
    """Operations an image of all runs alone, and of all in one step."""
    made = {name: program.abstract(config, 1, 1) for name, config in configs.items()}
    first = next(iter(configs.values()))
    recipe = assemble(first).views
    learners = {name: built.learner for name, (built, _) in made.items()}
    joint = step.make_joint_step(learners, recipe, first.seed)
    states = {name: arguments[0] for name, (_, arguments) in made.items()}
    _, (_, frozen, batch) = next(iter(made.values()))
    alone = sum(flops(built.train_step, arguments) for built, arguments in made.values())
    return alone / first.batch_size, flops(joint, (states, frozen, batch)) / first.batch_size


def flops(train_step: Callable[..., Any], arguments: tuple) -> float:
    """Operations of a step of one replica, as it is written: no compiler has touched it."""
    one = jax.vmap(train_step, in_axes=(None, None, 0), axis_name=AXIS)
    costs = jax.jit(one).lower(*arguments).cost_analysis()
    assert costs is not None, "CPUs, GPUs and TPUs count operations"
    return costs["flops"]
