"""Tests of cached teacher outputs: they equal live outputs and save the forward passes."""

import contextlib
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import helpers
from disco_jax.commands import cache
from disco_jax.data import targets
from disco_jax.data.arrays import ArraySource
from disco_jax.data.contract import Position
from disco_jax.errors import UserError
from disco_jax.plan import budget
from disco_jax.run import hosts, lease
from disco_jax.train import session, step, teacher
from disco_jax.train.experiment import assemble
from disco_jax.train.prepare import prepare
from disco_jax.train.state import replicate
from disco_jax.workflows import joint_runs, pretrain

STEPS = 5  # per epoch: 1437 images in batches of 256
# Flips alone show whether draws are the same; other operations take long to compile.
FLIPPED = {"augment.flip_prob": 0.5, "augment.jitter_prob": 0.0}
FLIPPED |= {"augment.grey_prob": 0.0, "augment.blur_prob": 0.0}


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    """Enables the compilation cache, as the command line does."""
    with helpers.programs_kept(tmp_path_factory.mktemp("programs")), helpers.tiny_networks():
        yield


@pytest.fixture(scope="module")
def source():
    return ArraySource(helpers.digits_splits())


def config_of(recipe="disco", **changes):
    fields = {
        "batch_size": 256,
        "total_steps": STEPS,
        "log.every_steps": 1,
        "checkpoint.every_steps": 2,
        **FLIPPED,
        **changes,
    }
    if "objectives.contrast.queue_size" not in fields:
        fields["objectives.contrast.queue_size"] = 512
    return helpers.smoke_config(recipe, **fields)


def losses(folder, name="loss"):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return np.array([json.loads(line)[name] for line in lines])


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory, source):
    """A folder with the outputs of two epochs."""
    folder = tmp_path_factory.mktemp("cache") / "outputs"
    cache.run(config_of(), str(folder), source, epochs=2)
    return folder


def test_a_folder_in_use_is_refused(cache_folder, source):
    with lease.held(cache_folder), pytest.raises(UserError, match="Another run is writing"):
        cache.run(config_of(), str(cache_folder), source, epochs=2)


def test_embeddings_are_those_of_the_teacher_to_bfloat16(cache_folder, source):
    """Compares with the live teacher, on the same number of devices."""
    ready = prepare(config_of(), source)
    live = step.parallel_targets(
        step.make_targets(ready.method, ready.experiment.views, ready.settings.seed, ("embedding",))
    )
    saved = targets.Targets(str(cache_folder), 0, 1)
    assert len(saved) == 2 * STEPS
    start = saved.after[5]
    with session.batches_of(ready, start) as batches:
        batch, _ = next(batches)
    outputs = live(jnp.int32(6), replicate(ready.frozen), batch)
    for view in (0, 1):
        expected = np.asarray(outputs[view]["embedding"]).reshape(256, -1)
        actual = saved.batch(6)[view]["embedding"].astype(np.float32)
        np.testing.assert_allclose(actual, expected, rtol=2**-8, atol=1e-6)
    assert not np.allclose(actual, saved.batch(5)[1]["embedding"].astype(np.float32), atol=1e-2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, source, cache_folder):
    """Folders of the same run with the live teacher and with its cached outputs."""
    folder = tmp_path_factory.mktemp("runs")
    pretrain.run(config_of(), str(folder / "live"), source)
    pretrain.run(config_of(**{"teacher.cache": str(cache_folder)}), str(folder / "cached"), source)
    return folder


def test_a_student_learns_the_same_from_it(runs):
    live, cached = losses(runs / "live"), losses(runs / "cached")
    assert len(live) == STEPS and np.ptp(live) > 0.1
    np.testing.assert_allclose(cached, live, rtol=2e-3)


def test_a_longer_run_sees_the_views_again_and_resumes_bit_for_bit(tmp_path, source, cache_folder):
    changes = {"teacher.cache": str(cache_folder), "total_steps": 2 * STEPS + 3}
    config = config_of(**changes)
    _, like, _, _ = helpers.smoke(config_of(), 4)
    pretrain.run(config, str(tmp_path / "whole"), source)
    for stop in (2 * STEPS - 1, 2 * STEPS + 1):
        patched = config_of(**changes)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pretrain.loop.hosts, "stop_on_signals", stopping_at(stop))
            with pytest.raises(pretrain.errors.Preempted):
                pretrain.run(patched, str(tmp_path / "parts"), source)
    pretrain.run(config, str(tmp_path / "parts"), source)
    whole, parts = (helpers.restore(tmp_path / name, like) for name in ("whole", "parts"))
    chex.assert_trees_all_equal(parts, whole)


