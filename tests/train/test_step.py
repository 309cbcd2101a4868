"""The train step: independent of the number of devices, and without unused forward passes."""

import functools
from typing import NamedTuple

import chex
import jax
import numpy as np
import pytest

import helpers
from disco_jax import methods
from disco_jax.errors import UserError
from disco_jax.ops.collectives import AXIS
from disco_jax.ops.memory import Queue
from disco_jax.train import learner
from disco_jax.train.state import (
    axes,
    gather_to_host,
    replicate,
    rotate_oldest_first,
    shard_batch,
    shard_shapes,
)
from disco_jax.train.step import parallel

FORWARDS = {  # recipe -> network -> views, with the papers' numbers of forward passes
    "moco_v2": {"student": (0,), "momentum": (1,)},
    "moco_small": {"student": (0,), "momentum": (1,)},
    "disco": {"student": (0, 1), "momentum": (1,), "teacher": (0, 1)},
    "disco_star": {"student": (0, 1), "momentum": (1,), "teacher": (0, 1)},
    "seed": {"student": (0,), "teacher": (0,)},
    "seed:views=cross": {"student": (0,), "teacher": (1,)},
    "seed:views=small_patch": {"student": tuple(range(7)), "teacher": tuple(range(7))},
    "seed:moco=true": {"student": (0,), "momentum": (1,), "teacher": (0,)},
    "retro": {"student": (0, 1), "momentum": (0, 1), "teacher": (0, 1)},
    "retro:symmetric=false": {"student": (0, 1), "momentum": (1,), "teacher": (0, 1)},
    "rkd": {"student": (0,), "momentum": (1,), "teacher": (0,)},
    "attention": {"student": (0,), "momentum": (1,), "teacher": (0,)},
    "disco_seed": {"student": (0, 1), "momentum": (1,), "teacher": (0, 1)},
    "disco_seed:rkd=true": {"student": (0, 1), "momentum": (1,), "teacher": (0, 1)},
    "squared_distance": {"student": (0,), "teacher": (0,)},
    "binary_contrast": {"student": (0,), "teacher": (0,)},
    "barlow_twins": {"student": (0,), "teacher": (0,)},
    "online_clusters": {"student": (0,), "teacher": (0,)},
    "pseudo_labels": {"student": (0,)},
    "simreg": {"student": (0,), "teacher": (0,)},
    "compress": {"student": (0,), "momentum": (0,), "teacher": (0,)},
    "compress:queues=1": {"student": (0,), "teacher": (0,)},
    "bingo": {"student": (0, 2, 4), "teacher": (1, 3)},
    "ressl": {"student": (0,), "momentum": (1,)},
    "simclr": {"student": (0, 1)},
    "byol": {"student": (0, 1), "momentum": (0, 1)},
    "supervised": {"student": (0,)},
    # With two local views: views 2 and 3.
    "swav": {"student": (0, 1, 2, 3)},
    "swav_disco": {"student": (0, 1, 2, 3), "teacher": (0, 1, 2, 3)},
    "dino": {"student": (0, 1, 2, 3), "momentum": (0, 1)},
    "dino_disco": {"student": (0, 1, 2, 3), "momentum": (0, 1), "teacher": (0, 1)},
    "sslight_moco": {"student": (1, 2, 3), "momentum": (0,)},
    "sslight_moco:views=two": {"student": (1,), "momentum": (0,)},
    "sslight_swav": {"student": (0, 1, 2, 3)},
    "sslight_dino": {"student": (0, 1, 2, 3), "momentum": (0, 1)},
}


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with helpers.tiny_backbone():
        yield
    program.cache_clear()
    two_steps.cache_clear()


def config_of(recipe, **changes):
    """Returns the config of a recipe with the tiny backbone, unless it needs feature maps."""
    make = helpers.smoke_config if recipe == "attention" else helpers.tiny_config
    return make(recipe, **changes)


@pytest.mark.parametrize("recipe", helpers.RECIPES)
def test_next_state_is_equal_on_every_replica(recipe):
    """Uses vmap, which rejects values that differ by replica; pmap would return replica 0's."""
    step, state, frozen, batch = helpers.smoke(config_of(recipe), replicas=4)
    step = jax.vmap(step, in_axes=(None, None, 0), out_axes=None, axis_name=AXIS)
    new_state, _ = jax.eval_shape(step, state, frozen, batch)
    assert bool(state.momentum) == ("momentum" in FORWARDS[recipe])
    assert bool(frozen) == ("teacher" in FORWARDS[recipe])
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, jax.eval_shape(lambda: state))


