"""The step: the same on any number of devices, and nothing computed that nobody reads."""

import chex
import jax
import numpy as np
import pytest

import helpers
from disco_jax import methods, models
from disco_jax.errors import UserError
from disco_jax.ops.collectives import AXIS
from disco_jax.ops.memory import Queue
from disco_jax.train import learner
from disco_jax.train.state import apart, axes, dealt_shapes, everywhere, refilled_by, whole
from disco_jax.train.step import parallel

FORWARDS = {  # network -> views, by recipe; the papers' counts of forward passes
    "moco_v2": {"student": (0,), "momentum": (1,)},
    "disco": {"student": (0, 1), "momentum": (1,), "teacher": (0, 1)},
    "disco_star": {"student": (0, 1), "momentum": (1,), "teacher": (0, 1)},
    "seed": {"student": (0,), "teacher": (0,)},
    "seed:views=cross": {"student": (0,), "teacher": (1,)},
    "seed:views=small_patch": {"student": tuple(range(7)), "teacher": tuple(range(7))},
    "retro": {"student": (0, 1), "momentum": (0, 1), "teacher": (0, 1)},
    "retro:symmetric=false": {"student": (0, 1), "momentum": (1,), "teacher": (0, 1)},
    "rkd": {"student": (0,), "momentum": (1,), "teacher": (0,)},
    "attention": {"student": (0,), "momentum": (1,), "teacher": (0,)},
    "disco_seed:rkd=true": {"student": (0, 1), "momentum": (1,), "teacher": (0, 1)},
    "squared_distance": {"student": (0,), "teacher": (0,)},
    "binary_contrast": {"student": (0,), "teacher": (0,)},
    "online_clusters": {"student": (0,), "teacher": (0,)},
    "pseudo_labels": {"student": (0,)},
    "simreg": {"student": (0,), "teacher": (0,)},
    "compress": {"student": (0,), "momentum": (0,), "teacher": (0,)},
    "compress:queues=1": {"student": (0,), "teacher": (0,)},
    "bingo": {"student": (0, 2, 4), "teacher": (1, 3)},
    "ressl": {"student": (0,), "momentum": (1,)},
    # With two local views: views 2 and 3.
    "swav": {"student": (0, 1, 2, 3)},
    "swav_disco": {"student": (0, 1, 2, 3), "teacher": (0, 1, 2, 3)},
    "dino": {"student": (0, 1, 2, 3), "momentum": (0, 1)},
    "dino_disco": {"student": (0, 1, 2, 3), "momentum": (0, 1), "teacher": (0, 1)},
    "sslight_moco": {"student": (1, 2, 3), "momentum": (0,)},
    "sslight_swav": {"student": (0, 1, 2, 3)},
    "sslight_dino": {"student": (0, 1, 2, 3), "momentum": (0, 1)},
}


@pytest.mark.parametrize("recipe", helpers.RECIPES)
def test_next_state_is_equal_on_every_replica(recipe):
    """vmap rejects out_axes=None for a value that differs by replica; pmap keeps replica 0's."""
    step, state, frozen, batch = helpers.smoke(helpers.smoke_config(recipe), replicas=4)
    step = jax.vmap(step, in_axes=(None, None, 0), out_axes=None, axis_name=AXIS)
    new_state, _ = jax.eval_shape(step, state, frozen, batch)  # nothing is computed
    assert bool(state.momentum) == ("momentum" in FORWARDS[recipe])
    assert bool(frozen) == ("teacher" in FORWARDS[recipe])
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, jax.eval_shape(lambda: state))


@pytest.mark.parametrize("recipe", ["disco_seed:rkd=true", "bingo"])
def test_of_what_devices_share_the_queues_alone_differ_by_replica(recipe):
    config = helpers.smoke_config(recipe, **{"fast.shard_queue": True})
    step, state, frozen, batch = helpers.smoke(config, replicas=4)
    state = dealt_shapes(jax.eval_shape(lambda: state), 4)
    where = axes(state)
    assert set(jax.tree.leaves(where)) == {0}
    step = jax.vmap(step, in_axes=(where, None, 0), out_axes=(where, None), axis_name=AXIS)
    new_state, _ = jax.eval_shape(step, state, frozen, batch)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@pytest.mark.parametrize("recipe", helpers.RECIPES)
