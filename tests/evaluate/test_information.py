"""Mutual information: equal to the official estimator, including its bug, and fast."""

import time

import numpy as np
import pytest

import helpers
from disco_jax.errors import UserError
from disco_jax.evaluate import information


@pytest.mark.parametrize("name", ["a", "b"])
def test_equals_the_recordings(name):
    meta, ref = helpers.fixture(f"eval/mutual_information_{name}")
    rows = information.binned(ref["logits"], meta["params"]["bins"])
    np.testing.assert_array_equal(rows, ref["binned"])
    for grouping, kind in (("rows", "definition"), ("official", "official")):
        estimate = information.mutual_information(rows, ref["labels"], grouping)
        expected = ref[f"i_xt_{kind}"], ref[f"i_ty_{kind}"]
        np.testing.assert_allclose(estimate, expected, rtol=0, atol=1e-9)


def test_what_is_known_of_extremes():
    labels = np.arange(40) % 4
    all_equal, determined = np.zeros((40, 3), int), np.stack([labels] * 3, axis=1)
    assert information.mutual_information(all_equal, labels) == (0.0, 0.0)
    np.testing.assert_allclose(information.mutual_information(determined, labels), (2.0, 2.0))
    distinct = np.arange(40)[:, None]
    np.testing.assert_allclose(information.mutual_information(distinct, labels), (np.log2(40), 2.0))


def test_sixty_thousand_rows_take_seconds():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(60_000, 10)).astype(np.float32)
    started = time.monotonic()
    information.mutual_information(information.binned(scores), rng.integers(0, 10, 60_000))
    assert time.monotonic() - started < 10  # 0.2 s on an idle core


def test_compression_begins_at_the_last_peak():
    assert information.turning_point(np.array([1.0, 3.0, 3.0, 2.0])) == 2
    with pytest.raises(UserError, match="Did you mean 'official'"):
        information.mutual_information(np.zeros((2, 1), int), np.zeros(2), "offical")
