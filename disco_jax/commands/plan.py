"""Compile a config's step for a TPU slice without having one: memory, speed, hours."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags as absl_flags
from ml_collections import ConfigDict

from disco_jax import errors, flags
from disco_jax.files import whole
from disco_jax.plan import estimate, program, topology

# Numbers of training images of data sets that need not be present.
IMAGES = {"imagenet2012": 1_281_167}
SCALES = (8, 16, 32, 64, 128, 256, 512, 1024)
_HELP = {
    "activations": "fewer images per chip (a smaller config.batch_size or more chips; --fit finds "
    "how many), shorter queues",
    "queues": "--config.fast.shard_queue, or a smaller config.objectives.*.queue_size",
    "teacher": "a smaller config.teacher.backbone, or chips with more memory",
    "batch": "fewer images per chip: a smaller config.batch_size or more chips",
}
_SMALLER = "a smaller config.student.backbone, or chips with more memory"


def main(argv: Sequence[str]) -> None:
    """Runs `disco-jax plan --config RECIPE --topology v5e:4x4 [--fit] [--images N] ...`."""
    values = flags.parse("plan", argv, help_line=__doc__, extra=_define, needs_workdir=False)
    if values is None:
        return
    import jax

    jax.config.update("jax_platforms", "cpu")  # the compiler for TPUs runs on the CPU
    run(
        values.config,
        values.topology,
        fit=values.fit,
        images=values.images,
        output=values.output,
    )


def run(
    config: ConfigDict, name: str, *, fit: bool = False, images: int = 0, output: str = ""
) -> dict[str, Any]:
    """Prints, saves and returns the memory, speed and hours of a run of `config` on a slice.

    Args:
      config: config of a pretraining run.
      name: name of the slice, e.g. "v5e:4x4".
      fit: also find the largest batch size, with one compilation per candidate.
      images: number of training images; 0 counts them in the data set, or takes the known number
        for ImageNet.
      output: a .json file for the returned report.

    Raises:
      UserError: a setting is invalid, or the step does not fit into memory.
    """
    from disco_jax import methods
    from disco_jax.data import pipeline
    from disco_jax.train import experiment

    if output and not output.endswith(".json"):
        raise errors.UserError(f"--output={output} should end in .json.")
    config = experiment.resolve(config)
    experiment.resolve_auto(config, "tpu")
    settings = experiment.parse(config)
    slice_ = topology.open_slice(name)
    experiment.check_devices(settings, len(slice_.devices))
    data = settings.data
    images = images or (IMAGES.get(data.name, 0) if data.source == "tfds" else 0)
    images = images or pipeline.open_source(data).count(data.train_split)
    compiled = _compile(config, slice_, images)
    report = _report(config, slice_, compiled, images)
    report["forward_passes"] = methods.plan(settings.method)
    print(describe_passes(report["forward_passes"]))
    _print(report)
    if fit:
        report["largest_batch_size"] = _fit(config, slice_, images, compiled)
        print(f"  largest config.batch_size that fits: {report['largest_batch_size']}")
    if output:
        with whole(output) as path:
            path.write_text(json.dumps(report, indent=2) + "\n")
    if not compiled.fits:
        raise errors.UserError(_too_large(compiled, slice_))
    return report


def _define(values: absl_flags.FlagValues) -> None:
    absl_flags.DEFINE_string(
        "topology", "v5e:2x4", "the slice: v4, v5e, v5p or v6e, and its sides", flag_values=values
    )
    absl_flags.DEFINE_bool("fit", False, "also find the largest batch size", flag_values=values)
    absl_flags.DEFINE_integer(
        "images", 0, "number of training images; 0: count them", lower_bound=0, flag_values=values
    )
    absl_flags.DEFINE_string("output", "", "a .json file for the report", flag_values=values)


def describe_passes(passes: Mapping[str, Sequence[int]]) -> str:
    """Formats the forward passes of a step per network; see `methods.plan`."""
    each = ", ".join(f"{name} on views {list(views)}" for name, views in passes.items())
    return f"{sum(map(len, passes.values()))} forward passes per image: {each}"


def _report(
    config: ConfigDict, slice_: topology.Slice, compiled: program.Program, images: int
) -> dict[str, Any]:
    """Returns the figures of a compiled step, in bytes, seconds and images."""
    chips = len(slice_.devices)
    report = {
        "topology": slice_.name,
        "chips": chips,
        "hosts": slice_.hosts,
        "batch_size": config.batch_size,
        "images": images,
        "fits": compiled.fits,
        "memory": {**compiled.parts, "limit": compiled.limit},
    }
    if not compiled.fits:
        return report
    times = estimate.times(compiled, slice_)
    per_chip = config.batch_size // chips
    rate = config.batch_size / times.step
    steps = config.total_steps or config.total_epochs * (images // config.batch_size)
    scaling = {}
    for count in SCALES:
        if count <= slice_.chip.largest:
            sides = estimate.shapes(slice_.chip, count)
            collectives = estimate.scaled(compiled.collectives, chips, count)
            scaling[count] = {
                "collective_bytes": sum(c.bytes for c in collectives.values()),
                "efficiency": estimate.efficiency(compiled, chips, slice_.chip, sides),
            }
    return report | {
        "flops_per_image": compiled.flops / per_chip,
        "bytes_per_image": compiled.traffic / per_chip,
        "cycles_per_image": compiled.cycles / per_chip,
        "floor_s": times.floor,
        "compute_s": times.compute,
        "collective_s": times.collectives,
        "step_s": times.step,
        "images_per_s_per_chip": rate / chips,
        "images_per_s_per_host": rate / slice_.hosts,
        "epochs_per_hour": 3600 * rate / images,
        "hours": steps * times.step / 3600,
        "collectives": {kind: dataclasses.asdict(c) for kind, c in compiled.collectives.items()},
        "scaling": scaling,
        "compile_s": compiled.compile_s,
    }


def _print(report: dict[str, Any]) -> None:
    batch = report["batch_size"] // report["chips"]
    print(
        f"{report['topology']}: {report['chips']} chips on {report['hosts']} hosts, "
        f"{report['batch_size']} images per step, {batch} per chip"
    )
    limit = report["memory"]["limit"]
    parts = {name: size for name, size in report["memory"].items() if name != "limit"}
    total = sum(parts.values())
    print(f"  memory per chip: {_mib(total)} of {_mib(limit)} ({100 * total / limit:.0f} %)")
    for part, size in parts.items():
        print(f"    {part:12} {_mib(size):>12}")
    if not report["fits"]:
        return
    print(
        f"  per image: {report['flops_per_image'] / 1e9:.2f} GFLOP, "
        f"{report['bytes_per_image'] / 2**20:.0f} MiB moved, "
        f"{report['cycles_per_image'] / 1e3:.0f} thousand cycles"
    )
    print(
        f"  per step: {1e3 * report['step_s']:.1f} ms = {1e3 * report['compute_s']:.1f} on the "
        f"chip + {1e3 * report['collective_s']:.2f} on the links; at least "
        f"{1e3 * report['floor_s']:.1f} by its FLOPs and memory traffic"
    )
    for kind, total in report["collectives"].items():
        print(f"    {kind:20} {total['count']:4}, together {_mib(total['bytes'])}")
    print(
        f"  {report['images_per_s_per_chip']:.0f} images/s per chip; each host must read "
        f"{report['images_per_s_per_host']:.0f} images/s"
    )
    print(
        f"  {report['epochs_per_hour']:.1f} epochs per hour; the run takes "
        f"{report['hours']:.1f} hours"
    )
    for chips, scaled in report["scaling"].items():
        print(
            f"    {chips:5} chips, {batch} images each: collectives move "
            f"{_mib(scaled['collective_bytes']):>11} per chip; efficiency at least "
            f"{100 * scaled['efficiency']:.0f} %"
        )
    print(f"  compiled in {report['compile_s']:.0f} s")


def _compile(config: ConfigDict, slice_: topology.Slice, images: int) -> program.Program:
    """Compiles the step of a run on `images` images."""
    from disco_jax.train.experiment import assemble

    steps_per_epoch = max(1, images // config.batch_size)
    return program.compile_step(assemble(config, steps_per_epoch=steps_per_epoch), slice_)


def _fit(config: ConfigDict, slice_: topology.Slice, images: int, compiled: program.Program) -> int:
    """Returns the largest global batch size whose step fits, or 0.

    Only powers of two per chip are tried, since the batch size must divide the queue sizes.
    """
    chips = len(slice_.devices)
    fixed = sum(
        size for part, size in compiled.parts.items() if part not in ("activations", "batch")
    )
    if fixed > compiled.limit:
        return 0
    queues = [spec.queue_size for spec in config.objectives.values() if _has_queue(spec)]
    most = min([math.gcd(*queues) // chips, images // chips] if queues else [images // chips])
    candidates = [2**i for i in range(max(most, 1).bit_length())]
    candidates = [n for n in candidates if all(size % (n * chips) == 0 for size in queues)]

    def fits(batch: int) -> bool:
        if batch * chips == config.batch_size:
            return compiled.fits
        trial = config.copy_and_resolve_references()
        trial.batch_size = batch * chips
        step = _compile(trial, slice_, images)
        print(f"    {batch} per chip: {_mib(step.bytes)} of {_mib(step.limit)}", flush=True)
        return step.fits

    return chips * estimate.largest(fits, candidates)


def _has_queue(spec: ConfigDict) -> bool:
    return bool(spec.weight) and "queue_size" in spec


def _too_large(compiled: program.Program, slice_: topology.Slice) -> str:
    """Returns the message for a step that does not fit: its largest parts, with remedies."""
    lines = [
        f"{part} takes {_mib(size)}; to reduce it: {_HELP.get(part, _SMALLER)}."
        for part, size in sorted(compiled.parts.items(), key=lambda item: -item[1])
        if size > compiled.limit / 10
    ]
    return (
        f"The step needs {_mib(compiled.bytes)} of memory per chip, but a chip of {slice_.name} "
        f"has {_mib(compiled.limit)}.\n  " + "\n  ".join(lines)
    )


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"