def test_forward_passes_are_those_that_objectives_read(recipe):
    config = helpers.smoke_config(recipe)
    method = methods.build(config, config.views, config.local.count)
    assert method.plan == FORWARDS[recipe]
    assert set(method.networks) == set(FORWARDS[recipe])


def two_steps(config, replicas):
    """The state, as it is stored, and metrics after two steps on `replicas` of the devices."""
    step, state, frozen, batch = helpers.smoke(config, replicas)
    devices = jax.devices()[:replicas]
    step = parallel(step, devices)
    state, frozen = everywhere(state, devices), everywhere(frozen, devices)
    for _ in range(2):
        state, metrics = step(state, frozen, batch)
    return jax.device_get((whole(state), metrics))


def test_dropout_acts_in_the_student_alone(monkeypatch):
    dropped, real = {}, learner.encode

    def encode(network, *args, dropout=False, **rest):
        dropped[id(network)] = dropout
        return real(network, *args, dropout=dropout, **rest)

    monkeypatch.setattr(learner, "encode", encode)
    config = helpers.smoke_config("disco")
    step, state, frozen, batch = helpers.smoke(config, replicas=1)
    jax.eval_shape(jax.vmap(step, in_axes=(None, None, 0), axis_name=AXIS), state, frozen, batch)
    assert sorted(dropped.values()) == [False, False, True]


def test_local_views_are_encoded_at_their_own_size_on_any_number_of_devices():
    """The teacher is followed on two small crops too; the contrast stays with the large ones."""
    changes = {"local.count": 2, "local.size": 8, "student.norm": "sync", "teacher.norm": "sync"}
    config = helpers.smoke_config("disco", **changes)
    config.momentum.norm = "sync"
    config.objectives.distill.views = (0, 1, 2, 3)
    method = methods.build(config, config.views, config.local.count)
    assert method.plan == {"student": (0, 1, 2, 3), "momentum": (1,), "teacher": (0, 1, 2, 3)}
    assert (method.views.globals, method.views.locals) == ((0, 1), (2, 3))
    _, _, _, batch = helpers.smoke(config, 1)
    assert [batch["views"][v].shape[2] for v in range(4)] == [16, 16, 8, 8]
    (alone, first), (four, second) = two_steps(config, 1), two_steps(config, 4)
    assert helpers.relative_error(second["loss"], first["loss"]) < 1e-5
    assert np.isfinite(first["loss"])
    for a, b in zip(*(jax.tree.leaves(s.student) for s in (alone, four)), strict=True):
        assert helpers.relative_error(b, a) < 1e-4


SYNC = {f"{network}.norm": "sync" for network in ("student", "momentum", "teacher")}
DEVICE_FREE = {  # statistics that do not depend on the number of devices
    "moco_v2": {"student.norm": "sync"},
    "disco": {"student.norm_group": 2, "teacher.norm_group": 2, "batch_size": 16},
    "seed": {"student.norm": "sync"},
    # Sinkhorn, queue, centre and synchronised statistics; a teacher on stored ones.
    "swav_disco": {},
    "dino_disco": {},
    "sslight_moco": {},
}
# With a small network: two banks, in one step all other objectives that compare with what they
# remember, or images with one another; and the recipes with views of their own.
OBJECTIVES = {
    "retro": {
        "batch_size": 16,
        "objectives.relations.group": 4,
        **{f"objectives.{name}.weight": 0.1 for name in (
            "compress", "consistency", "online_clusters", "binary_contrast", "similarity",
            "relations")},
    },
    "simreg": {},
    "bingo": {},
    "pseudo_labels": {},
    "sslight_swav": {},
    "sslight_dino": {},
}  # fmt: skip


@pytest.mark.parametrize("recipe", DEVICE_FREE)
def test_one_device_and_four_take_the_same_steps(recipe):
    changes = dict(DEVICE_FREE[recipe])
    if recipe == "moco_v2":
        changes["momentum.norm"] = "sync"
    assert_device_free(helpers.smoke_config(recipe, **changes))


