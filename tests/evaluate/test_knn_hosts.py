"""Two hosts give the results of one: every image once, same neighbours, same classifier."""

import json
import pathlib
import socket

import children
import numpy as np
import pytest

import helpers
from disco_jax import models

KNN = "knn", "two_knn"


@pytest.mark.slow
def test_two_hosts_find_what_one_finds(tmp_path, monkeypatch):
    """Takes about a minute: two processes that compile, and the same work in this process."""
    arrays = helpers.digits()
    few = {k: v[: 96 if k.startswith("train") else 61] for k, v in arrays.items()}
    np.savez(tmp_path / "few.npz", **few)
    monkeypatch.setitem(models.BACKBONES, "tiny", (helpers.TinyBackbone, {}))
    tiny = {"student.backbone": "tiny"}
    run = helpers.network_run(tmp_path / "run", tmp_path / "few.npz", **tiny)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    arguments = run, tmp_path / "out.npz"
    hosts = [
        children.start(
            "knn_host:main", address, i, *arguments, XLA_FLAGS=helpers.one_device_flags()
        )
        for i in (0, 1)
    ]
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
    for result in (one, two):
        del result["settings"]["name"]
    assert one == two
