"""Tests of the assembly of a pretraining config."""

import chex
import jax
import pytest

import helpers
from disco_jax import errors
from disco_jax.data.arrays import ArraySource
from disco_jax.plan import program
from disco_jax.train import experiment
from disco_jax.workflows import pretrain

pytestmark = pytest.mark.wiring  # compares shapes and messages


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with helpers.tiny_networks():
        yield


def test_all_mistakes_are_in_one_message():
    config = helpers.smoke_config("disco")
    config.augment.order = ("blurr",)
    config.objectives.contrast.queue_size = 33
    with pytest.raises(errors.UserError, match=r"(?s)'blurr'.*queue_size=33"):
        experiment.assemble(config)


def test_needs_are_the_views_that_objectives_read():
    needs = experiment.assemble(helpers.smoke_config("disco")).needs
    assert needs == {"student": (0, 1), "momentum": (1,), "teacher": (0, 1)}


def test_objectives_know_the_length_of_an_epoch():
    assembled = experiment.assemble(helpers.smoke_config("dino"), steps_per_epoch=7)
    assert assembled.method.objectives["self_distill"].steps_per_epoch == 7
    assert assembled.total_steps == assembled.config.total_steps


@pytest.mark.parametrize("recipe", ["moco_v2", "swav_disco", "pseudo_labels", "retro"])
def test_a_plan_has_the_shapes_of_a_step(recipe):
    config = helpers.smoke_config(recipe)
    _, (state, frozen, batch) = program.abstract(experiment.assemble(config, steps_per_epoch=10), 4)
    _, expected_state, expected_frozen, expected_batch = helpers.smoke(config, 4)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.eval_shape(lambda: expected_state))
    chex.assert_trees_all_equal_shapes_and_dtypes(batch, jax.eval_shape(lambda: expected_batch))
    assert frozen.keys() == expected_frozen.keys()


def test_a_prepared_run_has_the_same_method():
    config = helpers.smoke_config("moco_v2")
    ready = pretrain.prepare(config, ArraySource(helpers.digits_splits()))
    assembled = experiment.assemble(config, steps_per_epoch=ready.experiment.steps_per_epoch)
    assert assembled.method == ready.method and assembled.views == ready.experiment.views


def test_groups_of_synchronized_statistics_fit_the_devices():
    """Groups of 8 of 32 images lie on one device, or span two of eight; 12 and 5 do not fit."""
    config = helpers.smoke_config("swav", batch_size=32)
    for group, devices, valid in ((8, 1, True), (8, 8, True), (12, 8, False), (5, 4, False)):
        config.student.norm_group = group
        if valid:
            experiment.check_devices(experiment.parse(config), devices)
        else:
            with pytest.raises(errors.UserError, match=rf"norm_group={group} .*valid: 1, 2, 4, 8"):
                experiment.check_devices(experiment.parse(config), devices)
    config.student.norm = "local"
    with pytest.raises(errors.UserError, match="images per device"):
        experiment.check_devices(experiment.parse(config), 8)