@pytest.mark.parametrize("recipe", OBJECTIVES)
def test_objectives_do_not_depend_on_the_number_of_devices(recipe, monkeypatch):
    monkeypatch.setitem(models.BACKBONES, "tiny", (helpers.TinyBackbone, {}))
    tiny = {"student.backbone": "tiny", "teacher.backbone": "tiny"}
    config = helpers.smoke_config(recipe, **SYNC, **tiny, **OBJECTIVES[recipe])
    (_, metrics), _ = assert_device_free(config)
    weighted = [name for name, fields in config.objectives.items() if fields.weight]
    assert all(f"{name}/loss" in metrics for name in weighted)


def assert_device_free(config):
    """Two steps end alike on one device and on four: state, losses and what is logged."""
    one, four = (two_steps(config, replicas) for replicas in (1, 4))
    assert_alike(config, one, four)
    return one, four


def assert_alike(config, one, other):
    """States and metrics are equal up to rounding."""
    leaves = zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True)
    for (path, a), b in leaves:
        # The gradient of a bias before BatchNorm is 0 but for rounding, and these scale every
        # gradient to a size of their own: there they scale nothing but the rounding.
        if config.optimizer.name in ("larc", "lars", "adamw") and is_idle_bias(path):
            continue
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5, err_msg=jax.tree_util.keystr(path))


def is_idle_bias(path):
    """Whether a leaf belongs to a bias before a BatchNorm of SwAV's or DINO's head."""
    name = jax.tree_util.keystr(path)
    return name.endswith(("['head']['hidden']['bias']", "['head']['hidden2']['bias']"))


def test_local_statistics_do_depend_on_the_devices():
    """Or the test above could not fail."""
    config = helpers.smoke_config("moco_v2", **{"momentum.norm": "local"})
    one, four = (two_steps(config, replicas)[1]["loss"] for replicas in (1, 4))
    assert abs(one - four) > 1e-4


def test_a_step_is_repeated_bit_for_bit_and_follows_the_seed():
    config = helpers.smoke_config("disco")
    first, again = two_steps(config, 4), two_steps(config, 4)
    chex.assert_trees_all_equal(first, again)
    config.seed = 1
    assert two_steps(config, 4)[1]["loss"] != first[1]["loss"]


