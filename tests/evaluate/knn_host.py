"""One of two processes that evaluate the same run, for `test_knn_hosts.py`."""

import sys

import jax
import numpy as np

import helpers
from disco_jax import flags
from disco_jax.commands import knn as knn_task
from disco_jax.commands import linear
from disco_jax.evaluate import features, knn, target


def main():
    """Evaluates a run; its arguments are ADDRESS PROCESS RUN OUTPUT."""
    address, process, run, output = sys.argv[1:]
    jax.distributed.initialize(address, 2, int(process))
    jax.config.update("jax_default_matmul_precision", "highest")
    with helpers.tiny_backbone():
        results = [linear.run(config, run) for config in probes()]
        assert results[1]["images"] == results[0]["images"] == 61
        config = flags.load("knn")
        config.name = "two_knn"
        knn_task.run(config, run)
        trained, source = target.opened(features.load(run))
        test = features.of_split(trained, source, "test", 16)
        near = knn.neighbours(test.features, test.features, 5, 16, leave_out=True)[1]
    if jax.process_index() == 0:
        arrays = {"features": test.features, "labels": test.labels, "near": near}
        np.savez(output, **arrays, top1=results[0]["top1"])


def probes():
    """Returns the configs of two linear probes of two epochs, of features and of crops."""
    configs = []
    for recipe in ("linear", "linear:protocol=moco"):
        config = flags.load(recipe)
        config.update(total_epochs=2, batch_size=32, name=f"two_{len(configs)}")
        config.learning_rate.base_lr = 0.5
        configs.append(config)
    return configs
