"""Few labels: balanced, deterministic for a seed, and nested."""

import numpy as np
import pytest

from disco_jax.errors import UserError
from disco_jax.evaluate import subsets

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [20, 24, 30, 41, 85]))


@pytest.mark.parametrize("seed", [0, 1])
def test_every_class_has_as_many_and_more_hold_fewer(seed):
    few, more = (subsets.balanced(LABELS, n, seed) for n in (3, 20))
    np.testing.assert_array_equal(np.bincount(LABELS[few]), [3] * 5)
    assert set(few) < set(more) and (np.diff(more) > 0).all()
    np.testing.assert_array_equal(few, subsets.balanced(LABELS, 3, seed))
    assert set(few) != set(subsets.balanced(LABELS, 3, seed + 1))


def test_a_share_is_spread_evenly():
    np.testing.assert_array_equal(np.bincount(LABELS[subsets.share(LABELS, 10, 0)]), [4] * 5)
    assert len(subsets.share(LABELS, 0.01, 0)) == 5  # at least one of every class
    with pytest.raises(UserError, match="Class 0 has 20 labelled images, fewer than the 40"):
        subsets.share(LABELS, 100, 0)
    with pytest.raises(UserError, match=r"config.labelled.percent=101"):
        subsets.share(LABELS, 101, 0)


def test_what_is_held_out_leaves_something_of_every_class():
    out = subsets.held_out(LABELS, 10, 0)
    np.testing.assert_array_equal(np.bincount(LABELS[out]), [2, 2, 3, 4, 8])
    out = subsets.held_out(LABELS, 100, 0)
    np.testing.assert_array_equal(np.bincount(LABELS[~out]), [1] * 5)
    with pytest.raises(UserError, match="no image can be held out"):
        subsets.held_out(np.arange(4), 10, 0)


def test_folds_divide_every_class_into_equal_parts():
    parts = subsets.folds(LABELS, 10, 0)
    for label in range(5):
        sizes = np.bincount(parts[label == LABELS], minlength=10)
        assert sizes.sum() == (label == LABELS).sum() and np.ptp(sizes) <= 1
    assert (parts != subsets.folds(LABELS, 10, 1)).any()
    with pytest.raises(UserError, match="class 0 has only 20 training images"):
        subsets.folds(LABELS, 21, 0)
    with pytest.raises(UserError, match="needs 2 parts or more"):
        subsets.folds(LABELS, 1, 0)


def test_rows_are_drawn_evenly_and_small_classes_give_all():
    for count, most in ((25, 5), (140, 33), (150, 38), (200, 85)):
        rows = subsets.even(LABELS, count, 0)
        assert len(set(rows)) == count and (np.diff(rows) > 0).all()
        sizes = np.bincount(LABELS[rows])
        assert sizes.max() == most
        whole = sizes == [20, 24, 30, 41, 85]
        assert (whole | (sizes == sizes.max())).all()
    rows = subsets.even(LABELS, 3, 0)  # fewer than there are classes
    assert np.bincount(LABELS[rows]).max() == 1
    np.testing.assert_array_equal(rows, subsets.even(LABELS, 3, 0))
    assert {tuple(LABELS[subsets.even(LABELS, 3, seed)]) for seed in range(9)} != {
        tuple(LABELS[rows])
    }
