"""Savings of sharing a teacher's forward pass: seconds of a step, measured in turns in one run.

    python benchmarks/shared.py joint      five DisCo students with different head widths, one step
    python benchmarks/shared.py cached     DisCo and SEED from a teacher's cached outputs
    python benchmarks/shared.py compiled   "joint" as estimated by the TPU compiler; slow

"joint" prints the joint step divided by the sum of the separate steps; "cached" the steps divided
by MoCo-v2's. Ratios are medians over rounds, each with one step of every program, followed by the
minimum and the maximum. --size and --batch reduce the images; the networks stay the same.
"compiled" prints operations, bytes and cycles of whole steps on a chip of --topology with --batch
images; it needs disco-jax[plan] and no TPU.
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
from disco_jax.train.experiment import assemble, resolve_auto

WIDTHS = 512, 1024, 1280, 2048, 4096
NETWORKS = "student=resnet18,teacher=resnet50"
CACHED = {"teacher.cache": "kept"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["joint", "cached", "compiled"])
    parser.add_argument(
        "--size", type=int, help="image size in px; default: 64, or 224 for compiled"
    )
    parser.add_argument(
        "--batch", type=int, help="images per step; default: 16, or 32 for compiled"
    )
    parser.add_argument("--norm", default="local", help="teacher.norm: local or running")
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    compile_only = args.what == "compiled"
    args.size = args.size or (224 if compile_only else 64)
    args.batch = args.batch or (32 if compile_only else 16)
    args.tpu = compile_only
    if compile_only:
        return count(joint(args), args)
    seconds = measure((joint if args.what == "joint" else cached)(args), args.rounds)
    for name, step_times in seconds.items():
        print(f"{name:24} {statistics.median(step_times):7.3f} s per step")
    if args.what == "joint":
        together = seconds.pop("together")
        separate = [sum(step_times) for step_times in zip(*seconds.values(), strict=True)]
        print_ratio("joint over separate", together, separate)
    else:
        for name in list(seconds)[1:]:
            print_ratio(f"{name} over MoCo-v2", seconds[name], seconds["MoCo-v2"])


def print_ratio(name, numerators, denominators):
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    median, low, high = statistics.median(ratios), min(ratios), max(ratios)
    print(f"{name}: {median:.3f} ({low:.3f} to {high:.3f} in {len(ratios)} rounds)")


def count(steps, args):
    """Prints the cost of whole steps of a chip, and the sum of the separate students' steps."""
    devices = topology.open_slice(args.topology).devices[:1]
    separate = []
    for name in sorted(steps, key=lambda name: name != "together"):
        train_step, arguments = steps[name]
        begin = time.monotonic()
        compiled = step.parallel(train_step, devices).lower(*arguments).compile()
        costs = compiled.cost_analysis()
        cost = costs["flops"], costs["bytes accessed"], hlo.cycles(compiled.as_text())
        gflop, gbytes, kilo = cost[0] / 1e9, cost[1] / 1e9, cost[2] / 1e3 / args.batch
        seconds = time.monotonic() - begin
        print(
            f"{name:14} {gflop:9.1f} GFLOP {gbytes:9.2f} GB {kilo:9.1f} thousand cycles per image"
            f"  ({seconds:.0f} s)",
            flush=True,
        )
        if name == "together":
            together = cost
            continue
        separate.append(cost)
        # Students that are not compiled yet are estimated by the mean of the others.
        separate_sums = [
            sum(each) * len(WIDTHS) / len(separate) for each in zip(*separate, strict=True)
        ]
        ratios = [a / b for a, b in zip(together, separate_sums, strict=True)]
        print(
            f"{'':14} joint over separate, from {len(separate)} of {len(WIDTHS)}: "
            "{:.3f} of the operations, {:.3f} of the bytes, {:.3f} of the cycles".format(*ratios),
            flush=True,
        )


def joint(args):
    """Returns name -> (step, arguments) of five students, separately and jointly."""
    norm = {"teacher.norm": args.norm}
    configs = {
        f"hidden {width}": load(f"disco:{NETWORKS}", args, {"student.hidden": width, **norm})
        for width in WIDTHS
    }
    experiments = {name: assemble(config, steps_per_epoch=1) for name, config in configs.items()}
    abstract_steps = {name: program.abstract(run, 1) for name, run in experiments.items()}
    first = next(iter(experiments.values()))
    learners = {name: built.learner for name, (built, _) in abstract_steps.items()}
    together = step.make_joint_step(learners, first.views, first.settings.seed)
    separate = {
        name: (built.train_step, arguments) for name, (built, arguments) in abstract_steps.items()
    }
    states = {name: arguments[0] for name, (_, arguments) in separate.items()}
    _, frozen, batch = next(iter(separate.values()))[1]
    return {**separate, "together": (together, (states, frozen, batch))}


def cached(args):
    """Returns name -> (step, arguments) of MoCo-v2 and of students with cached teacher outputs."""
    one_view = {**CACHED, "objectives.distill.views": (0,)}
    configs = {
        "MoCo-v2": load("moco_v2:student=resnet18", args, {"student.hidden": 2048}),
        "DisCo, cached": load(f"disco:{NETWORKS}", args, CACHED),
        "DisCo, cached, one view": load(f"disco:{NETWORKS}", args, one_view),
        "SEED, cached": load(f"seed:{NETWORKS}", args, {**CACHED, "student.hidden": 2048}),
        "DisCo, live teacher": load(f"disco:{NETWORKS}", args, {}),
    }
    abstract_steps = {
        name: program.abstract(assemble(config, steps_per_epoch=1), 1)
        for name, config in configs.items()
    }
    return {
        name: (built.train_step, arguments) for name, (built, arguments) in abstract_steps.items()
    }


def load(recipe, args, changes):
    config = flags.load(recipe)
    config.update_from_flattened_dict(
        {"augment.size": args.size, "batch_size": args.batch, "dtype": "float32", **changes}
    )
    if args.tpu:
        config.dtype = "auto"
        resolve_auto(config, "tpu")
    if config.teacher.head == "auto":
        config.teacher.head = "mlp"
    return config


def measure(steps, rounds):
    """Returns name -> seconds of every round, without the first one, which compiles."""
    seconds, prepared, devices = {name: [] for name in steps}, {}, jax.devices()[:1]
    for name, (train_step, arguments) in steps.items():
        begin, *inputs = filled(arguments)
        prepared[name] = (
            step.parallel(train_step, devices),
            state.replicate(begin, devices),
            inputs,
        )
    for round_index in range(rounds + 1):
        for name, (run, current, inputs) in prepared.items():
            begin = time.monotonic()
            current, _ = jax.block_until_ready(run(current, *inputs))
            prepared[name] = run, current, inputs
            if round_index:
                seconds[name].append(time.monotonic() - begin)
    return seconds


def filled(arguments):
    """Creates arrays of the given shapes; small values, so that nothing is denormal or infinite."""

    def fill(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.ones(x.shape, x.dtype)
        return (jax.random.uniform(jax.random.key(x.size), x.shape) * 0.02 + 0.01).astype(x.dtype)

    return jax.tree.map(fill, arguments)


if __name__ == "__main__":
    main()