@pytest.mark.parametrize("recipe", ["disco_seed:rkd=true", "bingo"])
def test_of_what_devices_share_the_queues_alone_differ_by_replica(recipe):
    config = config_of(recipe, **{"fast.shard_queue": True})
    step, state, frozen, batch = helpers.smoke(config, replicas=4)
    state = shard_shapes(jax.eval_shape(lambda: state), 4)
    state_axes = axes(state)
    assert set(jax.tree.leaves(state_axes)) == {0}
    in_axes, out_axes = (state_axes, None, 0), (state_axes, None)
    step = jax.vmap(step, in_axes=in_axes, out_axes=out_axes, axis_name=AXIS)
    new_state, _ = jax.eval_shape(step, state, frozen, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@pytest.mark.parametrize("recipe", helpers.RECIPES)
def test_forward_passes_are_those_that_objectives_read(recipe):
    config = helpers.smoke_config(recipe)
    method = helpers.build_method(config, config.views, config.local.count)
    assert method.plan == FORWARDS[recipe]
    assert set(method.networks) == set(FORWARDS[recipe])


SYNC = {f"{network}.norm": "sync" for network in ("student", "momentum", "teacher")}
SGD = {
    "optimizer.name": "sgd",
    "optimizer.frozen_epochs": 0,
    "learning_rate.warmup_epochs": 0,
    "learning_rate.warmup_from": 0.0,
}
# Configs whose statistics do not depend on the number of devices (except the last one): a real
# network with all augmentations, and tiny networks that cover every objective, with one config for
# each way to prepare views. `test_optimizer.py` covers the optimizers.
CASES = {
    "a real network": ("seed", SYNC),
    # Local views encoded separately, two queues, all objectives with a queue, and relations
    # between images. The head is the teacher's.
    "one view after the other": ("retro", {
        **SYNC,
        "batch_size": 16,
        "local.count": 2,
        "objectives.distill.views": (0, 1, 2, 3),
        "objectives.relations.group": 4,
        **{f"objectives.{name}.weight": 0.1 for name in (
            "compress", "consistency", "online_clusters", "binary_contrast", "similarity",
            "relations", "cross_correlation")},
    }),
    # Two images of a bag and their CutMix, pseudo-labels of clusters, classes, SimReg's head, and
    # BatchNorm statistics of groups within a device.
    "bags": ("bingo", {
        "batch_size": 16,
        "objectives.bags.cutmix_group": 4,
        "objectives.supervised.weight": 0.5,
        "student.norm_group": 4,
        "teacher.norm_group": 4,
        "teacher.norm": "local",
        "student.head": "regression",
        "student.prototypes": (16,),
        "objectives.pseudo_labels.weight": 0.5,
        "objectives.distill.weight": 0.5,
        "objectives.distill.views": (0,),
    }),
    # Views of equal size encoded together, with BatchNorm statistics of half the batch, the
    # Sinkhorn algorithm and its queue, and the other images of the batch as negatives.
    "assignments": ("swav_disco", {
        **SGD,
        "student.norm_group": 4,
        "objectives.nt_xent.weight": 0.5,
        "objectives.swapped.queue_size": 64,
        "objectives.swapped.queue_epochs": 0,
    }),
    # The same with DINO's centre, SSLight's local queries and BYOL's predictor.
    "a centre": ("dino_disco", {
        **SGD,
        "student.predictor": 16,
        "objectives.byol.weight": 0.5,
        "objectives.contrast.weight": 1.0,
        "objectives.contrast.pairs": ((1, 0),),
        "objectives.contrast.local_queries": True,
        "objectives.contrast.global_share": 0.4,
    }),
    # DisCo's recipe unchanged: statistics of each device, for some networks of shuffled images.
    "of a device": ("disco", {
        "objectives.similarity.weight": 0.5,
        "objectives.distill.weight": 3.0,
    }),
}  # fmt: skip


def case_of(case, **changes):
    recipe, settings = CASES[case]
    make = helpers.smoke_config if case == "a real network" else helpers.tiny_config
    return make(recipe, **{**settings, **changes})


@functools.cache
def program(case, replicas, **changes):
    """Builds (mapped step, state, frozen, batch), shared by tests."""
    step, state, frozen, batch = helpers.smoke(case_of(case, **changes), replicas)
    return parallel(step, jax.devices()[:replicas]), state, frozen, batch


class TwoSteps(NamedTuple):
    """The states before, between and after two steps, as stored, and the last metrics."""

    states: tuple
    metrics: dict


def run_two_steps(case, replicas, **changes):
    """Takes two steps on the first `replicas` devices."""
    step, state, frozen, batch = program(case, replicas, **changes)
    devices = jax.devices()[:replicas]
    states = [jax.device_get(state)]
    state, frozen = replicate(state, devices), replicate(frozen, devices)
    for _ in range(2):
        state, metrics = step(state, frozen, batch)
        states.append(jax.device_get(gather_to_host(state)))
    return TwoSteps(tuple(states), jax.device_get(metrics))


two_steps = functools.cache(run_two_steps)


def test_dropout_acts_in_the_student_alone(monkeypatch):
    dropped, real = {}, learner.encode

    def encode(network, *args, dropout=False, **rest):
        dropped[id(network)] = dropout
        return real(network, *args, dropout=dropout, **rest)

    monkeypatch.setattr(learner, "encode", encode)
    step, state, frozen, batch = helpers.smoke(config_of("disco"), replicas=1)
    jax.eval_shape(jax.vmap(step, in_axes=(None, None, 0), axis_name=AXIS), state, frozen, batch)
    assert sorted(dropped.values()) == [False, False, True]


def test_local_views_are_encoded_at_their_own_size():
    """Distillation uses the two small crops too; the contrast uses only the large ones."""
    config = case_of("one view after the other")
    method = helpers.build_method(config, config.views, config.local.count)
    plan = {"student": (0, 1, 2, 3), "momentum": (0, 1), "teacher": (0, 1, 2, 3)}
    assert method.plan == plan
    assert (method.views.globals, method.views.locals) == ((0, 1), (2, 3))
    _, _, _, batch = program("one view after the other", 1)
    assert [batch["views"][v].shape[2] for v in range(4)] == [16, 16, 8, 8]


SYNCED = [case for case in CASES if case != "of a device"]


@pytest.mark.parametrize("case", SYNCED)
def test_one_device_and_four_take_the_same_steps(case):
    """Compares state and metrics after two steps; the slowest case compiles a ResNet twice."""
    one, four = (two_steps(case, replicas) for replicas in (1, 4))
    assert_alike(one, four)
    weighted = [name for name, fields in case_of(case).objectives.items() if fields.weight]
    assert all(f"{name}/loss" in one.metrics for name in weighted)


def test_every_objective_is_among_those_that_do_not_depend_on_the_number_of_devices():
    """Attention is exempt, since its loss is a mean over the maps of each image."""
    weighted = {
        name
        for case in SYNCED
        for name, fields in case_of(case).objectives.items()
        if fields.weight
    }
    assert weighted == {*methods.OBJECTIVES} - {"attention"}


def assert_alike(one, other):
    """Asserts that states and metrics are equal up to rounding."""
    one, other = ((steps.states[-1], steps.metrics) for steps in (one, other))
    leaves = zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True)
    for (path, a), b in leaves:
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5, err_msg=jax.tree_util.keystr(path))


