"""What it saves to share a teacher pass: seconds of a step on this machine, in turns, in one run.

    python benchmarks/shared.py joint      five DisCo students of other head widths, in one step
    python benchmarks/shared.py cached     DisCo and SEED from a teacher's kept outputs
    python benchmarks/shared.py compiled   the first, as the TPU's compiler counts it; takes long

"joint" prints the step of all five over the sum of their own steps; "cached" the steps over that of
MoCo-v2. Ratios are medians over rounds, each of one step of every program, with the least and the
most. --size and --batch make the images fewer or smaller; the networks stay. "compiled" prints
operations, bytes and cycles of whole steps on a chip of --topology with --batch images; it needs
disco-jax[plan] and no TPU.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from disco_jax import flags
from disco_jax.plan import hlo, program, topology
from disco_jax.train import state, step
from disco_jax.train.experiment import assemble

WIDTHS = 512, 1024, 1280, 2048, 4096
NETWORKS = "student=resnet18,teacher=resnet50"
KEPT = {"teacher.cache": "kept"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["joint", "cached", "compiled"])
    parser.add_argument("--size", type=int, help="px; 64, or 224 for the compiler")
    parser.add_argument("--batch", type=int, help="16, or 32 for the compiler")
    parser.add_argument("--norm", default="local", help="the teacher's statistics, or running")
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    compiles = given.what == "compiled"
    given.size = given.size or (224 if compiles else 64)
    given.batch = given.batch or (32 if compiles else 16)
    given.tpu = compiles
    if compiles:
        return count(joint(given), given)
    seconds = measure((joint if given.what == "joint" else cached)(given), given.rounds)
    for name, found in seconds.items():
        print(f"{name:24} {statistics.median(found):7.3f} s a step")
    if given.what == "joint":
        together = seconds.pop("together")
        alone = [sum(times) for times in zip(*seconds.values(), strict=True)]
        tell("together over alone", together, alone)
    else:
        for name in list(seconds)[1:]:
            tell(f"{name} over MoCo-v2", seconds[name], seconds["MoCo-v2"])


def tell(name, ours, theirs):
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    middle, least, most = statistics.median(ratios), min(ratios), max(ratios)
    print(f"{name}: {middle:.3f} ({least:.3f} to {most:.3f} in {len(ratios)} rounds)")


def count(steps, given):
    """Prints what whole steps of a chip cost, and those of the students alone in sum."""
    devices = topology.open_slice(given.topology).devices[:1]
    alone = []
    for name in sorted(steps, key=lambda name: name != "together"):
        run, arguments = steps[name]
        begin = time.monotonic()
        compiled = step.parallel(run, devices).lower(*arguments).compile()
        costs = compiled.cost_analysis()
        found = costs["flops"], costs["bytes accessed"], hlo.cycles(compiled.as_text())
        gflop, gbytes, kilo = found[0] / 1e9, found[1] / 1e9, found[2] / 1e3 / given.batch
        seconds = time.monotonic() - begin
        print(
            f"{name:14} {gflop:9.1f} GFLOP {gbytes:9.2f} GB {kilo:9.1f} thousand cycles an image"
            f"  ({seconds:.0f} s)",
            flush=True,
        )
        if name == "together":
            together = found
            continue
        alone.append(found)
        # Students that are not compiled yet count as the mean of those that are.
        sums = [sum(each) * len(WIDTHS) / len(alone) for each in zip(*alone, strict=True)]
        shares = [a / b for a, b in zip(together, sums, strict=True)]
        print(
            f"{'':14} together over alone, by {len(alone)} of {len(WIDTHS)}: "
            "{:.3f} of the operations, {:.3f} of the bytes, {:.3f} of the cycles".format(*shares),
            flush=True,
        )


def joint(given):
    """Name -> (step, arguments) of five students alone and together."""
    norm = {"teacher.norm": given.norm}
    configs = {
        f"hidden {width}": load(f"disco:{NETWORKS}", given, {"student.hidden": width, **norm})
        for width in WIDTHS
    }
    made = {name: program.abstract(config, 1, 1) for name, config in configs.items()}
    first = next(iter(configs.values()))
    recipe = assemble(first).views
    learners = {name: built.learner for name, (built, _) in made.items()}
    together = step.make_joint_step(learners, recipe, first.seed)
    alone = {name: (built.train_step, arguments) for name, (built, arguments) in made.items()}
    states = {name: arguments[0] for name, (_, arguments) in alone.items()}
    _, frozen, batch = next(iter(alone.values()))[1]
    return {**alone, "together": (together, (states, frozen, batch))}


def cached(given):
    """Name -> (step, arguments) of MoCo-v2 and of students of a cache."""
    one_view = {**KEPT, "objectives.distill.views": (0,)}
    configs = {
        "MoCo-v2": load("moco_v2:student=resnet18", given, {"student.hidden": 2048}),
        "DisCo, cached": load(f"disco:{NETWORKS}", given, KEPT),
        "DisCo, cached, one view": load(f"disco:{NETWORKS}", given, one_view),
        "SEED, cached": load(f"seed:{NETWORKS}", given, {**KEPT, "student.hidden": 2048}),
        "DisCo, live teacher": load(f"disco:{NETWORKS}", given, {}),
    }
    made = {name: program.abstract(config, 1, 1) for name, config in configs.items()}
    return {name: (built.train_step, arguments) for name, (built, arguments) in made.items()}


def load(recipe, given, changes):
    config = flags.load(recipe)
    config.update_from_flattened_dict(
        {"augment.size": given.size, "batch_size": given.batch, "dtype": "float32", **changes}
    )
    if given.tpu:
        config.dtype = "auto"
        program.as_on_tpus(config)
    if config.teacher.head == "auto":
        config.teacher.head = "mlp"
    return config


def measure(steps, rounds):
    """Name -> seconds of every round after the first, which compiles."""
    seconds, ready, devices = {name: [] for name in steps}, {}, jax.devices()[:1]
    for name, (one, arguments) in steps.items():
        begin, *others = filled(arguments)
        ready[name] = step.parallel(one, devices), state.everywhere(begin, devices), others
    for number in range(rounds + 1):
        for name, (run, current, others) in ready.items():
            begin = time.monotonic()
            current, _ = jax.block_until_ready(run(current, *others))
            ready[name] = run, current, others
            if number:
                seconds[name].append(time.monotonic() - begin)
    return seconds


def filled(arguments):
    """Arrays of the shapes; small numbers, so that nothing is denormal or infinite."""

    def fill(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.ones(x.shape, x.dtype)
        return (jax.random.uniform(jax.random.key(x.size), x.shape) * 0.02 + 0.01).astype(x.dtype)

    return jax.tree.map(fill, arguments)


if __name__ == "__main__":
    main()
