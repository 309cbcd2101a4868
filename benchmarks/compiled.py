"""The TPU compiler's cycle estimates for parts of a step, in thousands per image. Needs no TPU.

    pip install 'disco-jax[plan]'
    python benchmarks/compiled.py [--config disco:student=resnet18,teacher=resnet50]
        [--change teacher.norm=running ...] [--naive] [PART ...]

Each part is compiled separately for one chip: "augmentation" of all views, the forward passes
"teacher" and "momentum", "student" with its gradient, and every objective with its gradient. With
--naive the parts are those of the baseline, see naive.py. "exchange" is the communication of
shuffled BatchNorm, on all chips of the slice. Objectives whose queue is sharded over the chips
(--change fast.shard_queue=True) are compiled for all chips, too. The compiler's estimate excludes
the time on the links.
"""

import argparse
import ast
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import naive
import numpy as np

from disco_jax import flags
from disco_jax.methods.base import Record
from disco_jax.models.encoder import encode
from disco_jax.models.layers import folding
from disco_jax.ops.collectives import AXIS, shuffle
from disco_jax.ops.memory import Queue
from disco_jax.plan import hlo, topology
from disco_jax.train.experiment import assemble, resolve_auto
from disco_jax.train.state import axes


class Part(NamedTuple):
    """Function to compile.

    Attributes:
      function: function of one replica.
      arguments: shapes.
      donated: indices of the arguments whose memory the result reuses.
      everywhere: whether to compile for all chips, because the function communicates with them.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...] = ()
    everywhere: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="parts to compile; default: all")
    parser.add_argument("--config", default="disco:student=resnet18,teacher=resnet50")
    parser.add_argument(
        "--change", action="append", default=[], help="FIELD=VALUE; VALUE is a Python literal"
    )
    parser.add_argument("--naive", action="store_true", help="parts of the baseline")
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--batch", type=int, default=32, help="images per chip")
    parser.add_argument(
        "--top", type=int, default=0, help="number of most expensive instructions to show"
    )
    args = parser.parse_args()
    config = changed(flags.load(args.config), args.change)
    if args.naive:
        naive.turn_off(config)
    devices = topology.open_slice(args.topology).devices
    config.batch_size = args.batch * len(devices)
    parts = components(config, args.batch)
    if args.naive:
        naive.replace(parts, config)
    total = 0.0
    for name in args.parts or [name for name in parts if name != "exchange"]:
        begin = time.monotonic()
        on_all_chips = parts[name].everywhere
        compiled = compile_part(parts[name], devices if on_all_chips else devices[:1])
        text, memory = compiled.as_text(), compiled.memory_analysis()
        cost = hlo.cycles(text) / 1e3 / args.batch
        total += cost
        arguments = memory.argument_size_in_bytes / 2**20
        seconds = time.monotonic() - begin
        print(
            f"{name:14} {cost:8.1f} thousand cycles per image  {arguments:7.1f} MiB of arguments  "
            f"({seconds:.0f} s)",
            flush=True,
        )
        for kind, moved in hlo.collective_bytes(text).items():
            if on_all_chips:
                print(f"{'':14} {kind}: {moved.count}, {moved.bytes / 2**20:.1f} MiB on a chip")
        for cycles, line in hlo.most_expensive(text, args.top):
            print(f"{'':6}{cycles / 1e3 / args.batch:8.1f}  {line[:110]}")
    print(f"{'sum':14} {total:8.1f}")


def changed(config: Any, changes: list[str]) -> Any:
    """Returns a recipe's config as on TPUs, with a teacher's head and the given changes."""
    resolve_auto(config, "tpu")
    if config.teacher.head == "auto":
        config.teacher.head = "mlp"
    for change in changes:
        field, _, value = change.partition("=")
        group, _, name = field.rpartition(".")
        fields = config
        for part in filter(None, group.split(".")):
            fields = fields[part]
        is_string = isinstance(fields[name], str)
        fields[name] = value if is_string else ast.literal_eval(value)
    return config


def compile_part(part: Part, devices: Any) -> Any:
    """Compiles a part for `devices`; arguments that are not sharded are replicated."""
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS,))
    # The shapes of the results determine which of them are sharded.
    results = jax.eval_shape(on(mesh, part.function, part.arguments), *part.arguments)
    function = on(mesh, part.function, part.arguments, results)
    arguments = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec)
        ),
        part.arguments,
        specs(part.arguments),
    )
    return jax.jit(function, donate_argnums=part.donated).lower(*arguments).compile()


def on(
    mesh: Any, function: Callable[..., Any], arguments: tuple[Any, ...], results: Any = None
) -> Callable[..., Any]:
    """Maps a function of one replica over a mesh.

    Args:
      mesh: of devices, or abstract.
      function: function of one replica.
      arguments: its arguments, which determine which of them are sharded.
      results: its results, likewise; None replicates all of them.
    """
    out_specs = jax.sharding.PartitionSpec() if results is None else specs(results)
    return jax.shard_map(
        function, mesh=mesh, in_specs=specs(arguments), out_specs=out_specs, check_vma=False
    )


def specs(tree: Any) -> Any:
    """Returns the partition of each leaf on a mesh: by rows if sharded, otherwise replicated."""
    replicated, rows = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(AXIS)
    return jax.tree.map(lambda _, axis: replicated if axis is None else rows, tree, axes(tree))


def components(config: Any, batch: int) -> dict[str, Part]:
    """Returns name -> part of a config's step."""
    single_device = jax.sharding.AbstractMesh((1,), (AXIS,))
    experiment = assemble(config)
    recipe, method = experiment.views, experiment.method
    crops = {
        v: jax.ShapeDtypeStruct((batch, side, side, 3), jnp.uint8)
        for v, side in enumerate(recipe.sizes)
    }
    images = {v: jax.eval_shape(recipe.plain, crop) for v, crop in crops.items()}

    def augmentation(crops, step):
        key = jax.random.fold_in(jax.random.key(0), step)
        return recipe.photometric(crops, key, jnp.arange(batch, dtype=jnp.int32))

    parts = {"augmentation": Part(augmentation, (crops, jax.ShapeDtypeStruct((), jnp.int32)))}
    encoded = {}
    for name, passes in method.plan.items():
        network = method.networks[name]
        variables = jax.eval_shape(lambda n=network: n.encoder.create(0, recipe.sizes[0]))
        if name == "teacher":
            variables = jax.eval_shape(
                lambda v, n=network: folding.fold_batch_norm(n, v, recipe.sizes[0]), variables
            )

        def forward(variables, images, network=network, passes=passes):
            return encode(network, variables, images, passes, jax.random.key(0))

        inputs = {view: images[view] for view in passes}
        parts[name] = Part(forward, (variables, inputs))
        mapped = on(single_device, forward, (variables, inputs))
        encoded[name] = jax.eval_shape(mapped, variables, inputs)[0]
    parts["student"] = Part(_with_gradient(parts["student"][0]), parts["student"][1])
    record = Record(encoded, {})
    memory = jax.eval_shape(lambda: method.memory(jax.random.key(0), record))
    targets = {name: shapes for name, shapes in encoded.items() if name != "student"}
    for name, objective in method.objectives.items():
        arguments = encoded["student"], targets, memory[name]
        queues = jax.tree.leaves(memory[name], is_leaf=lambda leaf: isinstance(leaf, Queue))
        sharded = any(queue.shared for queue in queues if isinstance(queue, Queue))
        parts[name] = Part(_term(objective), arguments, donated=(2,), everywhere=sharded)
    if "momentum" in method.plan and method.networks["momentum"].norm == "shuffle":
        network, view = method.networks["momentum"], method.plan["momentum"][0]

        def exchange(rows):
            sent = rows.astype(network.shuffle_dtype)
            return shuffle(jax.random.key(0), sent, network.exchange)[0]

        parts["exchange"] = Part(exchange, (images[view],), everywhere=True)
    return parts


def _term(objective):
    def term(student, targets, memory):
        def loss(student):
            term = objective(Record({**targets, "student": student}, {}), memory, 0)
            return term.loss, (term.memory, term.metrics)

        return jax.value_and_grad(loss, has_aux=True)(student)

    return term


def _with_gradient(forward):
    def student(variables, images):
        def loss(params):
            encoded, stats = forward({**variables, "params": params}, images)
            return sum(jnp.sum(jnp.square(e.embedding)) for e in encoded.values()), stats

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    return student


if __name__ == "__main__":
    main()