def test_local_statistics_do_depend_on_the_devices():
    """Shows that the test above can fail."""
    one, four = (two_steps("of a device", replicas).metrics["loss"] for replicas in (1, 4))
    assert abs(one - four) > 1e-4


# Groups of four values have a standard deviation that rounding may double, so the statistics are
# those of the batch here.
WHOLE_BATCH = {f"{network}.norm_group": 0 for network in ("student", "teacher")}
GROUPED = ("bags", "assignments")
HALF = {case: WHOLE_BATCH if case in GROUPED else {} for case in SYNCED}
# Relative tolerance of gradients. bfloat16 rounds by 2**-9, which a softmax divides by its
# temperature: 0.04 in DINO's targets, 0.07 to 0.2 in the others.
TOLERANCE = {case: 0.1 if case == "a centre" else 0.05 for case in SYNCED}


@pytest.mark.parametrize("case", SYNCED)
def test_bfloat16_has_nearly_the_losses_and_gradients_of_float32(case):
    """A run on accelerators computes networks and reads queues in bfloat16.

    The velocity of plain SGD after its first step is the gradient plus the weight decay.
    """
    full, half = (two_steps(case, 1, **HALF[case], **more) for more in ({}, {"dtype": "bfloat16"}))
    assert case_of(case).optimizer.name == "sgd"
    exact, rounded = (
        np.concatenate(
            [np.ravel(x) for x in jax.tree.leaves(steps.states[1].opt_state) if np.ndim(x)]
        )
        for steps in (full, half)
    )
    assert 0 < np.linalg.norm(rounded - exact) < TOLERANCE[case] * np.linalg.norm(exact)
    for name, value in full.metrics.items():
        if name.endswith("loss"):
            assert half.metrics[name] == pytest.approx(value, rel=0.01), name


