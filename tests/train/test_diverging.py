"""Valid settings with which training diverges: exit code 3, and the last finite state is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax import main
from disco_jax.data.arrays import ArraySource
from disco_jax.data.bags import Bags
from disco_jax.errors import NumericError
from disco_jax.methods import OBJECTIVES
from disco_jax.train import joint, loop
from disco_jax.workflows import pretrain


def config_of(recipe, **changes):
    """Returns a recipe with the smallest networks that its objectives support."""
    if recipe.startswith("attention"):  # the tiny backbone has no feature maps
        return helpers.only_cropped(helpers.smoke_config(recipe, **changes))
    return helpers.tiny_config(recipe, **changes)


def methods():
    """Returns one recipe for each distinct set of objectives -> that set."""
    recipes = {}
    with helpers.tiny_backbone():
        for recipe in helpers.RECIPES:
            objectives = config_of(recipe).objectives
            recipes.setdefault(frozenset(n for n, o in objectives.items() if o.weight), recipe)
    return {recipe: objectives for objectives, recipe in recipes.items()}


METHODS = methods()


def test_every_objective_is_in_one_of_the_methods():
    assert frozenset().union(*METHODS.values()) == set(OBJECTIVES)


@pytest.mark.wiring  # checks how the run ends, independent of the numbers
@pytest.mark.parametrize("recipe", sorted(METHODS))
def test_a_mad_rate_ends_with_3_and_keeps_the_last_good_state(
    recipe, tmp_path, capsys, monkeypatch
):
    digits = helpers.digits()
    source = ArraySource({"train": (digits["train_images"][:64], digits["train_labels"][:64])})
    with helpers.tiny_backbone(), helpers.devices(1):
        config = config_of(recipe, batch_size=16, total_steps=8)
        config.learning_rate.update(base_lr=1e38, decay="constant", warmup_epochs=0)
        config.checkpoint.every_steps = 1
        if config.bags.file:
            config.bags.file = str(tmp_path / "bags.npz")
            with open(config.bags.file, "wb") as file:
                Bags(clusters=(np.arange(64) // 6).astype(np.int32)).save(file)
        run = str(tmp_path / "run")
        monkeypatch.setattr(main, "_start", lambda *_: pretrain.run(config, run, source))
        assert main.main(["pretrain"]) == 3
        message = capsys.readouterr().err
        assert "Not finite" in message and "last good checkpoint is kept" in message
        _, like, _, _ = helpers.smoke(config, 1)
        restored = helpers.restore(run, like)
    if restored is not None:  # None: the first step diverged
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(restored[0]))


class FakeCheckpoints:
    """Checkpoints in memory that record the saved steps."""

    def __init__(self):
        self.steps = []

    def save(self, step, *_):
        self.steps.append(step)

    def wait(self):
        pass


class NullLogger:
    def write(self, *_):
        pass


def run_until(last_good, checkpoints):
    """Runs six steps with finite losses and, after step `last_good`, states that are not finite."""

    def step_fn(state, frozen, batch):
        weights = jnp.full(3, jnp.where(state["step"] >= last_good, jnp.inf, 1.0))
        return {"step": state["step"] + 1, "weights": weights}, {"loss": jnp.ones(())}

    begin = {"step": jnp.int32(0), "weights": jnp.ones(3)}
    schedule = loop.Schedule(0, 6, 3, 4, log_steps=1, checkpoint_steps=2, verbose=False)
    batches = iter([(None, (0, 0))] * 6)
    loop.run(step_fn, begin, {}, batches, schedule, NullLogger(), checkpoints)


def test_a_state_that_is_not_finite_is_not_saved_though_its_losses_were():
    checkpoints = FakeCheckpoints()
    with pytest.raises(NumericError, match=r"Not finite after step 4: weights \(1 arrays\)"):
        run_until(3, checkpoints)
    assert checkpoints.steps == [2]
    run_until(6, checkpoints := FakeCheckpoints())
    assert checkpoints.steps == [2, 4, 6]


def test_of_several_runs_the_one_is_named_whose_state_is_not_finite():
    states = {"a": {"w": np.ones(2)}, "b": {"w": np.full(2, np.nan)}, "c": {"n": np.arange(2)}}
    with pytest.raises(joint.Diverged, match="b: Not finite after step 7: w") as raised:
        joint.check_states(7, states)
    assert raised.value.names == ("b",)
