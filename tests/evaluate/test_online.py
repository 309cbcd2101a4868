"""An interrupted supervised training resumes bit for bit."""

import jax
import numpy as np
import pytest

import helpers
from disco_jax import flags
from disco_jax.data.arrays import ArraySource
from disco_jax.evaluate import features, online


class BrokenOff(Exception):
    pass


def test_a_fine_tuning_goes_on_bit_for_bit(tmp_path):
    splits = {s: (x[:64], y[:64]) for s, (x, y) in helpers.digits_splits().items()}
    # The network has BatchNorm, whose statistics are part of the state.
    tiny = helpers.smoke_settings("moco_v2", **{"student.backbone": "tiny"})
    with helpers.tiny_backbone():
        trained = features.untrained(tiny)
    config = flags.load("finetune")
    config.update(total_epochs=3, batch_size=32)
    settings = helpers.probe_settings(config)

    def broken_off(step, network, layer):
        if step == 5:  # the last checkpoint is of step 4
            raise BrokenOff
        return {}

    def train(folder, **options):
        source = ArraySource(splits)
        return online.train(settings, trained, source, str(tmp_path / folder), **options)

    with helpers.programs_kept(tmp_path / "programs"):
        whole, layer = train("whole")
        with pytest.raises(BrokenOff):
            train("broken", eval_fn=broken_off, eval_every_steps=1)
        again, same = train("broken")
    jax.tree.map(np.testing.assert_array_equal, whole.variables, again.variables)
    np.testing.assert_array_equal(layer.kernel, same.kernel)
