"""kNN: neighbours and predictions equal the official DINO code's, and brute force."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import helpers
from disco_jax.errors import UserError
from disco_jax.evaluate import knn
from disco_jax.evaluate.scores import top_k


@pytest.mark.parametrize("name", ["a", "b"])
def test_neighbours_and_votes_are_exact(name):
    meta, ref = helpers.fixture(f"eval/knn_{name}")
    classes = meta["params"]["classes"]
    for result in meta["params"]["results"]:
        k = result["k"]
        similarities, rows = knn.neighbours(ref["train_features"], ref["test_features"], k, 64)
        np.testing.assert_array_equal(rows, ref[f"neighbours_k{k}"])
        labels = ref["train_labels"][rows]
        votes = knn.scores(similarities, labels, classes, temperature=meta["params"]["temperature"])
        np.testing.assert_array_equal(votes.argmax(1), ref[f"weighted_prediction_k{k}"])
        assert top_k(votes, ref["test_labels"], 1) == pytest.approx(result["weighted_top1"])
        plain = knn.scores(similarities, labels, classes, vote="majority").argmax(1)
        assert ref[f"majority_winners_k{k}"][np.arange(len(plain)), plain].all()


def test_majority_ties_go_to_the_closer_class():
    similarities = np.array([[0.9, 0.8, 0.2, 0.1]], np.float32)
    labels = np.array([[2, 1, 1, 2]])
    assert knn.scores(similarities, labels, 3, vote="majority").argmax() in (1, 2)
    closer = np.array([[0.9, 0.8, 0.7, 0.1]], np.float32)  # class 1: 1.5, class 2: 1.0
    assert knn.scores(closer, labels, 3, vote="majority").argmax() == 1


def test_a_vote_outweighs_any_similarity():
    similarities = np.array([[1.0, -0.9, -1.0]], np.float32)
    assert knn.scores(similarities, np.array([[0, 1, 1]]), 2, vote="majority").argmax() == 1


@settings(max_examples=15, deadline=None)
@given(st.sampled_from((1, 17, 40)), st.sampled_from((1, 3)), st.integers(0, 2**31))
def test_blocks_do_not_change_the_neighbours(tests, block, seed):
    rng = np.random.default_rng(seed)
    train, test = rng.normal(size=(30, 5)).astype("f"), rng.normal(size=(tests, 5)).astype("f")
    neighbours = knn.neighbours(train, test, 4, block * 8)[1]
    normal = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test)]
    brute = np.argsort(-(normal[1] @ normal[0].T), axis=1)[:, :4]
    np.testing.assert_array_equal(neighbours, brute)


def test_what_cannot_be_is_refused():
    ones = np.ones((3, 2), np.float32)
    with pytest.raises(UserError, match=r"config\.k=4"):
        knn.neighbours(ones, ones, 4)
    with pytest.raises(UserError, match="Did you mean 'majority'"):
        knn.scores(ones, np.zeros((3, 2), int), 2, vote="majorty")


def test_top_k_counts_ties_once():
    scores = np.array([[1.0, 1.0, 1.0], [0.0, 2.0, 1.0]])
    assert top_k(scores, np.array([0, 2]), 1) == 50
    assert top_k(scores, np.array([2, 2]), 1) == 0
    assert top_k(scores, np.array([2, 2]), 3) == 100


def brute_force(train, test, k):
    """Sorts all float64 similarities, equal ones in index order."""
    normal = [
        x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test)
    ]
    return np.argsort(-(normal[1] @ normal[0].T), axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("rows", [37, 100, 131])
def test_shards_blocks_and_passes_equal_brute_force(rows):
    """Uses four devices that do not divide the bank, several passes and a partial last block."""
    rng = np.random.default_rng(rows)
    train, test = rng.normal(size=(rows, 6)).astype("f"), rng.normal(size=(23, 6)).astype("f")
    train[5] = train[-1]  # equal similarities are in index order
    neighbours = knn.neighbours(train, test, 7, 10, bank_block=8, resident=16)[1]
    np.testing.assert_array_equal(neighbours, brute_force(train, test, 7))


def test_equal_rows_stand_in_their_order_whatever_they_are_computed_with():
    """Uses more equal rows than candidates, whose similarities depend on the summation order.

    Covers blocks of the bank, shards and passes, and widths that do and do not fill SIMD registers.
    """
    for width in (17, 64):
        rng = np.random.default_rng(width)
        one, others = rng.normal(size=(1, width)), rng.normal(size=(5, width))
        train = np.concatenate([np.repeat(one, 40, axis=0), others]).astype("f")
        test = np.concatenate([one, 3 * one, 7e-3 * one]).astype("f")
        similarities, rows = knn.neighbours(train, test, 5, 4, bank_block=8, resident=16)
        np.testing.assert_array_equal(rows, np.tile(np.arange(5), (3, 1)))
        np.testing.assert_array_equal(similarities, similarities[:, :1].repeat(5, 1))
        rows = knn.neighbours(train, train, 5, 16, bank_block=8, resident=16, leave_out=True)[1]
        np.testing.assert_array_equal(rows[2], [0, 1, 3, 4, 5])


def test_leaving_out_passes_over_the_row_itself():
    rows = np.random.default_rng(0).normal(size=(50, 4)).astype("f")
    neighbours = knn.neighbours(rows, rows, 5, 16, bank_block=8, resident=8, leave_out=True)[1]
    np.testing.assert_array_equal(neighbours, brute_force(rows, rows, 6)[:, 1:])


def test_what_a_device_needs_beside_the_bank_does_not_grow_with_it():
    """Temporary memory of the compiled program is far below one row of products per test row."""

    def temporary_bytes(rows):
        shapes = ((4, rows, 16), (4,), (4,), (256, 16), (256,))
        kinds = ("float32", "int32", "int32", "float32", "int32")
        arguments = [jax.ShapeDtypeStruct(*each) for each in zip(shapes, kinds, strict=True)]
        return knn._scan.lower(*arguments, 28, 512).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(2048), temporary_bytes(65_536)
    assert large - small < 4 * 65_536 and large < 256 * 65_536 * 4 / 10


def test_no_more_than_blocks_are_held():
    """The similarities in a step cover one block, for any size of the bank."""
    shapes = [jax.ShapeDtypeStruct(s, "float32") for s in ((4096, 4), (512, 4))]
    number = jax.ShapeDtypeStruct((), "int32")
    own = jax.ShapeDtypeStruct((512,), "int32")
    traced = jax.make_jaxpr(lambda b, t, n, o: knn._scan.__wrapped__(b, n, n, t, o, 9, 64))
    sizes = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            sizes.extend(v.aval.size for v in equation.outvars)
            for value in equation.params.values():
                if hasattr(value, "jaxpr"):
                    visit(value.jaxpr)

    visit(traced(*shapes, number, own).jaxpr)
    assert max(sizes) <= 512 * (64 + 9 + 9)
