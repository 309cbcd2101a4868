"""Tests distillation objectives against the official losses and queues on 1 to 4 devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax.methods.bags import Bags
from disco_jax.methods.base import Record
from disco_jax.methods.binary import BinaryContrast
from disco_jax.methods.clusters import Centroids, OnlineClusters
from disco_jax.methods.compress import Compress
from disco_jax.methods.consistency import Consistency
from disco_jax.methods.contrast import Contrast
from disco_jax.methods.regression import Distill
from disco_jax.methods.relations import Relations
from disco_jax.methods.similarity import Similarity
from disco_jax.models.encoder import Encoded
from disco_jax.ops import mixing
from disco_jax.ops.collectives import AXIS
from disco_jax.ops.losses import info_nce, squared_distance
from disco_jax.ops.memory import Queue
from disco_jax.ops.relations import bank_cross_entropy
from disco_jax.ops.vectors import l2_normalize

EXACT = 1e-5


def terms(objective, encoded, memory, step=0, aux=None, replicas=1):
    """Evaluates an objective on virtual replicas.

    vmap raises an error if the memory differs between replicas.

    Args:
      objective: an objective.
      encoded: (network, view) -> f32[B, D], embeddings of the global batch.
      memory: of the objective.
      step: number of the step.
      aux: see `Record.aux`.
      replicas: number of virtual replicas.

    Returns:
      The mean loss, the next memory, and the gradients of the mean loss with respect to the
      student's embeddings.
    """
    split = {k: jnp.asarray(x).reshape(replicas, -1, x.shape[-1]) for k, x in encoded.items()}
    run = compiled(objective, replicas)
    loss, memory, grads = run(split, memory, jnp.int32(step), aux or {})
    # A replica's loss is the mean over its rows, and gradients are averaged over replicas.
    grads = {k: x.reshape(-1, x.shape[-1]) / replicas for k, x in grads.items()}
    return loss, memory, grads


@functools.cache
def compiled(objective, replicas):
    """Returns the compiled function of `terms`, the same for all steps of an objective."""

    def on_replica(rows, memory, step, aux):
        def loss(students):
            networks = {}
            for (network, view), x in {**rows, **students}.items():
                networks.setdefault(network, {})[view] = Encoded(x, x)
            term = objective(Record(networks, aux), memory, step)
            return jax.lax.pmean(term.loss, AXIS), term

        students = {key: x for key, x in rows.items() if key[0] == "student"}
        grads, term = jax.grad(loss, has_aux=True)(students)
        return jax.lax.pmean(term.loss, AXIS), term.memory, grads

    axes = dict(in_axes=(0, None, None, None), out_axes=(None, None, 0))
    return jax.jit(jax.vmap(on_replica, axis_name=AXIS, axis_size=replicas, **axes))


def queue(columns):
    return Queue(jnp.asarray(columns.T), jnp.zeros((), jnp.int32))


@pytest.mark.parametrize("replicas", [4])
def test_small_patches_of_seed(replicas):
    meta, ref = helpers.fixture("losses/seed_small_patch_a")
    settings = meta["params"]
    patches = range(1, settings["patches"] + 1)
    objective = Similarity(
        groups=(((0, 0),), tuple((v, v) for v in patches)),
        student_temperature=settings["student_t"],
        teacher_temperature=settings["teacher_temp"],
        queue_size=settings["queue_size"],
    )
    memory = {"view_0": queue(ref["queue_init"]), "view_1": queue(ref["small_queue_init"])}
    for step in range(settings["steps"]):
        encoded = {}
        for network in ("student", "teacher"):
            encoded[network, 0] = ref[f"{network}_raw"][step]
            for v in patches:
                encoded[network, v] = ref[f"small_{network}_raw"][step][:, v - 1]
        loss, memory, grads = terms(objective, encoded, memory, replicas=replicas)
        assert helpers.relative_error(loss, ref["loss"][step]) < EXACT
        small = np.stack([grads["student", v] for v in patches], axis=1)
        assert helpers.relative_error(grads["student", 0], ref["grad_student_raw"][step]) < EXACT
        assert helpers.relative_error(small, ref["grad_small_student_raw"][step]) < EXACT
        for view, name in (("view_0", "queue"), ("view_1", "small_queue")):
            assert helpers.relative_error(memory[view].vectors, ref[name][step].T) < EXACT
            assert memory[view].pointer == ref["ptr"][step]


@pytest.mark.parametrize("name, replicas", [("a", 1), ("a", 4), ("early", 1), ("early", 2)])
def test_bags_of_bingo(name, replicas):
    meta, ref = helpers.fixture(f"losses/bingo_{name}")
    settings = meta["params"]
    objective = Bags(
        temperature=settings["temperature"], queue_size=settings["queue_size"], steps_per_epoch=1
    )
    memory = queue(ref["queue_init"])
    for step in range(settings["steps"]):
        encoded = {
            ("student", 0): ref["student_raw"][step],
            ("student", 2): ref["student_pos_raw"][step],
            ("student", 4): ref["student_mix_raw"][step],
            ("teacher", 1): ref["teacher_raw"][step],
            ("teacher", 3): ref["teacher_pos_raw"][step],
        }
        rows = len(ref["student_raw"][step]) // replicas
        aux = {"mix_ratio": jnp.full(rows, ref["mix_lam"][step][0], jnp.float32)}
        loss, memory, grads = terms(objective, encoded, memory, settings["epoch"], aux, replicas)
        assert helpers.relative_error(loss, ref["loss"][step]) < EXACT
        for view, part in ((0, ""), (2, "pos_"), (4, "mix_")):
            expected = ref[f"grad_student_{part}raw"][step]
            assert helpers.relative_error(grads["student", view], expected) < EXACT
        assert helpers.relative_error(memory.vectors, ref["queue"][step].T) < EXACT
        assert memory.pointer == ref["ptr"][step]


@pytest.mark.parametrize("name", ["a", "b"])
def test_cutmix_of_bingo(name):
    _, ref = helpers.fixture(f"losses/bingo_cutmix_{name}")
    images, others = (ref[key].transpose(0, 2, 3, 1) for key in ("image", "neighbour"))
    ratio = np.broadcast_to(np.float32(ref["lam_raw"]), len(images))
    centre = np.broadcast_to(np.int32(ref["centre"]), (len(images), 2))
    mixed, fraction = mixing.cutmix(images, others, ratio, centre)
    np.testing.assert_array_equal(mixed, ref["mixed"].transpose(0, 2, 3, 1))
    np.testing.assert_allclose(fraction, ref["lam"].item(), atol=1e-6)


def test_mixed_queries_are_made_of_both_and_say_how_much():
    """Groups of 2 of the 4 images draw a box each."""
    images, others = jnp.zeros((4, 32, 32, 3)), jnp.ones((4, 32, 32, 3))
    bags = Bags(cutmix_group=2)
    mix = jax.vmap(
        lambda image, other, key: bags.augment_batch({0: image, 2: other}, {}, key),
        in_axes=(0, 0, None), axis_name=AXIS,
    )  # fmt: skip
    mix, ratios = jax.jit(mix), []
    for seed in range(20):
        key = jax.random.key(seed)
        views, aux = mix(images[None], others[None], key)
        ratio, mixed = np.ravel(aux["mix_ratio"]), views[4][0]
        np.testing.assert_allclose(np.mean(mixed, (1, 2, 3)), 1 - ratio, atol=1e-6)
        assert ratio[0] == ratio[1] and ratio[2] == ratio[3]
        ratios.append(ratio[::2])
    assert 0.4 < np.mean(ratios) < 0.8 and np.std(ratios) > 0.1
    assert np.abs(np.diff(ratios)).max() > 0.1
    assert Bags(cutmix=False).augment_batch({0: images}, {}, key) == ({0: images}, {})


@pytest.mark.parametrize(
    "name, replicas", [("1q_a", 1), ("1q_a", 4), ("2q_a", 1), ("2q_a", 3), ("2q_momentum_a", 4)]
)
def test_anchors_of_compress(name, replicas):
    meta, ref = helpers.fixture(f"losses/compress_{name}")
    settings = meta["params"]
    bank = {"1q_a": "teacher", "2q_a": "student", "2q_momentum_a": "momentum"}[name]
    objective = Compress(
        bank=bank, temperature=settings["temperature"], queue_size=settings["queue_size"]
    )
    memory = {"teacher": queue(ref["teacher_queue_init"].T)}
    if bank != "teacher":
        memory["student"] = queue(ref["student_queue_init"].T)
    for step in range(settings["steps"]):
        encoded = {(n, 0): ref[f"{n}_raw"][step] for n in ("student", "teacher")}
        if bank == "momentum":
            encoded["momentum", 0] = ref["student_key_raw"][step]
        loss, memory, grads = terms(objective, encoded, memory, replicas=replicas)
        assert helpers.relative_error(loss, ref["loss"][step]) < EXACT
        assert helpers.relative_error(grads["student", 0], ref["grad_student_raw"][step]) < EXACT
        for kind in memory:
            expected = ref[f"{kind}_queue"][step]
            assert helpers.relative_error(memory[kind].vectors, expected) < EXACT
            assert memory[kind].pointer == ref["pointer"][step]


def rows(seed, count, dim):
    return np.random.default_rng(seed).normal(size=(count, dim)).astype("f")


def expected_pushes(start, pushes):
    """Pushes blocks to a queue in NumPy, with a pointer that wraps."""
    vectors, pointer = np.array(start.vectors), 0
    for block in pushes:
        vectors[pointer : pointer + len(block)] = block
        pointer = (pointer + len(block)) % len(vectors)
    return vectors


@pytest.mark.parametrize("replicas", [1, 4])
def test_the_two_banks_of_retro_follow_their_own_views_through_a_wrap(replicas):
    """Logits use the queues before each view's keys are pushed; 3 steps of 8 rows into 16."""
    objective = Contrast(pairs=((0, 1), (1, 0)), queue_size=16)
    initial = {f"view_{v}": Queue.create(jax.random.key(v), 16, 12) for v in (0, 1)}
    memory, pushed = initial, {0: [], 1: []}
    for step in range(3):
        encoded = {(n, v): rows(10 * step + 4 * v + i, 8, 12)
                   for i, n in enumerate(("student", "momentum")) for v in (0, 1)}  # fmt: skip
        before = memory
        loss, memory, _ = terms(objective, encoded, memory, replicas=replicas)
        halves = [
            np.mean(info_nce(l2_normalize(encoded["student", q]),
                             l2_normalize(encoded["momentum", k]),
                             before[f"view_{k}"].vectors, temperature=0.2))
            for q, k in ((0, 1), (1, 0))
        ]  # fmt: skip
        assert loss == pytest.approx(np.mean(halves), rel=1e-5)
        for v in (0, 1):
            pushed[v].append(np.asarray(l2_normalize(encoded["momentum", v])))
            expected = expected_pushes(initial[f"view_{v}"], pushed[v])
            np.testing.assert_allclose(memory[f"view_{v}"].vectors, expected, atol=1e-6)
            assert memory[f"view_{v}"].pointer == 8 * (step + 1) % 16


