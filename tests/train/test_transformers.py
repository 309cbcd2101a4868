"""Complete steps of DINO and DINO with DisCo, with a tiny ViT, a tiny XCiT and paper settings."""

import chex
import jax
import numpy as np
import pytest

import helpers
from disco_jax import flags, models
from disco_jax.ops.collectives import AXIS
from disco_jax.train import experiment

# Shows that settings arrive; `test_dynamics.py` and `test_optimizer.py` compare their numbers.
pytestmark = pytest.mark.wiring

TEACHERS = {"vit_tiny_p16": "vit_small_p16", "xcit_tiny_12_p16": "xcit_small_12_p16"}


@pytest.fixture(autouse=True)
def one_block(monkeypatch):
    """The papers' variants, reduced to a depth of one block."""
    for name in (*TEACHERS, *TEACHERS.values()):
        cls, fields = models.BACKBONES[name]
        monkeypatch.setitem(models.BACKBONES, name, (cls, {**fields, "depth": 1}))


def smoke(recipe, student, **changes):
    """Returns a transformer's recipe with its paper's settings, on small images."""
    arg = f"student={student},data=digits,smoke=true"
    if recipe == "dino_disco":
        arg += f",teacher={TEACHERS[student]}"
    config = flags.load(f"{recipe}:{arg}")
    config.augment.size, config.local.size, config.batch_size = 16, 8, 4
    # Restores the papers' settings, which `smoke=true` replaces.
    real = flags.load(f"{recipe}:{arg.replace('digits,smoke=true', 'imagenet2012')}")
    fields = ("name", "weight_decay", "weight_decay_end", "no_decay", "clip")
    fields += ("frozen_until", "frozen")
    config.optimizer.update({field: real.optimizer[field] for field in fields})
    config.optimizer.update(frozen_epochs=0, frozen_steps=1)
    config.learning_rate.warmup_epochs = 0  # a warm-up would have rate 0 in the first step
    config.student.drop_path = real.student.drop_path
    config.update_from_flattened_dict(changes)
    return experiment.resolve(helpers.only_cropped(config))


def steps(config, count):
    """Takes `count` steps; returns the states before and after each of them, and last metrics."""
    step, state, frozen, batch = helpers.smoke(config, 1)
    step = jax.jit(jax.vmap(step, in_axes=(None, None, 0), out_axes=None, axis_name=AXIS))
    states = [state]
    for _ in range(count):
        state, metrics = step(state, frozen, batch)
        states.append(state)
    return states, metrics


def moved(before, after):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
        )
        if np.any(a != b)
    }


@pytest.mark.parametrize(
    "recipe, student",
    [
        # Two of four combinations suffice, since DisCo's term is the same for both networks.
        ("dino", "vit_tiny_p16"),
        pytest.param("dino_disco", "xcit_tiny_12_p16", marks=pytest.mark.slow),
    ],
)
def test_a_transformer_takes_steps_with_every_setting_of_its_paper(recipe, student):
    config = smoke(recipe, student)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.clip, config.student.drop_path) == ("adamw", 3.0, 0.1)
    assert (optimizer.weight_decay, optimizer.weight_decay_end) == (0.04, 0.4)
    assert config.local.count == 2 and config.local.size < config.augment.size
    (start, first, second), metrics = steps(config, 2)
    names = {"self_distill/loss"} | ({"distill/loss"} if recipe == "dino_disco" else set())
    assert names <= set(metrics)
    chex.assert_tree_all_finite((second, metrics))
    # The prototypes are frozen in the first step and their scale is fixed; all else is trained.
    all_names = moved(
        start.student["params"], jax.tree.map(lambda x: x + 1, start.student["params"])
    )
    fixed = {"prototypes/scale0"}
    assert moved(start.student["params"], first.student["params"]) >= {
        name for name in all_names if name.startswith(("backbone", "head"))
    }
    assert moved(first.student["params"], second.student["params"]) == all_names - fixed
    assert not {n for n in moved(start.student["params"], first.student["params"])
                if n.startswith("prototypes")}  # fmt: skip
    # The EMA's decay starts at 0.996; the centre is 0.1 times a mean after one step.
    share = jax.tree.map(
        lambda m, a, b: np.allclose(m, 0.996 * a + 0.004 * b, atol=1e-6),
        first.momentum["params"], start.momentum["params"], first.student["params"],
    )  # fmt: skip
    assert all(jax.tree.leaves(share))
    centre = first.memory["self_distill"]
    assert np.any(centre != 0) and np.all(np.abs(centre) <= 0.1 + 1e-6)
