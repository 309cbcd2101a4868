"""Arithmetic of plans: topologies, times, scaling, the largest batch."""

import importlib.util

import pytest

from disco_jax import flags
from disco_jax.errors import UserError
from disco_jax.plan import estimate, hlo, program, topology
from disco_jax.train import experiment

V5E = topology.CHIPS["v5e"]
GRADIENTS = {"all-reduce": hlo.Collective(1, 40_000_000)}


@pytest.mark.parametrize(
    "name, message",
    [
        ("v5:2x4", "Did you mean 'v5"),
        ("v5e", r"needs 2 sides, e.g. v5e:4x4"),
        ("v5e:2x2x2", "needs 2 sides"),
        ("v4:4x4", r"needs 3 sides, e.g. v4:4x4x4"),
        ("v5e:0x4", "needs 2 sides"),
        ("v5e:32x16", "has 512 chips; the largest v5e slice has 256"),
    ],
)
def test_wrong_topologies_are_told_apart(name, message):
    with pytest.raises(UserError, match=message):
        topology.parse(name)


def test_choices_that_ask_where_they_are_are_those_of_tpus():
    """Resolves "auto" to the values on TPUs, though the plan runs on a CPU; keeps other values."""
    config = flags.load("moco_v2")
    experiment.resolve_auto(config, "tpu")
    assert config.dtype == "bfloat16"
    resolved = {name: config.fast[name] for name in ("exchange", "columns", "statistics", "shifts")}
    assert resolved == {
        "exchange": "all_to_all", "columns": "on", "statistics": "on", "shifts": "off",
    }  # fmt: skip
    config.update(dtype="float32")
    config.fast.update(columns="off", shifts="on")
    experiment.resolve_auto(config, "tpu")
    assert (config.dtype, config.fast.columns, config.fast.shifts) == ("float32", "off", "on")


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"disco-jax\[plan\]"):
        topology.open_slice("v5e:8x16")


def test_an_all_reduce_passes_each_link_twice():
    """16 x 16 closes to rings on both axes: 2 V (n - 1) / n over all links, and the hops."""
    expected = 2 * 40e6 * 255 / 256 / 200e9 + 16 * 1e-6
    assert estimate.collective_s(GRADIENTS, V5E, (16, 16)) == pytest.approx(expected)
    open_ended = estimate.collective_s(GRADIENTS, V5E, (8, 8))
    assert open_ended == pytest.approx(2 * 40e6 * 63 / 64 / 100e9 + 8e-6)
    assert estimate.collective_s(GRADIENTS, V5E, (1, 1)) == 0


def test_traded_rows_travel_to_their_own_chip():
    """Rows cross a quarter of each ring of 16, or (n - 1 / n) / 3 of a line of n.

    Their number does not depend on the slice.
    """
    moved = {"ragged-all-to-all": hlo.Collective(1, 10_000_000)}
    assert estimate.scaled(moved, 8, 64) == moved
    seconds = estimate.collective_s(moved, V5E, (16, 16))
    assert seconds == pytest.approx(8 * 10e6 * 255 / 256 / 200e9 + 16e-6)
    seconds = estimate.collective_s(moved, V5E, (2, 4))
    assert seconds == pytest.approx(1.75 * 10e6 * 7 / 8 / 100e9 + 3e-6)


def test_what_is_summed_and_scattered_goes_around_as_what_is_gathered_does():
    """A chip's part has the same size on any slice, and one part per chip circulates."""
    part = {"reduce-scatter": hlo.Collective(1, 1_000_000)}
    assert estimate.scaled(part, 8, 64) == part
    for sides in ((2, 4), (16, 16)):
        gathered = {"all-gather": hlo.Collective(1, 1_000_000 * sides[0] * sides[1])}
        seconds = estimate.collective_s(part, V5E, sides)
        assert seconds == pytest.approx(estimate.collective_s(gathered, V5E, sides))


def test_gathered_rows_grow_with_the_chips_and_gradients_do_not():
    moved = {**GRADIENTS, "all-gather": hlo.Collective(2, 1000)}
    assert estimate.scaled(moved, 8, 64) == {
        **GRADIENTS,
        "all-gather": hlo.Collective(2, 8000),
    }


def test_efficiency_falls_with_what_is_moved_alone():
    compiled = program.Program({}, 0, flops=1e12, cycles=15e6, collectives=GRADIENTS)
    assert estimate.efficiency(compiled, 8, V5E, (1, 1)) == 1
    on_many = estimate.efficiency(compiled, 8, V5E, (16, 16))
    seconds = estimate.collective_s(GRADIENTS, V5E, (16, 16))
    assert on_many == pytest.approx(0.01 / (0.01 + seconds))  # 15 M cycles of 1.5 GHz


@pytest.mark.parametrize(
    "kind, count, sides",
    [("v5e", 8, (2, 4)), ("v5e", 256, (16, 16)), ("v4", 8, (2, 2, 2)), ("v4", 32, (2, 4, 4))],
)
def test_shapes_are_as_square_as_can_be(kind, count, sides):
    assert estimate.shapes(topology.CHIPS[kind], count) == sides


@pytest.mark.parametrize("limit, expected", [(0, 0), (1, 1), (7, 4), (64, 64), (1000, 64)])
def test_the_largest_that_fits_is_found_by_bisection(limit, expected):
    tried = []

    def fits(n):
        tried.append(n)
        return n <= limit

    assert estimate.largest(fits, [1, 2, 4, 8, 16, 32, 64]) == expected
    assert len(tried) <= 3


def test_both_ways_to_be_too_large_are_understood():
    argument_bytes = {"student": 2**30, "teacher": 2**30}
    compiled = program.too_large("Used 20.5G of 15.75G hbm. Exceeded by 4.75G.", argument_bytes)
    assert not compiled.fits and compiled.limit == 15.75 * 2**30
    assert compiled.parts == {**argument_bytes, "activations": 18.5 * 2**30}
    compiled = program.too_large(
        "for HLO temporaries (65.25G) exceeds available HBM (15.75G).", argument_bytes
    )
    assert compiled.parts["activations"] == 65.25 * 2**30
    with pytest.raises(RuntimeError, match="INTERNAL: broken"):
        program.too_large("INTERNAL: broken", argument_bytes)
