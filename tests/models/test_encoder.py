"""Views of one size pass a network together."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax import models
from disco_jax.models.backbones import vit
from disco_jax.models.encoder import Encoder, Network, encode
from disco_jax.models.heads import Identity
from disco_jax.models.layers.norm import BatchNorm
from disco_jax.ops.collectives import AXIS

SIZES = {0: 12, 1: 12, 2: 8, 3: 8, 4: 8}


def images(batch, seed=0):
    rng = np.random.default_rng(seed)
    return {v: rng.normal(size=(batch, s, s, 3)).astype("f") for v, s in SIZES.items()}


def run(network, variables, views, replicas, dropout=False):
    """Returns {view: `Encoded`} in the order of the global batch, and the statistics."""

    def one(views):
        return encode(network, variables, views, tuple(SIZES), jax.random.key(5), dropout)

    split = {v: x.reshape(replicas, -1, *x.shape[1:]) for v, x in views.items()}
    out, stats = jax.jit(jax.vmap(one, axis_name=AXIS))(split)
    out = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)
    return out, jax.tree.map(lambda x: x[0], stats)


@pytest.fixture(scope="module")
def encoder():
    spec = helpers.encoder_spec("tiny", width=16, head="swav", hidden=8, dim=6, prototypes=(5,))
    with helpers.tiny_backbone():
        return models.build_encoder(spec)


@pytest.mark.wiring  # counts calls
def test_the_backbone_is_called_once_a_size_and_the_head_once(encoder, monkeypatch):
    calls = []

    def count(next_fun, args, kwargs, context):
        if context.method_name == "__call__" and context.module.path in (("backbone",), ("head",)):
            calls.append((context.module.path[0], args[0].shape[:2]))
        return next_fun(*args, **kwargs)

    variables = encoder.create(0, 12)
    with nn.intercept_methods(count):
        run(Network(encoder, "sync", grouped=True), variables, images(4), 1)
        assert sorted(calls) == [("backbone", (8, 12)), ("backbone", (12, 8)), ("head", (20, 16))]
        calls.clear()
        run(Network(encoder, "sync"), variables, images(4), 1)
        assert len(calls) == 10  # backbone and head for each view


@pytest.mark.parametrize("norm", ["running", "sync", "shuffle"])
def test_rows_come_back_to_their_views(encoder, norm):
    """Equal views get equal scores; with stored statistics, those of a call for one view."""
    variables, views = encoder.create(0, 12), images(4)
    views[1], views[4] = views[0], views[2]
    out, _ = run(Network(encoder, norm, grouped=True), variables, views, 2)
    if norm == "shuffle":  # each view is shuffled in another order
        return assert_shuffled(encoder, variables, views, out)
    for a, b in ((0, 1), (2, 4)):
        np.testing.assert_allclose(out[a].scores, out[b].scores, atol=1e-5)
    assert np.abs(out[2].scores - out[3].scores).max() > 1e-3
    if norm == "running":
        for v, x in views.items():
            alone = jax.jit(lambda v, x: encoder.apply(v, x, norm="running"))(variables, x)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), out[v], alone)


def assert_shuffled(encoder, variables, views, out):
    """Asserts that shuffling changes the outputs of two replicas and not those of one."""
    shuffled, _ = run(Network(encoder, "shuffle", grouped=True), variables, views, 1)
    plain, _ = run(Network(encoder, "sync", grouped=True), variables, views, 1)
    for v in views:
        np.testing.assert_allclose(shuffled[v].scores, plain[v].scores, atol=1e-4)
    assert np.abs(out[0].scores - shuffled[0].scores).max() > 1e-4


def test_statistics_are_those_of_a_size_and_of_everyone_in_the_head(encoder):
    """The first BatchNorm gets one size after the other, the head's gets all rows at once."""
    variables, views = encoder.create(0, 12), images(4)
    network = Network(encoder, "sync", grouped=True)
    (out, stats), (four, other) = (run(network, variables, views, n) for n in (1, 4))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), (out, stats), (four, other)
    )

    current = variables  # on a single device, "local" equals "sync"
    for group in ((0, 1), (2, 3, 4)):
        together = jnp.concatenate([views[v] for v in group])
        _, new = jax.jit(lambda v, x: encoder.apply(v, x, norm="local", mutable=["batch_stats"]))(
            current, together
        )
        current = {**variables, "batch_stats": new["batch_stats"]}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        stats["backbone"],
        current["batch_stats"]["backbone"],
    )
    rows = jnp.concatenate([out[v].features for v in SIZES])
    layer = variables["params"]["head"]["hidden"]
    before = rows @ layer["kernel"] + layer["bias"][None]
    np.testing.assert_allclose(
        stats["head"]["hidden_bn"]["mean"], 0.1 * before.mean(axis=0), atol=1e-5
    )


def test_dropout_of_grouped_views_does_not_depend_on_the_devices():
    backbone = vit.ViT(width=12, heads=3, depth=2, patch=4, grid=3, drop_path=0.5)
    encoder = Encoder(backbone, Identity())
    variables = encoder.create(0, 12)
    network = Network(encoder, "sync", grouped=True)
    one, four = (run(network, variables, images(8), n, dropout=True)[0] for n in (1, 4))
    deterministic = run(network, variables, images(8), 1)[0]
    for v in SIZES:
        np.testing.assert_allclose(one[v].features, four[v].features, atol=1e-5)
        assert np.abs(one[v].features - deterministic[v].features).max() > 1e-3


def test_groups_of_images_share_statistics_whatever_the_devices(encoder):
    """Two groups of two images: on one device, on one each, and on two each; also in the head."""
    spec = helpers.encoder_spec("tiny", width=16, head="swav", hidden=8, dim=6, prototypes=(5,))
    with helpers.tiny_backbone():
        grouped = models.build_encoder(spec, models.Compute(sync_groups=2))
    variables, views = encoder.create(0, 12), images(4)
    halves = [
        run(
            Network(encoder, "sync", grouped=True),
            variables,
            {v: x[half] for v, x in views.items()},
            1,
        )[0]
        for half in (slice(0, 2), slice(2, 4))
    ]
    for replicas in (1, 2, 4):
        out, _ = run(Network(grouped, "sync", grouped=True), variables, views, replicas)
        for v in views:
            expected = np.concatenate([half[v].scores for half in halves])
            np.testing.assert_allclose(out[v].scores, expected, atol=1e-5)


def test_patches_in_one_pass_share_statistics_and_update_them_once(encoder):
    """As in SEED's code: one pass of the large views, one of all patches."""
    variables, network = encoder.create(0, 12), Network(encoder, "local", grouped=True)

    def norm_inputs_and_stats(views):
        inputs = []

        def watch(call, args, kwargs, context):
            is_norm = isinstance(context.module, BatchNorm) and context.method_name == "__call__"
            if is_norm and context.module.path[0] == "backbone":
                inputs.append(args[0])
            return call(*args, **kwargs)

        with nn.intercept_methods(watch):
            _, stats = encode(network, variables, views, tuple(SIZES), jax.random.key(0))
        return inputs, stats

    inputs, stats = jax.jit(norm_inputs_and_stats)(images(4))
    assert [len(x) for x in inputs] == [2 * 4, 3 * 4]
    mean, var = np.zeros(16), np.ones(16)
    for x in inputs:
        x = np.asarray(x, np.float64)
        mean = 0.9 * mean + 0.1 * x.mean(0)
        var = 0.9 * var + 0.1 * x.var(0, ddof=1)
    (name,) = stats["backbone"]
    np.testing.assert_allclose(stats["backbone"][name]["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(stats["backbone"][name]["var"], var, atol=1e-5)
