"""What the TPU's compiler says of the parts of a step: thousand cycles an image. No TPU needed.

    pip install 'disco-jax[plan]'
    python benchmarks/compiled.py [--config disco:student=resnet18,teacher=resnet50] [PART ...]

Each part is compiled by itself for one chip: "augmentation" of all views, the forward passes
"teacher" and "momentum", "student" with its gradient, and every objective with its gradient.
"""

import argparse
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from disco_jax import flags, methods
from disco_jax.data import views
from disco_jax.methods.base import Record
from disco_jax.models.encoder import encode
from disco_jax.ops.collectives import AXIS
from disco_jax.plan import hlo, topology


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="which of them; default: all")
    parser.add_argument("--config", default="disco:student=resnet18,teacher=resnet50")
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--batch", type=int, default=32, help="images of one chip")
    given = parser.parse_args()
    config = flags.load(given.config)
    config.dtype = "bfloat16"
    if config.teacher.head == "auto":
        config.teacher.head = "mlp"
    parts = components(config, given.batch)
    device = topology.open_slice(given.topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    total = 0.0
    for name in given.parts or parts:
        function, arguments = parts[name]
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
        )
        begin = time.monotonic()
        compiled = jax.jit(_alone(function)).lower(*arguments).compile()
        found = hlo.cycles(compiled.as_text()) / 1e3 / given.batch
        total += found
        seconds = time.monotonic() - begin
        print(f"{name:14} {found:8.1f} thousand cycles an image  ({seconds:.0f} s)", flush=True)
    print(f"{'sum':14} {total:8.1f}")


def components(config, batch):
    """Name -> (function, abstract arguments), each for one replica."""
    recipe = views.build(config.augment, config.views, config.local)
    method = methods.build(config, config.views, config.local.count)
    crops = {
        v: jax.ShapeDtypeStruct((batch, side, side, 3), jnp.uint8)
        for v, side in enumerate(recipe.sizes)
    }
    images = {v: jax.eval_shape(recipe.plain, crop) for v, crop in crops.items()}

    def augmentation(crops, step):
        key = jax.random.fold_in(jax.random.key(0), step)
        return recipe.photometric(crops, key, jnp.arange(batch, dtype=jnp.int32))

    found = {"augmentation": (augmentation, (crops, jax.ShapeDtypeStruct((), jnp.int32)))}
    encoded = {}
    for name, wanted in method.plan.items():
        network = method.networks[name]
        variables = jax.eval_shape(lambda n=network: n.encoder.create(0, recipe.sizes[0]))

        def forward(variables, images, network=network, wanted=wanted):
            return encode(network, variables, images, wanted, jax.random.key(0))

        found[name] = (forward, (variables, images))
        shapes = jax.eval_shape(_alone(forward), variables, images)[0]
        encoded[name] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)
    found["student"] = (_with_gradient(found["student"][0]), found["student"][1])
    record = Record(encoded, {})
    memory = jax.eval_shape(lambda: method.memory(jax.random.key(0), record))
    targets = {name: shapes for name, shapes in encoded.items() if name != "student"}
    for name, objective in method.objectives.items():
        found[name] = (_term(objective), (encoded["student"], targets, memory[name]))
    return found


def _term(objective):
    def term(student, targets, memory):
        def loss(student):
            term = objective(Record({**targets, "student": student}, {}), memory, 0)
            return term.loss, term.memory

        return jax.value_and_grad(loss, has_aux=True)(student)

    return term


def _with_gradient(forward):
    def student(variables, images):
        def loss(params):
            encoded, stats = forward({**variables, "params": params}, images)
            return sum(jnp.sum(jnp.square(e.embedding)) for e in encoded.values()), stats

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    return student


def _alone(function):
    """As the only replica."""
    return lambda *arguments: jax.vmap(function, in_axes=None, axis_size=1, axis_name=AXIS)(
        *arguments
    )


if __name__ == "__main__":
    main()
