"""Tests of `plan` with the TPU compiler of libtpu, which the "test" extra installs."""

import importlib.util
import json

import pytest

import helpers
from disco_jax import main
from disco_jax.commands import plan

pytestmark = [
    pytest.mark.tpu_compiler,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]


@pytest.fixture
def tiny():
    """Makes all networks small enough to compile quickly."""
    with helpers.tiny_networks():
        yield


def test_a_plan_tells_memory_speed_and_hours(tmp_path, capsys):
    config = helpers.only_cropped(helpers.smoke_config("moco_v2", batch_size=32))
    file = tmp_path / "plan.json"
    report = plan.run(config, "v5e:4x4", images=1437, output=str(file))
    assert json.loads(file.read_text())["step_s"] == report["step_s"]
    assert report["forward_passes"] == {"student": (0,), "momentum": (1,)}
    assert (report["chips"], report["hosts"], report["fits"]) == (16, 4, True)
    memory = report["memory"]
    assert memory["teacher"] == 0 and memory["queues"] == 64 * 16 * 4 + 4
    assert memory["batch"] == 2 * 2 * 16 * 16 * 3  # 2 images per chip, 2 views, 1 byte per value
    assert memory["student"] >= memory["momentum"] > memory["optimizer"] > 0
    assert memory["activations"] > 0 and memory["program"] > 0
    # At least the keys of all chips and the gradients.
    assert report["collectives"]["all-gather"]["bytes"] >= 32 * 16 * 4
    assert report["collectives"]["all-reduce"]["bytes"] >= memory["optimizer"]
    assert report["step_s"] >= report["compute_s"] > report["floor_s"] > 0
    assert report["hours"] == pytest.approx(2 * report["step_s"] / 3600)
    efficiencies = [report["scaling"][n]["efficiency"] for n in (8, 64, 256)]
    assert 1 > efficiencies[0] > efficiencies[1] > efficiencies[2] > 0
    printed = capsys.readouterr().out
    assert "2 forward passes per image: student on views [0], momentum on views [1]" in printed
    assert "16 chips on 4 hosts" in printed and "each host must read" in printed


@pytest.mark.parametrize(
    "name, chips, hosts", [("v4:2x2x4", 16, 4), ("v5p:2x2x2", 8, 2), ("v6e:2x4", 8, 1)]
)
def test_every_kind_of_chip_has_its_compiler(tiny, name, chips, hosts):
    config = helpers.only_cropped(helpers.smoke_config("moco_v2", batch_size=32))
    report = plan.run(config, name, images=1437)
    assert (report["chips"], report["hosts"], report["fits"]) == (chips, hosts, True)
    assert report["memory"]["limit"] == plan.topology.parse(name)[0].hbm_bytes
    assert report["step_s"] >= report["compute_s"] > report["floor_s"] > 0
    assert report["collectives"]["all-reduce"]["bytes"] >= report["memory"]["optimizer"]


def test_a_step_that_does_not_fit_names_its_largest_parts(tiny, capsys):
    code = main.main(
        [
            "plan", "--config=moco_v2:student=resnet8,data=digits,smoke=true", "--images=1437",
            "--topology=v5e:2x2", "--config.student.dim=128", "--fit",
            "--config.student.backbone=tiny",
            f"--config.objectives.contrast.queue_size={2**26}",
        ]
    )  # fmt: skip
    captured = capsys.readouterr()
    assert code == 2
    assert "queues takes 32,768.0 MiB" in captured.err and "queue_size" in captured.err
    assert "largest config.batch_size that fits: 0" in captured.out  # the queue alone is too much


def test_a_queue_that_chips_share_is_divided_by_them(tiny):
    config = helpers.smoke_config("moco_v2", batch_size=32, **{"fast.shard_queue": True})
    helpers.only_cropped(config)
    config.fast.half_queue = True
    report = plan.run(config, "v5e:2x4", images=1437)
    assert report["fits"] and report["memory"]["queues"] == 64 // 8 * 16 * 2 + 4
    # Queries of all chips are sent instead of keys, in bfloat16 or float32.
    assert report["collectives"]["all-gather"]["bytes"] >= 32 * 16 * 2


def test_the_largest_batch_is_found(tiny, monkeypatch):
    monkeypatch.setattr(plan.program, "compile_step", limited(plan.program.compile_step, 4))
    config = helpers.only_cropped(helpers.smoke_config("moco_v2", batch_size=8))
    report = plan.run(config, "v5e:2x2", images=1437, fit=True)
    assert report["largest_batch_size"] == 16  # the queue would allow 64


def limited(compile_step, most):
    """Wraps `compile_step` such that steps of more than `most` images per chip do not fit."""

    def compile_limited(experiment, slice_):
        compiled = compile_step(experiment, slice_)
        small = experiment.settings.batch_size // len(slice_.devices) <= most
        return compiled if small else plan.program.Program(compiled.parts, compiled.limit)

    return compile_limited