def stopping_at(number):
    class Stop(hosts.Stop):
        def __call__(self, step):
            return step == number

    return lambda: contextlib.nullcontext(Stop())


def test_batches_come_again_after_the_last_one(source, cache_folder):
    replayed = targets.ReplayedSource(source, targets.Targets(str(cache_folder), 0, 1))
    ready = prepare(config_of(), source)
    crops = dict(enumerate(ready.experiment.views.crops))
    batches = []
    for batch in replayed.train("train", crops, 256, ready.settings.seed, Position.start(), 0):
        batches.append(batch)
        if len(batches) == 4 * STEPS + 2:
            break
    for n in (0, 1):
        for again in (2 * STEPS + n, 4 * STEPS + n):
            chex.assert_trees_all_equal(batches[again].views, batches[n].views)
            chex.assert_trees_all_equal(batches[again].aux, batches[n].aux)
    assert not np.array_equal(batches[STEPS].views[0], batches[0].views[0])
    start = batches[3 * STEPS].position
    assert start.epoch == 3
    onward = next(replayed.train("train", crops, 256, ready.settings.seed, start, 0))
    chex.assert_trees_all_equal(onward.views, batches[3 * STEPS + 1].views)
    assert onward.position == batches[3 * STEPS + 1].position


def test_a_killed_one_goes_on_where_it_was(tmp_path, source, cache_folder, monkeypatch):
    monkeypatch.setattr(targets, "_PART_BYTES", 1)  # one file per batch
    real, calls = targets.Writer.add, []

    def add(self, *args):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        real(self, *args)

    monkeypatch.setattr(targets.Writer, "add", add)
    with pytest.raises(KeyboardInterrupt):
        cache.run(config_of(), str(tmp_path / "kept"), source, epochs=2)
    with pytest.raises(UserError, match=r"holds 6 of 10 batches.*to its end"):
        prepare(config_of(**{"teacher.cache": str(tmp_path / "kept")}), source)
    cache.run(config_of(), str(tmp_path / "kept"), source, epochs=2)
    assert len(calls) == 11
    actual, expected = (
        targets.Targets(str(path), 0, 1) for path in (tmp_path / "kept", cache_folder)
    )
    assert actual.after == expected.after
    for number in range(2 * STEPS):
        chex.assert_trees_all_equal(actual.batch(number), expected.batch(number))


OTHERS = {
    "config.seed: 0 -> 1": {"seed": 1},
    "config.augment.blur_prob: ": {"augment.blur_prob": 0.1},
    "config.batch_size: 256 -> 128": {"batch_size": 128},
    "config.teacher.norm: 'local' -> 'running'": {"teacher.norm": "running"},
    "config.local.count: 0 -> 2": {"local.count": 2, "objectives.distill.views": (0, 1, 2, 3)},
}


@pytest.mark.parametrize("message", OTHERS)
def test_other_settings_are_refused(message, source, cache_folder):
    with pytest.raises(UserError, match=f"(?s)was created with other settings.*{message}"):
        prepare(config_of(**{**OTHERS[message], "teacher.cache": str(cache_folder)}), source)


def test_another_teacher_or_data_set_is_refused(source, cache_folder, monkeypatch):
    config = config_of(**{"teacher.cache": str(cache_folder)})
    images, labels = helpers.digits_splits()["train"]
    fewer = ArraySource({"train": (images[:-1], labels[:-1]), "test": (images, labels)})
    with pytest.raises(UserError, match="images: 1437 -> 1436"):
        prepare(config, fewer)
    other = lambda _, encoder, size: teacher.Teacher(encoder.create(9, size))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "load", other)
        with pytest.raises(UserError, match="weights of the teacher"):
            prepare(config, source)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    with pytest.raises(UserError, match="devices: 4 -> 2"):
        prepare(config, source)


def test_fewer_views_may_be_read(source, cache_folder):
    config = config_of(**{"teacher.cache": str(cache_folder), "objectives.distill.views": (0,)})
    assert prepare(config, source).period == 2 * STEPS


