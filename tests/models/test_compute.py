"""`Compute` changes how networks are computed, not their outputs or parameters."""

import ast
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import pytest

import helpers
from disco_jax import flags, models
from disco_jax.models import backbones
from disco_jax.train import experiment

CHOICES = (
    models.Compute(jnp.bfloat16).plain(),
    models.Compute(jnp.bfloat16, width_packing=True, stats_from_input=True),
    models.Compute(shift_and_add=True),
)
FILES = sorted(pathlib.Path(backbones.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("name", helpers.KINDS)
def test_every_network_has_the_same_parameters_however_it_is_computed(name):
    def shapes(compute):
        encoder = models.backbone(name)
        return jax.eval_shape(lambda: encoder.with_compute(compute).create(0, 64))

    expected = shapes(models.Compute())
    assert all(shapes(compute) == expected for compute in CHOICES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_backbone_knows_how_its_layers_are_computed(path):
    """Backbones neither import an optimization nor read a field of `Compute` but its dtype."""
    tree = ast.parse(path.read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    optimizations = {"packing", "shifts", "space_to_depth", "folding", "norm", "conv", "settings"}
    assert not {f"disco_jax.models.layers.{name}" for name in optimizations} & modules
    fields = {field.name for field in dataclasses.fields(models.Compute)} - {"dtype"}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not (fields | {"width_packing", "unpacked"}) & attributes


def test_every_family_is_listed_and_declares_whether_it_is_a_transformer():
    listed = {cls.__module__.rpartition(".")[2] for cls, _ in models.BACKBONES.values()}
    assert listed == {path.stem for path in FILES if "\nVARIANTS" in path.read_text()}
    assert models.is_transformer("vit_tiny_p16") and models.is_transformer("xcit_tiny_12_p16")
    assert not models.is_transformer("resnet18")
    assert not models.is_transformer("vit_huge")


def test_plain_settings_switch_every_optimization_off():
    config = helpers.smoke_config("moco_v2")
    config.fast.update(models.PLAIN)
    for network in helpers.build_method(config).networks.values():
        assert network.encoder.compute == network.encoder.compute.plain()
        assert network.exchange == "gather"


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_auto_becomes_the_choice_of_a_backend_and_other_choices_stay(backend):
    config = flags.load("moco_v2")
    config.fast.shifts = "on"
    experiment.resolve_auto(config, backend)
    on_tpus = backend == "tpu"
    assert config.dtype == ("float32" if backend == "cpu" else "bfloat16")
    assert config.fast.exchange == ("all_to_all" if on_tpus else "gather")
    assert config.fast.columns == config.fast.statistics == ("on" if on_tpus else "off")
    assert config.fast.shifts == "on"