@pytest.mark.parametrize("shared", [False, True])
def test_donation_takes_the_whole_state(shared, monkeypatch):
    """Every buffer of the old state is given up: nothing is held twice in the device's memory."""
    monkeypatch.setitem(models.BACKBONES, "tiny", (helpers.TinyBackbone, {}))
    tiny = {"student.backbone": "tiny", "teacher.backbone": "tiny"}
    config = helpers.smoke_config("disco", **tiny, **{"fast.shard_queue": shared})
    step, state, frozen, batch = helpers.smoke(config, replicas=4)
    state = everywhere(state)
    queue = state.memory["contrast"]["view_1"].vectors
    held = [shard.data.size for shard in queue.addressable_shards]
    assert held == [64 * 16 // (4 if shared else 1)] * 4
    parallel(step)(state, everywhere(frozen), batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_objectives_are_switched_and_weighted_from_the_config():
    """DisCo + SEED, DisCo without contrast, and each weight in the total."""
    changes = {"objectives.similarity.weight": 0.5, "objectives.distill.weight": 3.0}
    config = helpers.smoke_config("disco", **changes)
    _, metrics = two_steps(config, 4)
    parts = {name: metrics[f"{name}/loss"] for name in ("contrast", "distill", "similarity")}
    total = parts["contrast"] + 3.0 * parts["distill"] + 0.5 * parts["similarity"]
    assert metrics["loss"] == pytest.approx(total, rel=1e-5)
    only = methods.build(helpers.smoke_config("disco", **{"objectives.contrast.weight": 0.0}))
    assert only.plan == {"student": (0, 1), "teacher": (0, 1)}


def test_quick_losses_are_those_of_the_formulas_and_can_be_switched_off(monkeypatch):
    """With a half queue too, whose rows are rounded."""
    monkeypatch.setitem(models.BACKBONES, "tiny", (helpers.TinyBackbone, {}))
    tiny = {"student.backbone": "tiny", "teacher.backbone": "tiny"}
    plain = {**tiny, "fast.losses": False, "objectives.similarity.weight": 1.0}
    ways = [plain, {**plain, "fast.losses": True}, {**plain, "fast.half_queue": True}]
    made = [two_steps(helpers.smoke_config("disco", **changes), 1) for changes in ways]
    (_, slow), (one_pass, quick), (half, rounded) = made
    for name in ("contrast/loss", "similarity/loss", "contrast/accuracy"):
        np.testing.assert_allclose(quick[name], slow[name], rtol=1e-5)
        np.testing.assert_allclose(rounded[name], slow[name], rtol=1e-3)
    assert rounded["contrast/loss"] != slow["contrast/loss"]
    queues = [state.memory["contrast"]["view_1"].vectors for state in (one_pass, half)]
    assert [queue.dtype.name for queue in queues] == ["float32", "bfloat16"]
    np.testing.assert_allclose(queues[1].astype(np.float32), queues[0], atol=2e-3)
    assert half.memory["similarity"]["view_0"].vectors.dtype == np.float32


@pytest.mark.parametrize("recipe", ["retro", "bingo"])
def test_queues_that_devices_share_change_nothing_but_where_they_are(recipe, monkeypatch):
    """Two contrasts and SEED's term, and bags: the state as it is stored, and what is logged."""
    monkeypatch.setitem(models.BACKBONES, "tiny", (helpers.TinyBackbone, {}))
    changes = {
        "student.backbone": "tiny",
        "teacher.backbone": "tiny",
        "batch_size": 16,
        "objectives.similarity.weight": float(recipe == "retro"),
        **SYNC,
    }
    plain = helpers.smoke_config(recipe, **changes)
    config = helpers.smoke_config(recipe, **changes, **{"fast.shard_queue": True})
    expected, found = two_steps(plain, 4), two_steps(config, 4)
    assert_alike(config, expected, found)
    queues = [q for q in jax.tree.leaves(found[0].memory, is_leaf=is_queue) if is_queue(q)]
    assert len(queues) == (3 if recipe == "retro" else 1)
    assert all(q.shared == 16 and q.vectors.shape == (64, 16) for q in queues)
    assert {q.pointer.item() for q in queues} == {32}


def is_queue(tree):
    return isinstance(tree, Queue)


def test_a_queue_filled_by_another_batch_is_dealt_from_its_oldest_row_on():
    rows = np.arange(24.0, dtype=np.float32)[:, None]
    kept = everywhere(Queue(rows, np.int32(6), shared=8))
    found = jax.device_get(whole(kept))
    np.testing.assert_array_equal(found.vectors, np.roll(rows, -6, axis=0))
    assert found.pointer == 0
    kept = everywhere(Queue(rows, np.int32(16), shared=8))  # nothing to do
    np.testing.assert_array_equal(kept.vectors[1].ravel(), [2, 3, 10, 11, 18, 19])
    found = jax.device_get(whole(kept))
    np.testing.assert_array_equal(found.vectors, rows)
    assert found.pointer == 16


def test_only_queues_that_a_batch_would_miss_are_refilled():
    """Of what resumes with its own batch size no bit may change."""
    rows = np.arange(12.0, dtype=np.float32)[:, None]
    filled = {at: Queue(rows, np.int32(at)) for at in (3, 8)}
    ours = refilled_by({"step": np.int32(3), "memory": filled}, 4)["memory"]
    np.testing.assert_array_equal(ours[3].vectors, np.roll(rows, -3, axis=0))
    assert ours[3].pointer == 0
    chex.assert_trees_all_equal(ours[8], filled[8])
    chex.assert_trees_all_equal(refilled_by(filled, 5), filled)  # it goes on from any row


def test_what_is_logged():
    _, metrics = two_steps(helpers.smoke_config("disco"), 4)
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
        methods.build(config, config.views)


def test_a_batch_that_was_read_ahead_is_not_moved_again():
    rows = np.arange(4 * 6, dtype=np.float32).reshape(4, 6)

    def total(state, frozen, batch):
        return state + jax.lax.psum(batch.sum(), AXIS), frozen

    step, start = parallel(total), np.float32(1)
    state, _ = step(everywhere(start), everywhere(start), rows)
    assert state == 1 + rows.sum()
    ahead, state, frozen = apart({"x": rows})["x"], everywhere(start), everywhere(start)
    with jax.transfer_guard("disallow"):
        state, _ = step(state, frozen, ahead)
        with pytest.raises(Exception, match="Disallowed host-to-device"):
            step(state, frozen, rows)