MAPS = {f"{network}.backbone": "resnet8" for network in ("student", "teacher")}
BAD = {
    "no cache": ("disco", {"teacher.cache": "nowhere"}, "has no targets.json"),
    "maps": ("attention", {"teacher.cache": "nowhere", **MAPS}, "not the feature maps"),
    "no teacher": ("moco_v2", {"teacher.cache": "nowhere"}, "no objective reads a teacher"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_cached_is_refused(name, source):
    recipe, changes, message = BAD[name]
    with pytest.raises(UserError, match=message):
        prepare(config_of(recipe, **changes), source)


def test_a_folder_of_other_outputs_or_with_other_things_is_left_alone(
    cache_folder, source, tmp_path
):
    with pytest.raises(UserError, match=r"config.seed: 0 -> 1"):
        cache.run(config_of(seed=1), str(cache_folder), source, epochs=2)
    with pytest.raises(UserError, match="--epochs=2"):
        cache.run(config_of(), str(cache_folder), source, epochs=3)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        cache.run(config_of(), str(tmp_path), source, epochs=1)
    with pytest.raises(UserError, match="No objective reads a teacher"):
        cache.run(config_of("moco_v2"), str(tmp_path / "new"), source)


def test_a_damaged_file_is_named(cache_folder, tmp_path):
    import shutil

    copy = tmp_path / "kept"
    shutil.copytree(cache_folder, copy)
    part = next(copy.glob("host_*/*.npz"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 0xFF
    part.write_bytes(content)
    with pytest.raises(UserError, match=r"00000000.npz is damaged"):
        targets.Targets(str(copy), 0, 1).batch(3)


def test_a_file_that_was_cut_short_is_named(cache_folder, tmp_path):
    import shutil

    shutil.copytree(cache_folder, tmp_path / "kept")
    part = next((tmp_path / "kept").glob("host_*/*.npz"))
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"00000000.npz is damaged"):
        targets.Targets(str(tmp_path / "kept"), 0, 1)


def test_each_host_keeps_and_reads_its_own(tmp_path):
    after = [Position(0, 4), Position(1, 0)]
    targets.write_meta(tmp_path, {"steps": 2})
    for host in (0, 1):
        writer = targets.Writer(tmp_path, host, 2)
        for i, position in enumerate(after):
            rows = np.full((4, 3), 10 * host + i, np.float32)
            writer.add(position, {0: {"embedding": rows}})
        writer.flush()
    for host in (0, 1):
        read = targets.Targets(str(tmp_path), host, 2)
        assert read.after == after and read.epochs == 1
        assert (read.batch(1)[0]["embedding"] == 10 * host + 1).all()
        assert read.number(Position(0, 4)) == 1
    with pytest.raises(UserError, match="0 of 2 batches of host 0 of 1"):
        targets.Targets(str(tmp_path), 0, 1)


def test_the_size_is_told_ahead(source, tmp_path, capsys):
    size = cache.run(config_of(), str(tmp_path / "kept"), source, epochs=3, dry_run=True)
    assert size == {"steps": 15, "bytes": 2 * 2 * 16 * 256 * 15}
    assert "3 epochs, 15 steps of 256 images, views 0, 1: 0.000229 GiB" in capsys.readouterr().out
    assert not (tmp_path / "kept").exists()


def test_it_costs_what_moco_costs(cache_folder):
    """Counts the operations of DisCo on one view, with MoCo-v2 as reference."""
    wide = {"student.width": 16, "teacher.width": 64, "batch_size": 8}
    wide |= {"student.backbone": "resnet8", "teacher.backbone": "resnet8", "fast.shifts": "off"}
    one_view = {**wide, "objectives.distill.views": (0,)}
    costs = {}
    for name, recipe, changes in (
        ("moco", "moco_v2", wide),
        ("live", "disco", one_view),
        ("cached", "disco", {**one_view, "teacher.cache": str(cache_folder)}),
    ):
        config = config_of(recipe, **{**changes, "objectives.contrast.queue_size": 64})
        config.student.hidden = 32
        built, arguments = budget.program.abstract(assemble(config, steps_per_epoch=1), 1)
        costs[name] = budget.flops(built.train_step, arguments)
    assert costs["cached"] < 1.05 * costs["moco"]
    assert costs["live"] > 2 * costs["moco"]


def test_students_share_what_was_kept(cache_folder, runs, source, tmp_path):
    configs = {
        "narrow": config_of(**{"teacher.cache": str(cache_folder), "student.hidden": 8}),
        "same": config_of(**{"teacher.cache": str(cache_folder)}),
    }
    joint_runs.run(configs, {name: str(tmp_path / name) for name in configs}, source)
    np.testing.assert_allclose(losses(tmp_path / "same"), losses(runs / "cached"), rtol=1e-4)
