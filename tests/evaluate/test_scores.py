"""Accuracies, confusion matrices and confidence intervals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disco_jax.evaluate import scores


def test_rows_of_a_confusion_are_the_true_classes():
    logits = np.array([[0.1, 0.9, 0.0], [0.8, 0.1, 0.1], [0.3, 0.3, 0.4], [0.5, 0.5, 0.0]])
    table = scores.confusion(logits, np.array([1, 1, 2, 1]))
    np.testing.assert_array_equal(table, [[0, 0, 0], [2, 1, 0], [0, 0, 1]])


def test_a_summary_says_what_it_does_not_know():
    logits = np.eye(3)[[0, 0, 1]]
    result = scores.summary(logits, np.array([0, 1, 1]))
    assert result["class_top1"] == [100.0, 50.0, None]
    assert result["top1"] == pytest.approx(200 / 3) and result["top5"] == 100
    assert "of 3 images" in scores.line(result)


def test_scores_that_are_no_numbers_are_never_right():
    """A diverged classifier must not be the best of a grid."""
    logits = np.array([[np.nan, np.nan, np.nan], [0.0, np.nan, 1.0], [0.0, np.nan, 1.0]])
    assert scores.top_k(logits, np.array([0, 1, 2]), 1) == 0
    assert scores.top_k(logits, np.array([0, 1, 2]), 2) == pytest.approx(100 / 3)


def test_wilsons_interval_is_the_published_one():
    """Newcombe (Statistics in Medicine 17, 1998), table I, method 3."""
    assert scores.wilson(100 * 81 / 263, 263) == pytest.approx((25.53, 36.62), abs=0.01)
    assert scores.wilson(100 * 15 / 148, 148) == pytest.approx((6.24, 16.05), abs=0.01)
    assert scores.wilson(0.0, 20) == pytest.approx((0.0, 16.11), abs=0.01)
    assert scores.wilson(100 / 29, 29) == pytest.approx((0.61, 17.18), abs=0.01)


@given(st.integers(0, 500), st.integers(1, 500))
def test_an_interval_holds_its_share(hits, count):
    share = 100 * min(hits, count) / count
    low, high = scores.wilson(share, count)
    assert 0 <= low <= share + 1e-9 and share - 1e-9 <= high <= 100
