"""Two hosts give the results of one: every image once, same neighbours, same classifier."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

import helpers
from disco_jax import models

KNN = "knn", "two_knn"
FOLDERS = [str(pathlib.Path(helpers.__file__).parent), str(helpers.PARITY)]
CHILD = """
import sys
sys.path[:0] = sys.argv[5:]
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
jax.config.update("jax_default_matmul_precision", "highest")
import helpers
from disco_jax import flags, models
from disco_jax.evaluate import features, knn, target
from disco_jax.commands import knn as knn_task, linear
import numpy as np
models.BACKBONES["tiny"] = helpers.TinyBackbone, {}
results = []
for recipe in ("linear", "linear:protocol=moco"):
    config = flags.load(recipe)
    config.update(total_epochs=2, batch_size=32, name=f"two_{len(results)}")
    config.learning_rate.base_lr = 0.5
    results.append(linear.run(config, sys.argv[3]))
assert results[1]["images"] == results[0]["images"] == 61
config = flags.load("knn")
config.name = "two_knn"
knn_task.run(config, sys.argv[3])
trained, source = target.opened(features.load(sys.argv[3]))
test = features.of_split(trained, source, "test", 16)
near = knn.neighbours(test.features, test.features, 5, 16, leave_out=True)[1]
if jax.process_index() == 0:
    np.savez(sys.argv[4], features=test.features, labels=test.labels, near=near,
             top1=results[0]["top1"])
"""


@pytest.mark.slow
def test_two_hosts_find_what_one_finds(tmp_path, monkeypatch):
    arrays = helpers.digits()
    few = {k: v[: 96 if k.startswith("train") else 61] for k, v in arrays.items()}
    np.savez(tmp_path / "few.npz", **few)
    monkeypatch.setitem(models.BACKBONES, "tiny", (helpers.TinyBackbone, {}))
    tiny = {"student.backbone": "tiny"}
    run = helpers.network_run(tmp_path / "run", tmp_path / "few.npz", **tiny)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": helpers.one_device_flags()}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, address, str(i), run, tmp_path / "out.npz", *FOLDERS],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in (0, 1)
    ]  # fmt: skip
    for host in hosts:
        output, _ = host.communicate(timeout=300)
        assert host.returncode == 0, output[-3000:]
    from disco_jax import flags
    from disco_jax.commands import knn as knn_task
    from disco_jax.commands import linear
    from disco_jax.evaluate import features, knn, target

    trained, source = target.opened(features.load(run))
    test = features.of_split(trained, source, "test", 16)
    config = flags.load("linear")
    config.update(total_epochs=2, batch_size=32)
    config.learning_rate.base_lr = 0.5
    top1 = linear.run(config, run)["top1"]
    knn_task.run(flags.load("knn"), run)
    with np.load(tmp_path / "out.npz") as two:
        np.testing.assert_array_equal(two["labels"], few["test_labels"])
        np.testing.assert_allclose(two["features"], test.features, rtol=1e-4, atol=1e-6)
        near = knn.neighbours(two["features"], two["features"], 5, 16, leave_out=True)[1]
        np.testing.assert_array_equal(two["near"], near)
        assert two["top1"] == pytest.approx(top1)
    with np.load(f"{run}/two_0.npz") as two, np.load(f"{run}/linear.npz") as one:
        for name in ("kernel", "bias", "confusion"):
            np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-5)
    one, two = (json.loads(pathlib.Path(run, f"{name}.json").read_text()) for name in KNN)
    assert one == two
