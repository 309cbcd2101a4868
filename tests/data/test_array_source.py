"""Resuming from random positions, and the whole input pipeline without TensorFlow."""

import itertools
import subprocess
import sys
import types

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import helpers
from disco_jax.data.arrays import ArraySource
from disco_jax.data.contract import Position

WHOLE = {
    0: types.SimpleNamespace(
        size=8, scale=(1.0, 1.0), ratio=(1.0, 1.0), interpolation="bilinear", antialias="exact"
    )
}
IMAGES = np.broadcast_to(np.arange(60, dtype=np.uint8)[:, None, None], (60, 8, 8))


def read(source, n, batch_size, seed, start):
    """Reads n batches as (records, position after them)."""
    batches = itertools.islice(source.train("train", WHOLE, batch_size, seed, start, 0), n)
    return [(b.views[0][:, 0, 0, 0].tolist(), b.position) for b in batches]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_epoch_is_a_permutation_however_it_is_read(data):
    count, hosts = data.draw(st.integers(4, 60), "count"), data.draw(st.sampled_from([1, 2, 4]))
    batch_size = data.draw(st.integers(1, count // hosts), "batch")
    seed = data.draw(st.integers(-(2**63), 2**63), "seed")
    per_epoch, epochs = count // hosts // batch_size, ([], [])
    for host in range(hosts):
        source = ArraySource(
            {"train": (IMAGES[:count], None)}, process_index=host, process_count=hosts
        )
        whole = read(source, 2 * per_epoch, batch_size, seed, Position.start())
        assert whole[-1][1] == Position(2, 0)
        for i, (records, _) in enumerate(whole):
            epochs[i // per_epoch].extend(records)
        i = data.draw(st.integers(0, len(whole) - 1), "at")
        rest = read(source, len(whole) - 1 - i, batch_size, seed, whole[i][1])
        assert rest == whole[i + 1 :]
    for records in epochs:
        assert len(records) == len(set(records)) == hosts * per_epoch * batch_size
        if count % (hosts * batch_size) == 0:
            assert sorted(records) == list(range(count))


def test_limits_are_never_exceeded_and_nothing_is_read_twice():
    for hosts, count, limit in itertools.product((1, 3, 5), (5, 8, 13), (0, 1, 4, 7, 20)):
        records, batches = [], set()
        for host in range(hosts):
            source = ArraySource(
                {"test": (IMAGES[:count], None)}, process_index=host, process_count=hosts
            )
            host_batches = list(source.evaluate("test", 8, 0, "bilinear", 2, limit))
            batches.add(len(host_batches))
            records += [i for b in host_batches for i in b["image"][b["mask"]][:, 0, 0, 0].tolist()]
        expected = min(limit, count) if limit else count
        assert len(batches) == 1 and len(records) == len(set(records))
        assert expected - 1 <= len(records) <= expected
        assert len(records) == expected or hosts > 3


def test_everything_but_tensorflow_reads_the_digits(tmp_path):
    """Covers recipe, source, prefetching, layout and evaluation in a process without TensorFlow."""
    np.savez(tmp_path / "digits.npz", **helpers.digits())
    code = """
import sys
sys.modules["tensorflow"] = sys.modules["tensorflow_datasets"] = None
import jax, numpy as np
from disco_jax.data import pipeline, presets, views
from disco_jax.data.contract import Position
from disco_jax.data.data_settings import DataSettings
data = DataSettings(source="npz", dir="digits.npz")
source = pipeline.open_source(data)
recipe = views.build({**presets.PRESETS["moco_v2"], "size": 12})
batches = source.train("train", dict(enumerate(recipe.crops)), 479, 0, Position.start(), 0)
with pipeline.Prefetcher(batches, transform=lambda b: pipeline.to_devices(b.views, 1)) as ready:
    for _ in range(4):
        crops = next(ready)
assert {v: x.shape for v, x in crops.items()} == {v: (1, 479, 12, 12, 3) for v in (0, 1)}
augmented = recipe.photometric(
    {v: x[0, :4] for v, x in crops.items()}, jax.random.key(0), np.arange(4, dtype=np.int32))
assert augmented[1].shape == (4, 12, 12, 3)
batches = list(source.evaluate("test", 8, 8, "bilinear", 100))
print(sum(b["mask"].sum() for b in batches), len(batches), source.num_classes)
"""
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["360", "4", "10"]