@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.parametrize(
    "objective, key", [(Consistency(queue_size=16), ("momentum", 1)),
                       (BinaryContrast(queue_size=16), ("teacher", 0)),
                       (Similarity(queue_size=16), ("teacher", 0))],
)  # fmt: skip
def test_queues_of_the_others_follow_their_keys_through_a_wrap(objective, key, replicas):
    start = Queue.create(jax.random.key(0), 16, 12)
    memory = {"view_0": start} if isinstance(objective, Similarity) else start
    pushed = []
    for step in range(3):
        encoded = {("student", 0): rows(step, 8, 12), key: rows(100 + step, 8, 12)}
        loss, memory, _ = terms(objective, encoded, memory, replicas=replicas)
        pushed.append(np.asarray(l2_normalize(encoded[key])))
        after = memory["view_0"] if isinstance(objective, Similarity) else memory
        np.testing.assert_allclose(after.vectors, expected_pushes(start, pushed), atol=1e-6)
        assert np.isfinite(loss)


def test_consistency_is_the_cross_entropy_with_the_keys_relations():
    memory = Queue.create(jax.random.key(0), 32, 12)
    query, key = rows(0, 8, 12), rows(1, 8, 12)
    loss, _, _ = terms(Consistency(), {("student", 0): query, ("momentum", 1): key}, memory)
    similarities = [
        np.asarray(l2_normalize(x)) @ np.asarray(memory.vectors).T for x in (query, key)
    ]
    target = np.exp(similarities[1] / 0.04)
    target /= target.sum(1, keepdims=True)
    logits = similarities[0] / 0.1
    expected = -(target * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum(1)
    assert loss == pytest.approx(expected.mean(), rel=1e-5)
    losses = bank_cross_entropy(
        l2_normalize(query), l2_normalize(key), memory.vectors, memory.vectors,
        student_temperature=0.1, target_temperature=0.04,
    )  # fmt: skip
    assert loss == pytest.approx(float(losses.mean()), rel=1e-6)


def test_simreg_is_two_minus_two_cosines_of_the_features():
    student, features = rows(0, 8, 12), rows(1, 8, 12)
    record = Record(
        {"student": {0: Encoded(student, jnp.asarray(student))},
         "teacher": {0: Encoded(jnp.asarray(features), jnp.zeros((8, 4)))}}, {},
    )  # fmt: skip
    objective = Distill(weight=1.0, views=(0,), teacher_output="features")
    loss = jax.vmap(
        lambda _: objective(record, (), jnp.int32(0)).loss, axis_name=AXIS, axis_size=1
    )(jnp.zeros(1))[0]
    cosine = (np.asarray(l2_normalize(student)) * np.asarray(l2_normalize(features))).sum(1)
    assert loss == pytest.approx(np.mean(2 - 2 * cosine), rel=1e-5)


def test_a_student_may_be_compared_with_another_view_of_the_teacher():
    encoded = {("student", 0): rows(0, 8, 12), ("teacher", 1): rows(1, 8, 12)}
    objective = Distill(views=(0,), teacher_views=(1,))
    assert objective.needs(None) == {"student": (0,), "teacher": (1,)}
    loss, _, _ = terms(objective, encoded, ())
    expected = squared_distance(
        l2_normalize(encoded["student", 0]), l2_normalize(encoded["teacher", 1])
    )
    assert loss == pytest.approx(float(expected.mean()), rel=1e-6)


def test_relations_within_groups_do_not_depend_on_the_devices():
    encoded = {(n, 0): rows(i, 8, 12) for i, n in enumerate(("student", "teacher"))}
    one, two = (terms(Relations(group=4), encoded, (), replicas=r)[0] for r in (1, 2))
    assert one == pytest.approx(float(two), rel=1e-6)
    assert abs(one - terms(Relations(), encoded, ())[0]) > 1e-4


@pytest.mark.parametrize("replicas", [1, 4])
def test_online_centroids_move_to_what_they_win(replicas):
    """Two tight groups of embeddings: two centroids follow them, and unused ones are replaced."""
    rng = np.random.default_rng(0)
    axes = np.eye(6, dtype="f")[[0, 1]]
    teacher = (axes[np.arange(8) % 2] + 0.01 * rng.normal(size=(8, 6))).astype("f")
    start = np.eye(6, dtype="f")[[0, 1, 4, 5]] + 0.3 * axes.sum(0)
    memory = Centroids(l2_normalize(start), jnp.array([0.5, 0.5, 0.0, 0.0]))
    objective = OnlineClusters(count=4, rate=0.5, idle=0.1)
    encoded = {("student", 0): teacher, ("teacher", 0): teacher}
    logits = np.asarray(l2_normalize(teacher)) @ np.asarray(memory.vectors).T / 0.2
    loss, memory, _ = terms(objective, encoded, memory, replicas=replicas)
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(8), np.arange(8) % 2]
    assert loss == pytest.approx(expected.mean(), rel=1e-5)
    np.testing.assert_allclose(memory.usage, [0.5, 0.5, 0, 0], atol=1e-6)
    assert (np.asarray(memory.vectors[:2]) * axes).sum(1).min() > 0.95  # closer than before
    nearest = np.max(np.asarray(memory.vectors) @ axes.T, axis=1)
    assert (nearest > 0.99).all()  # the two unused centroids are now embeddings of the batch