def test_a_step_is_repeated_bit_for_bit_and_follows_the_seed():
    chex.assert_trees_all_equal(run_two_steps("of a device", 4), two_steps("of a device", 4))
    step, state, frozen, batch = program("of a device", 4)
    inputs = replicate(state), replicate(frozen), batch
    text = step.lower(*inputs).as_text()
    for seed in (0, 1):  # only the step's draws depend on it, as the inputs are the same
        other = program("of a device", 4, seed=seed)[0]
        assert (other.lower(*inputs).as_text() == text) == (seed == 0)


@pytest.mark.parametrize("case, shared", [("of a device", 0), ("one view after the other", 16)])
def test_donation_takes_the_whole_state(case, shared):
    """Every buffer of the old state is deleted, so the device's memory holds the state once."""
    step, state, frozen, batch = program(case, 4, **({"fast.shard_queue": True} if shared else {}))
    state = replicate(state)
    queue = state.memory["contrast"]["view_1"]
    sizes = [shard.data.size for shard in queue.vectors.addressable_shards]
    assert queue.shared == shared
    assert sizes == [64 * 16 // (4 if shared else 1)] * 4
    step(state, replicate(frozen), batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_objectives_are_switched_and_weighted_from_the_config():
    """Covers DisCo + SEED, DisCo without contrast, and each weight in the total."""
    metrics = two_steps("of a device", 4).metrics
    parts = {name: metrics[f"{name}/loss"] for name in ("contrast", "distill", "similarity")}
    total = parts["contrast"] + 3.0 * parts["distill"] + 0.5 * parts["similarity"]
    assert metrics["loss"] == pytest.approx(total, rel=1e-5)
    config = helpers.smoke_config("disco", **{"objectives.contrast.weight": 0.0})
    only = helpers.build_method(config)
    assert only.plan == {"student": (0, 1), "teacher": (0, 1)}


def test_quick_losses_are_those_of_the_formulas_and_can_be_switched_off():
    """Includes a queue in half precision, whose rows are rounded."""
    settings = [{"fast.losses": False}, {}, {"fast.losses": False, "fast.half_queue": True}]
    runs = [two_steps("of a device", 1, **changes) for changes in settings]
    slow, quick, rounded = (steps.metrics for steps in runs)
    one_pass, half = (steps.states[-1] for steps in runs[1:])
    for name in ("contrast/loss", "similarity/loss", "contrast/accuracy"):
        np.testing.assert_allclose(quick[name], slow[name], rtol=1e-5)
        np.testing.assert_allclose(rounded[name], slow[name], rtol=1e-3)
    assert rounded["contrast/loss"] != slow["contrast/loss"]
    queues = [state.memory["contrast"]["view_1"].vectors for state in (one_pass, half)]
    assert [queue.dtype.name for queue in queues] == ["float32", "bfloat16"]
    np.testing.assert_allclose(queues[1].astype(np.float32), queues[0], atol=2e-3)
    assert half.memory["similarity"]["view_0"].vectors.dtype == np.float32


@pytest.mark.parametrize("case, count", [("one view after the other", 3), ("bags", 1)])
def test_queues_that_devices_share_change_nothing_but_where_they_are(case, count):
    """Compares stored state and metrics, for two contrasts and SEED's term, and for bags."""
    steps = two_steps(case, 4, **{"fast.shard_queue": True})
    assert_alike(two_steps(case, 4), steps)
    queues = [q for q in jax.tree.leaves(steps.states[-1].memory, is_leaf=is_queue) if is_queue(q)]
    queues = [queue for queue in queues if queue.shared]
    assert len(queues) == count
    assert all(q.shared == 16 and q.vectors.shape == (64, 16) for q in queues)
    assert {q.pointer.item() for q in queues} == {32}


def is_queue(tree):
    return isinstance(tree, Queue)


def test_a_queue_filled_by_another_batch_is_dealt_from_its_oldest_row_on():
    rows = np.arange(24.0, dtype=np.float32)[:, None]
    sharded = replicate(Queue(rows, np.int32(6), shared=8))
    stored = jax.device_get(gather_to_host(sharded))
    np.testing.assert_array_equal(stored.vectors, np.roll(rows, -6, axis=0))
    assert stored.pointer == 0
    sharded = replicate(Queue(rows, np.int32(16), shared=8))  # needs no rotation
    np.testing.assert_array_equal(sharded.vectors[1].ravel(), [2, 3, 10, 11, 18, 19])
    stored = jax.device_get(gather_to_host(sharded))
    np.testing.assert_array_equal(stored.vectors, rows)
    assert stored.pointer == 16


def test_only_queues_that_a_batch_would_miss_are_refilled():
    """A run that resumes with the same batch size must not change by a bit."""
    rows = np.arange(12.0, dtype=np.float32)[:, None]
    queues = {at: Queue(rows, np.int32(at)) for at in (3, 8)}
    rotated = rotate_oldest_first({"step": np.int32(3), "memory": queues}, 4)["memory"]
    np.testing.assert_array_equal(rotated[3].vectors, np.roll(rows, -3, axis=0))
    assert rotated[3].pointer == 0
    chex.assert_trees_all_equal(rotated[8], queues[8])
    unchanged = rotate_oldest_first(queues, 5)  # such pushes may start at any row
    chex.assert_trees_all_equal(unchanged, queues)


def test_what_is_logged():
    metrics = two_steps("of a device", 4).metrics
    assert {
        "loss", "contrast/loss", "distill/loss", "contrast/accuracy", "contrast/query_std",
        "distill/cosine", "learning_rate", "ema_rate", "gradient_norm",
    } <= set(metrics)  # fmt: skip
    assert all(np.isfinite(value).all() for value in metrics.values())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"objectives.contrast.queue_size": 1001}, "nearest that are: 1000, 1008"),
        ({"objectives.contrast.temperature": 0.0}, r"contrast\.temperature must be above 0"),
        ({"objectives.contrast.queue_init": "teachr"}, "Did you mean 'teacher'"),
        ({"objectives.distill.reduction": "avg"}, r"distill\.reduction='avg'"),
        ({"views": 1}, r"contrast reads view 1 of the momentum.*config\.views"),
        ({"objectives.contrast.keys_from": "techer"}, "Did you mean 'teacher'"),
        ({"student.norm": "synch"}, r"config\.student\.norm='synch'.*Did you mean 'sync'"),
        ({"student.dim": 8}, r"config\.student\.dim=8 must equal config\.teacher\.dim=16"),
        ({"objectives.distill.weight": 0.0, "objectives.contrast.weight": 0.0}, "weight 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_compiled(changes, message):
    with pytest.raises(UserError, match=message):
        config = helpers.smoke_config("disco", **changes)
        helpers.build_method(config, config.views)


def test_a_batch_that_was_read_ahead_is_not_moved_again():
    rows = np.arange(4 * 6, dtype=np.float32).reshape(4, 6)

    def total(state, frozen, batch):
        return state + jax.lax.psum(batch.sum(), AXIS), frozen

    step, start = parallel(total), np.float32(1)
    state, _ = step(replicate(start), replicate(start), rows)
    assert state == 1 + rows.sum()
    ahead, state, frozen = shard_batch({"x": rows})["x"], replicate(start), replicate(start)
    with jax.transfer_guard("disallow"):
        state, _ = step(state, frozen, ahead)
        with pytest.raises(Exception, match="Disallowed host-to-device"):
            step(state, frozen, rows)
