"""Augmentation recipes: distributions, compiled operations and rejected settings."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disco_jax import typed
from disco_jax.data import presets, views
from disco_jax.data.data_settings import AugmentSettings, build_views
from disco_jax.errors import UserError
from disco_jax.ops import augment

MANY = 8192
EVERYTHING = {
    **presets.PRESETS["moco_v2"],
    "order": ("flip", "jitter", "grey", "blur", "solarize"),
    "solarize_prob": 0.2,
}


@functools.cache
def photometric(**changes):
    return views.build({**EVERYTHING, **changes}).photometric_ops[0]


def images(batch=8, size=6, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)


def places(*positions):
    return jnp.asarray(positions, jnp.int32)


def everywhere(count):
    return jnp.arange(count, dtype=jnp.int32)


@functools.cache
def compiled_draw():
    return jax.jit(photometric().draw)


@functools.cache
def compiled_call():
    return jax.jit(photometric().__call__)


@functools.cache
def many_draws():
    return compiled_draw()(jax.random.key(0), everywhere(MANY))


def near(share, expected):
    """Returns whether a share of MANY draws is within five standard errors of its probability."""
    return abs(share - expected) < 5 * (expected * (1 - expected) / MANY) ** 0.5


def test_presets_build():
    for name, preset in presets.PRESETS.items():
        recipe = views.build(preset, count=2)
        assert recipe.sizes == (224,) * 2, name
        assert len(recipe.photometric_ops) == 2
        assert recipe.crops[0].scale == preset["scale"]


# Scale, operations in order, jitter strengths and probability, and the probabilities of grey, blur
# and solarize for both views.
PAPERS = {
    "weak": ((0.08, 1), ("flip",), None, 0, (0, 0), (0, 0)),
    "weak02": ((0.2, 1), ("flip",), None, 0, (0, 0), (0, 0)),
    "linear": ((0.08, 1), ("flip",), None, 0, (0, 0), (0, 0)),
    "moco_v1": ((0.2, 1), ("grey", "jitter", "flip"), (0.4, 0.4, 0.4, 0.4, 1), 0.2, (0, 0), (0, 0)),
    "moco_v2": (
        (0.2, 1),
        ("jitter", "grey", "blur", "flip"),
        (0.4, 0.4, 0.4, 0.1, 0.8),
        0.2,
        (0.5, 0.5),
        (0, 0),
    ),
    "swav": (
        (0.14, 1),
        ("flip", "jitter", "grey", "blur"),
        (0.8, 0.8, 0.8, 0.2, 0.8),
        0.2,
        (0.5, 0.5),
        (0, 0),
    ),
    "seed_swav": (
        (0.14, 1),
        ("jitter", "grey", "blur", "flip"),
        (0.4, 0.4, 0.4, 0.1, 0.8),
        0.2,
        (0.5, 0.5),
        (0, 0),
    ),
    "dino": (
        (0.4, 1),
        ("flip", "jitter", "grey", "blur", "solarize"),
        (0.4, 0.4, 0.2, 0.1, 0.8),
        0.2,
        (1.0, 0.1),
        (0, 0.2),
    ),
}


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_are_those_of_the_official_code(name):
    scale, order, jitter, grey, blur, solarize = PAPERS[name]
    recipe = views.build(presets.PRESETS[name])
    for view, (crop, ops) in enumerate(zip(recipe.crops, recipe.photometric_ops, strict=True)):
        assert crop.scale == scale
        assert crop.interpolation == ("bicubic" if name == "dino" else "bilinear")
        assert set(ops.active) <= set(order) and ops.order == order
        assert ops.flip_prob == 0.5 and ops.grey_prob == grey
        assert (ops.blur_prob, ops.solarize_prob) == (blur[view], solarize[view])
        assert ops.jitter_prob == (jitter[4] if jitter else 0)
        assert jitter is None or ops.jitter == jitter[:4]
        assert ops.std == ((0.228, 0.224, 0.225) if name == "swav" else (0.229, 0.224, 0.225))


@pytest.mark.parametrize("name", presets.LOCALS)
def test_local_views_differ_in_what_is_named_alone(name):
    local = presets.LOCALS[name]
    recipe = views.build(presets.PRESETS[name], 2, local)
    assert recipe.sizes == (224, 224) + (96,) * local["count"]
    assert len(recipe.photometric_ops) == len(recipe.crops)
    crop, ops = recipe.crops[-1], recipe.photometric_ops[-1]
    assert crop.scale == local["scale"] and crop.ratio == recipe.crops[0].ratio
    assert crop.interpolation == recipe.crops[0].interpolation
    assert (ops.blur_prob, ops.solarize_prob) == (0.5, 0.0)
    assert (
        ops.jitter == recipe.photometric_ops[0].jitter and ops.std == presets.PRESETS[name]["std"]
    )


def test_no_local_views_leave_the_recipe_as_it_is():
    preset = presets.PRESETS["moco_v2"]
    assert views.build(preset, 2, presets.NO_LOCALS) == views.build(preset)


@pytest.mark.parametrize(
    "changes, local, message",
    [
        ({}, {"scale": (0.5, 0.1)}, r"config.local.scale=\(0.5, 0.1\) is invalid"),
        ({}, {"size": 0}, r"config.local.size=0 is invalid"),
        ({}, {"count": -1}, r"config.local.count=-1 is invalid"),
        ({}, {"solarize_prob": 0.5}, r"config.local.solarize_prob=0.5 .*lacks 'solarize'"),
        ({"blur_prob": (0.5, 0.5, 0.5)}, {}, r"config.augment.blur_prob=.* or 2 of them"),
        ({"blur_prob": (0.5, 1.5)}, {}, r"config.augment.blur_prob=1.5 is invalid"),
        ({"flip_prob": (0.5, 0.5)}, {}, r"config.augment.flip_prob=.* is invalid"),
    ],
)
def test_settings_of_views_name_themselves(changes, local, message):
    preset = {**presets.PRESETS["moco_v2"], **changes}
    with pytest.raises(UserError, match=message):
        views.build(preset, 2, {**presets.LOCALS["swav"], **local})


def test_a_section_of_a_config_builds_the_same_recipe():
    section = {**presets.PRESETS["moco_v2"], "jitter": [0.4, 0.4, 0.4, 0.1]}  # lists, as in JSON
    recipe = build_views(typed.parse(AugmentSettings, section, "config.augment"))
    assert recipe == views.build(presets.PRESETS["moco_v2"])
    hash(recipe)


def test_draws_do_not_depend_on_the_number_of_devices():
    step, key, batch = compiled_call(), jax.random.key(7), images()
    whole = step(batch, key, everywhere(8))
    halves = [step(batch[:4], key, places(0, 1, 2, 3)), step(batch[4:], key, places(4, 5, 6, 7))]
    np.testing.assert_allclose(jnp.concatenate(halves), whole, rtol=0, atol=2e-5)
    misplaced = step(batch[4:], key, places(0, 1, 2, 3))
    assert jnp.max(jnp.abs(misplaced - whole[4:])) > 0.1


def test_replicas_under_vmap_share_one_order():
    """A key that differed by replica would turn the four switches into selects."""
    operation, key, batch = photometric(), jax.random.key(7), images()
    split = jax.vmap(operation.__call__, in_axes=(0, None, 0), axis_name="batch")
    arguments = (batch.reshape(4, 2, 6, 6, 3), key, everywhere(8).reshape(4, 2))
    lowered = jax.jit(split).lower(*arguments)
    assert lowered.as_text().count("stablehlo.case") == 4
    whole = compiled_call()(batch, key, everywhere(8))
    result = lowered.compile()(*arguments).reshape(whole.shape)
    np.testing.assert_allclose(result, whole, rtol=0, atol=2e-5)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31 - 1), st.lists(st.integers(0, 2**30), min_size=4, max_size=4))
def test_an_image_draws_by_key_and_position_alone(seed, positions):
    draw, key = compiled_draw(), jax.random.key(seed)
    forward, backward = draw(key, places(*positions)), draw(key, places(*positions[::-1]))
    for name in ("flip", "grey", "blur", "solarize"):
        np.testing.assert_array_equal(forward[name][0], backward[name][0][::-1])
    np.testing.assert_array_equal(forward["jitter"][0], backward["jitter"][0][::-1])
    np.testing.assert_array_equal(forward["jitter"][1], backward["jitter"][1])


@pytest.mark.parametrize(("name", "rate"), [("flip", 0.5), ("grey", 0.2), ("solarize", 0.2)])
def test_masks_are_on_as_often_as_asked(name, rate):
    (mask,) = many_draws()[name]
    assert near(float(jnp.mean(mask)), rate)


def test_masks_of_two_operations_are_independent():
    flip, grey = many_draws()["flip"][0], many_draws()["grey"][0]
    assert near(float(jnp.mean(flip & grey)), 0.5 * 0.2)


def test_jitter_factors_are_uniform_in_their_ranges():
    factors = np.asarray(many_draws()["jitter"][0])
    neutral = np.all(factors == np.float32([1, 1, 1, 0]), axis=1)
    assert near(1 - neutral.mean(), 0.8)
    ranges = [(0.6, 1.4)] * 3 + [(-0.1, 0.1)]
    for column, (low, high) in zip(factors[~neutral].T, ranges, strict=True):
        assert_uniform(column, low, high)
    correlation = np.corrcoef(factors[~neutral].T) - np.eye(4)
    assert np.abs(correlation).max() < 0.06


def test_jitter_factors_stay_positive():
    others = {f"{name}_prob": 0.0 for name in views.OPERATIONS if name != "jitter"}
    draw = photometric(jitter=(1.5, 0.4, 0.4, 0.0), jitter_prob=1.0, **others).draw
    factors, _ = jax.jit(draw)(jax.random.key(0), everywhere(MANY))["jitter"]
    assert_uniform(np.asarray(factors[:, 0]), 0.0, 2.5)
    assert jnp.all(factors[:, 3] == 0)


def test_blur_widths_are_uniform_in_their_range():
    sigma = np.asarray(many_draws()["blur"][0])
    assert near(np.mean(sigma > 0), 0.5)
    assert_uniform(sigma[sigma > 0], 0.1, 2.0)


def assert_uniform(values, low, high):
    """Checks the range and the Kolmogorov distance, below 1.95 / sqrt(n) at a level of 0.1 %."""
    ranks = (np.sort(values) - low) / (high - low)
    assert ranks[0] >= -1e-6 and ranks[-1] <= 1 + 1e-6
    steps = (np.arange(len(ranks)) + 0.5) / len(ranks)
    assert np.abs(ranks - steps).max() < 1.95 / len(ranks) ** 0.5


def test_orders_cover_all_permutations():
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for key in jax.random.split(jax.random.key(0), 512):
        order = compiled_draw()(key, everywhere(4))["jitter"][1]
        counts[tuple(order.tolist())] += 1
    assert min(counts.values()) > 0
    assert max(counts.values()) < 3 * 512 / 24


def test_certain_operations_act_on_every_image():
    changes = {"flip_prob": 1.0, "grey_prob": 1.0, "solarize_prob": 1.0}
    off = {"jitter_prob": 0.0, "blur_prob": 0.0}  # quick to compile
    draws = jax.jit(photometric(**changes, **off).draw)(jax.random.key(0), everywhere(MANY))
    assert all(bool(jnp.all(draws[name][0])) for name in ("flip", "grey", "solarize"))


def traced(operation):
    return str(jax.make_jaxpr(operation.__call__)(images(2), jax.random.key(0), places(0, 1)))


@pytest.mark.parametrize("name", views.OPERATIONS)
def test_operations_of_no_probability_are_not_compiled(name):
    off = photometric(**{f"{name}_prob": 0.0})
    without = dataclasses.replace(off, order=tuple(n for n in off.order if n != name))
    assert traced(off) == traced(without)
    assert traced(off) != traced(photometric())


def test_jitter_of_no_strength_is_not_compiled():
    off = photometric(jitter=(0.0,) * 4)
    assert "jitter" not in off.active
    assert traced(off) == traced(photometric(jitter_prob=0.0))
    assert "cond" not in traced(off)


def test_the_weak_preset_compiles_a_flip_alone():
    weak = views.build(presets.PRESETS["weak"]).photometric_ops[0]
    assert weak.active == ("flip",)
    primitives = traced(weak)
    assert "dot_general" not in primitives and "cond" not in primitives
    assert "dot_general" in traced(photometric()) and "cond" in traced(photometric())


def test_operations_act_in_the_given_order():
    """Solarizing does not commute with conversion to greyscale."""
    changes = {"grey_prob": 1.0, "solarize_prob": 1.0, "jitter_prob": 0.0, "blur_prob": 0.0}
    base = photometric(**changes, flip_prob=0.0)
    results = [
        jax.jit(dataclasses.replace(base, order=order).__call__)(
            images(2), jax.random.key(0), places(0, 1)
        )
        for order in (("grey", "solarize"), ("solarize", "grey"))
    ]
    assert jnp.max(jnp.abs(results[0] - results[1])) > 0.1


@pytest.mark.parametrize(
    "order", [("flip", "jitter", "grey", "blur"), ("solarize", "blur", "grey", "flip")]
)
def test_a_flip_that_the_blur_does_is_in_its_place(order):
    """Compares with the operations applied one by one in their order."""
    active = {f"{name}_prob": 0.5 * (name in order) for name in views.OPERATIONS}
    operation = photometric(order=order, **active)
    batch, key = images(8, 12), jax.random.key(3)
    draws = jax.jit(operation.draw)(key, everywhere(8))
    assert 0 < np.sum(draws["flip"][0]) < 8 and 0 < np.sum(np.asarray(draws["blur"][0]) > 0) < 8
    expected = jnp.asarray(batch, jnp.float32) / 255.0
    for name in order:
        expected = jax.jit(views.OPERATIONS[name])(expected, *draws[name])
    expected = augment.normalize(expected, operation.mean, operation.std)
    result = jax.jit(operation.__call__)(batch, key, everywhere(8))
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-5)


def test_nothing_active_is_plain():
    changes = {f"{name}_prob": 0.0 for name in views.OPERATIONS}
    recipe = views.build({**EVERYTHING, **changes})
    batch = images(2)
    augmented = recipe.photometric({0: batch}, jax.random.key(0), places(0, 1))
    np.testing.assert_array_equal(augmented[0], recipe.plain(batch))


def test_plain_normalises_with_the_first_view():
    recipe = views.build({**EVERYTHING, "mean": (0.5, 0.25, 0.0), "std": (0.5, 0.5, 2.0)})
    batch = np.full((1, 2, 2, 3), 255, np.uint8)
    np.testing.assert_allclose(recipe.plain(batch)[0, 0, 0], [1.0, 1.5, 0.5], atol=1e-6)


def test_views_draw_apart_and_keys_matter():
    recipe = views.build({**EVERYTHING, "jitter_prob": 0.0, "blur_prob": 0.0})  # quick to compile
    step, batch = jax.jit(recipe.photometric), images()
    first = step({0: batch, 1: batch}, jax.random.key(0), everywhere(8))
    again = step({0: batch, 1: batch}, jax.random.key(0), everywhere(8))
    other = step({0: batch, 1: batch}, jax.random.key(1), everywhere(8))
    assert set(first) == {0, 1}
    np.testing.assert_array_equal(first[0], again[0])
    assert jnp.max(jnp.abs(first[0] - first[1])) > 0.1
    assert jnp.max(jnp.abs(first[0] - other[0])) > 0.1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 0),
        ("size", 32.5),
        ("size", True),
        ("scale", (0.0, 1.0)),
        ("scale", (0.5, 0.2)),
        ("scale", (0.2, 1.1)),
        ("scale", 0.5),
        ("scale", (0.2, float("nan"))),
        ("ratio", (0.0, 1.0)),
        ("ratio", (2.0, 1.0)),
        ("interpolation", "bicubik"),
        ("antialias", "yes"),
        ("order", ("flip", "flop")),
        ("order", "flip"),
        ("order", (["flip"],)),
        ("order", (*EVERYTHING["order"], "flip")),
        ("flip_prob", 1.5),
        ("jitter_prob", -0.1),
        ("grey_prob", "0.2"),
        ("blur_prob", None),
        ("solarize_prob", True),
        ("jitter", (0.4, 0.4, 0.4)),
        ("jitter", (0.4, 0.4, 0.4, 0.6)),
        ("jitter", (-0.4, 0.4, 0.4, 0.1)),
        ("blur_sigma", (2.0, 0.1)),
        ("blur_sigma", (-1.0, 0.1)),
        ("mean", (0.5, 0.5)),
        ("std", (0.2, 0.0, 0.2)),
    ],
)
def test_bad_settings_name_themselves_and_what_they_were_given(field, value):
    with pytest.raises(UserError) as error:
        views.build({**EVERYTHING, field: value})
    assert f"config.augment.{field}" in str(error.value)
    offenders = [
        value,
        *(value if field == "order" else ()),
    ]  # the message may show the wrong name only
    assert any(f"{field}={offender!r}" in str(error.value) for offender in offenders)


def test_a_probability_that_nothing_reads_is_refused():
    order = tuple(name for name in EVERYTHING["order"] if name != "blur")
    with pytest.raises(UserError, match=r"config.augment.blur_prob=0.5 .*lacks 'blur'"):
        views.build({**EVERYTHING, "order": order})
    views.build({**EVERYTHING, "order": order, "blur_prob": 0.0})


@pytest.mark.parametrize(("given_name", "suggestion"), [("flp", "flip"), ("gray", "grey")])
def test_unknown_operations_get_a_suggestion(given_name, suggestion):
    with pytest.raises(UserError, match=f"Did you mean '{suggestion}'"):
        views.build({**EVERYTHING, "order": (given_name,)})


def test_unknown_and_missing_fields_are_named():
    with pytest.raises(UserError, match=r"config.augment.blurprob .*'blur_prob'"):
        views.build({**EVERYTHING, "blurprob": 0.5})
    missing = {k: v for k, v in EVERYTHING.items() if k != "std"}
    with pytest.raises(UserError, match=r"config.augment.std must be set"):
        views.build(missing)


def crop(size, scale, ratio=(3 / 4, 4 / 3)):
    return views.Crop(size, scale, ratio, "bilinear", True)


def test_the_ratio_of_pixel_scales_is_that_of_the_crops():
    """Square crops of a square image have E[PS_g / PS_l] = (GC / LC)^2 E[A_l] E[1 / A_g]."""
    large, small = crop(224, (0.3, 1.0), (1, 1)), crop(128, (0.05, 0.3), (1, 1))
    expected = (224 / 128) ** 2 * 0.175 * math.log(1 / 0.3) / 0.7
    assert views.pixel_scale_ratio(large, small, 1000, 1000) == pytest.approx(expected, rel=0.02)


def test_sslights_views_are_nearer_to_one_pixel_scale_than_the_usual():
    sslight = views.pixel_scale_ratio(crop(224, (0.3, 1.0)), crop(128, (0.05, 0.3)))
    usual = views.pixel_scale_ratio(crop(224, (0.14, 1.0)), crop(96, (0.05, 0.14)))
    assert abs(sslight - 1) < 0.1 < abs(usual - 1)


def test_many_alike_views_are_compiled_once_and_drawn_as_ever(monkeypatch):
    augment = {**EVERYTHING, "size": 12, "jitter_prob": 0.0, "blur_prob": 0.0}
    local = dict(count=4, size=8, scale=(0.1, 0.4), blur_prob=0.0, solarize_prob=0.4)
    recipe = views.build(augment, 2, local)
    rng = np.random.default_rng(0)
    crops = {v: rng.integers(0, 256, (4, s, s, 3), np.uint8) for v, s in enumerate(recipe.sizes)}
    key, positions = jax.random.key(3), jnp.arange(4, dtype=jnp.int32)

    def trace_and_run():
        return jax.make_jaxpr(recipe.photometric)(crops, key, positions), jax.jit(
            recipe.photometric
        )(crops, key, positions)

    looped, augmented = trace_and_run()
    monkeypatch.setattr(views, "LOOP_MIN_VIEWS", 99)
    unrolled, expected = trace_and_run()
    assert list(augmented) == list(range(6))
    for view in augmented:
        np.testing.assert_allclose(augmented[view], expected[view], atol=1e-5)
    assert len(str(looped)) < 0.7 * len(str(unrolled))