@pytest.mark.parametrize("replicas", [1, 4])
def test_centroids_follow_every_batch_whole_and_in_its_order(replicas):
    """Three steps against NumPy: assign, move used centroids, then replace unused ones."""
    objective = OnlineClusters(count=6, rate=0.8, idle=0.5)
    vectors, usage = np.array(l2_normalize(rows(0, 6, 5))), np.zeros(6, "f")
    memory, replaced = Centroids(jnp.asarray(vectors), jnp.asarray(usage)), 0
    for step in range(3):
        teacher = rows(10 + step, 8, 5)
        encoded = {("student", 0): rows(20 + step, 8, 5), ("teacher", 0): teacher}
        _, memory, _ = terms(objective, encoded, memory, replicas=replicas)
        teacher = teacher / np.linalg.norm(teacher, axis=1, keepdims=True)
        assigned = (teacher @ vectors.T).argmax(1)
        for k in set(assigned.tolist()):
            mean = teacher[assigned == k].sum(0)
            moved = 0.8 * vectors[k] + 0.2 * mean / np.linalg.norm(mean)
            vectors[k] = moved / np.linalg.norm(moved)
        usage = 0.8 * usage + 0.2 * np.bincount(assigned, minlength=6) / 8
        for row, k in zip(teacher, np.argsort(usage, kind="stable"), strict=False):
            if usage[k] < 0.5 / 6:
                vectors[k], replaced = row, replaced + 1
        np.testing.assert_allclose(memory.vectors, vectors, atol=1e-5)
        np.testing.assert_allclose(memory.usage, usage, atol=1e-6)
    assert replaced
