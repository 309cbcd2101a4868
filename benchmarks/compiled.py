"""What the TPU's compiler says of the parts of a step: thousand cycles an image. No TPU needed.

    pip install 'disco-jax[plan]'
    python benchmarks/compiled.py [--config disco:student=resnet18,teacher=resnet50]
        [--change teacher.norm=running ...] [--naive] [PART ...]

Each part is compiled by itself for one chip: "augmentation" of all views, the forward passes
"teacher" and "momentum", "student" with its gradient, and every objective with its gradient. With
--naive they are the yardstick's, see naive.py. "exchange" is what shuffled BatchNorm moves, on
all chips of the slice, and so are objectives whose queue the chips share
(--change fast.shard_queue=True): the compiler does not count the time on the links.
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
from disco_jax.models import fold
from disco_jax.models.encoder import encode
from disco_jax.ops.collectives import AXIS, shuffle
from disco_jax.plan import hlo, program, topology
from disco_jax.train.experiment import assemble
from disco_jax.train.state import axes


class Part(NamedTuple):
    """What is compiled.

    Attributes:
      function: of one replica.
      arguments: shapes.
      donated: which of them the result takes the place of.
      everywhere: whether it is compiled for all chips, of which it needs the others.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...] = ()
    everywhere: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="which of them; default: all")
    parser.add_argument("--config", default="disco:student=resnet18,teacher=resnet50")
    parser.add_argument("--change", action="append", default=[], help="FIELD=VALUE, as in Python")
    parser.add_argument("--naive", action="store_true", help="the yardstick's parts")
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--batch", type=int, default=32, help="images of one chip")
    parser.add_argument("--top", type=int, default=0, help="show the dearest instructions")
    given = parser.parse_args()
    config = changed(flags.load(given.config), given.change)
    if given.naive:
        naive.turn_off(config)
    devices = topology.open_slice(given.topology).devices
    config.batch_size = given.batch * len(devices)
    parts = components(config, given.batch)
    if given.naive:
        naive.replace(parts, config)
    total = 0.0
    for name in given.parts or [name for name in parts if name != "exchange"]:
        begin = time.monotonic()
        every = parts[name].everywhere
        compiled = compile_part(parts[name], devices if every else devices[:1])
        text, memory = compiled.as_text(), compiled.memory_analysis()
        found = hlo.cycles(text) / 1e3 / given.batch
        total += found
        arguments = memory.argument_size_in_bytes / 2**20
        seconds = time.monotonic() - begin
        print(
            f"{name:14} {found:8.1f} thousand cycles an image  {arguments:7.1f} MiB of arguments  "
            f"({seconds:.0f} s)",
            flush=True,
        )
        for kind, moved in hlo.collective_bytes(text).items():
            if every:
                print(f"{'':14} {kind}: {moved.count}, {moved.bytes / 2**20:.1f} MiB on a chip")
        for cycles, line in hlo.dearest(text, given.top):
            print(f"{'':6}{cycles / 1e3 / given.batch:8.1f}  {line[:110]}")
    print(f"{'sum':14} {total:8.1f}")


def changed(config: Any, changes: list[str]) -> Any:
    """A recipe's config as TPUs take it, with a teacher's head and what was asked for."""
    program.as_on_tpus(config)
    if config.teacher.head == "auto":
        config.teacher.head = "mlp"
    for change in changes:
        field, _, text = change.partition("=")
        group, _, name = field.rpartition(".")
        fields = config
        for part in filter(None, group.split(".")):
            fields = fields[part]
        is_text = isinstance(fields[name], str)
        fields[name] = text if is_text else ast.literal_eval(text)
    return config


def compile_part(part: Part, devices: Any) -> Any:
    """A part on each of `devices`: what they do not share is the same for all of them."""
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS,))
    # What comes out, to see what of it is shared.
    made = jax.eval_shape(on(mesh, part.function, part.arguments), *part.arguments)
    function = on(mesh, part.function, part.arguments, made)
    arguments = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=jax.sharding.NamedSharding(mesh, spec)
        ),
        part.arguments,
        specs(part.arguments),
    )
    return jax.jit(function, donate_argnums=part.donated).lower(*arguments).compile()


def on(
    mesh: Any, function: Callable[..., Any], arguments: tuple[Any, ...], made: Any = None
) -> Callable[..., Any]:
    """A function of one replica, on all of a mesh.

    Args:
      mesh: of devices, or of none.
      function: what to call.
      arguments: its, to see what of them is shared.
      made: its result, likewise; None: nothing of it is.
    """
    out = jax.sharding.PartitionSpec() if made is None else specs(made)
    return jax.shard_map(
        function, mesh=mesh, in_specs=specs(arguments), out_specs=out, check_vma=False
    )


def specs(tree: Any) -> Any:
    """How each leaf lies on a mesh: by rows if it is shared, else whole on every device."""
    whole, rows = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(AXIS)
    return jax.tree.map(lambda _, axis: whole if axis is None else rows, tree, axes(tree))


def components(config: Any, batch: int) -> dict[str, Part]:
    """Name -> what is compiled of a config's step."""
    alone = jax.sharding.AbstractMesh((1,), (AXIS,))
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

    found = {"augmentation": Part(augmentation, (crops, jax.ShapeDtypeStruct((), jnp.int32)))}
    encoded = {}
    for name, wanted in method.plan.items():
        network = method.networks[name]
        variables = jax.eval_shape(lambda n=network: n.encoder.create(0, recipe.sizes[0]))
        if name == "teacher" and config.fast.teacher:
            variables = jax.eval_shape(
                lambda v, n=network: fold.still(n, v, recipe.sizes[0]), variables
            )

        def forward(variables, images, network=network, wanted=wanted):
            return encode(network, variables, images, wanted, jax.random.key(0))

        seen = {view: images[view] for view in wanted}
        found[name] = Part(forward, (variables, seen))
        encoded[name] = jax.eval_shape(on(alone, forward, (variables, seen)), variables, seen)[0]
    found["student"] = Part(_with_gradient(found["student"][0]), found["student"][1])
    record = Record(encoded, {})
    memory = jax.eval_shape(lambda: method.memory(jax.random.key(0), record))
    targets = {name: shapes for name, shapes in encoded.items() if name != "student"}
    for name, objective in method.objectives.items():
        arguments = encoded["student"], targets, memory[name]
        shared = bool(getattr(objective, "shared", 0))
        found[name] = Part(_term(objective), arguments, donated=(2,), everywhere=shared)
    if "momentum" in method.plan and method.networks["momentum"].norm == "shuffle":
        network, view = method.networks["momentum"], method.plan["momentum"][0]

        def exchange(rows):
            sent = rows.astype(network.carried)
            return shuffle(jax.random.key(0), sent, network.exchange)[0]

        found["exchange"] = Part(exchange, (images[view],), everywhere=True)
    return found


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
