"""Compile a config's step for a TPU slice that is not there: memory, speed, hours."""

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

# Images to train on, where the data need not be at hand.
IMAGES = {"imagenet2012": 1_281_167}
SCALES = (8, 16, 32, 64, 128, 256, 512, 1024)
_HELP = {
    "activations": "fewer images a chip (a smaller config.batch_size or more chips; --fit finds "
    "how many), shorter queues",
    "queues": "--config.fast.shard_queue, or a smaller config.objectives.*.queue_size",
    "teacher": "a smaller config.teacher.backbone, or chips with more memory",
    "batch": "fewer images a chip: a smaller config.batch_size or more chips",
}
_SMALLER = "a smaller config.student.backbone, or chips with more memory"


def main(argv: Sequence[str]) -> None:
    """`disco-jax plan --config RECIPE --topology v5e:4x4 [--fit] [--images N] [--output FILE]`."""
    values = flags.parse("plan", argv, help_line=__doc__, extra=_define, needs_workdir=False)
    if values is None:
        return
    import jax

    jax.config.update("jax_platforms", "cpu")  # compiled for TPUs, but not on one
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
    """Prints, saves and returns what a run of `config` would need and do on a slice.

    Args:
      config: of a pretraining run.
      name: of the slice, e.g. "v5e:4x4".
      fit: also find the largest batch, a compilation for each that is tried.
      images: to train on; 0: counted where the data are, known for ImageNet.
      output: a .json file for what is returned.

    Raises:
      UserError: a setting will not do, or the step does not fit into the memory.
    """
    from disco_jax import methods
    from disco_jax.data import pipeline
    from disco_jax.tasks import prepare
    from disco_jax.train import teacher

    if output and not output.endswith(".json"):
        raise errors.UserError(f"--output={output} should end in .json.")
    config = teacher.resolve(config)
    program.as_on_tpus(config)
    where = topology.open_slice(name)
    prepare.check_devices(config, len(where.devices))
    data = config.data
    images = images or (IMAGES.get(data.name, 0) if data.source == "tfds" else 0)
    images = images or pipeline.open_source(data).count(data.train_split)
    made = program.compile_step(config, where, max(1, images // config.batch_size))
    report = _report(config, where, made, images)
    report["forward_passes"] = methods.plan(config)
    print(told(report["forward_passes"]))
    _print(report)
    if fit:
        report["largest_batch_size"] = _fit(config, where, images, made)
        print(f"  largest config.batch_size that fits: {report['largest_batch_size']}")
    if output:
        with whole(output) as path:
            path.write_text(json.dumps(report, indent=2) + "\n")
    if not made.fits:
        raise errors.UserError(_too_large(made, where))
    return report


def _define(values: absl_flags.FlagValues) -> None:
    absl_flags.DEFINE_string(
        "topology", "v5e:2x4", "the slice: v4, v5e, v5p or v6e, and its sides", flag_values=values
    )
    absl_flags.DEFINE_bool("fit", False, "also find the largest batch", flag_values=values)
    absl_flags.DEFINE_integer(
        "images", 0, "images to train on; 0: count them", lower_bound=0, flag_values=values
    )
    absl_flags.DEFINE_string("output", "", "a .json file for the figures", flag_values=values)


def told(passes: Mapping[str, Sequence[int]]) -> str:
    """The forward passes of a step, network by network; see `methods.plan`."""
    each = ", ".join(f"{name} on views {list(views)}" for name, views in passes.items())
    return f"{sum(map(len, passes.values()))} forward passes an image: {each}"


def _report(
    config: ConfigDict, where: topology.Slice, made: program.Program, images: int
) -> dict[str, Any]:
    """The figures, in bytes, seconds and images."""
    chips = len(where.devices)
    report = {
        "topology": where.name,
        "chips": chips,
        "hosts": where.hosts,
        "batch_size": config.batch_size,
        "images": images,
        "fits": made.fits,
        "memory": {**made.parts, "limit": made.limit},
    }
    if not made.fits:
        return report
    took = estimate.times(made, where)
    per_chip = config.batch_size // chips
    rate = config.batch_size / took.step
    steps = config.total_steps or config.total_epochs * (images // config.batch_size)
    scaling = {}
    for count in SCALES:
        if count <= where.chip.largest:
            sides = estimate.shapes(where.chip, count)
            moved = estimate.scaled(made.collectives, chips, count)
            scaling[count] = {
                "collective_bytes": sum(c.bytes for c in moved.values()),
                "efficiency": estimate.efficiency(made, chips, where.chip, sides),
            }
    return report | {
        "flops_per_image": made.flops / per_chip,
        "bytes_per_image": made.traffic / per_chip,
        "cycles_per_image": made.cycles / per_chip,
        "floor_s": took.floor,
        "compute_s": took.compute,
        "collective_s": took.collectives,
        "step_s": took.step,
        "images_per_s_per_chip": rate / chips,
        "images_per_s_per_host": rate / where.hosts,
        "epochs_per_hour": 3600 * rate / images,
        "hours": steps * took.step / 3600,
        "collectives": {kind: dataclasses.asdict(c) for kind, c in made.collectives.items()},
        "scaling": scaling,
        "compile_s": made.compile_s,
    }


def _print(report: dict[str, Any]) -> None:
    batch = report["batch_size"] // report["chips"]
    print(
        f"{report['topology']}: {report['chips']} chips on {report['hosts']} hosts, "
        f"{report['batch_size']} images a step, {batch} a chip"
    )
    limit = report["memory"]["limit"]
    parts = {name: size for name, size in report["memory"].items() if name != "limit"}
    total = sum(parts.values())
    print(f"  memory of a chip: {_mib(total)} of {_mib(limit)} ({100 * total / limit:.0f} %)")
    for part, size in parts.items():
        print(f"    {part:12} {_mib(size):>12}")
    if not report["fits"]:
        return
    print(
        f"  an image: {report['flops_per_image'] / 1e9:.2f} GFLOP, "
        f"{report['bytes_per_image'] / 2**20:.0f} MiB moved, "
        f"{report['cycles_per_image'] / 1e3:.0f} thousand cycles"
    )
    print(
        f"  a step: {1e3 * report['step_s']:.1f} ms = {1e3 * report['compute_s']:.1f} on the chip "
        f"+ {1e3 * report['collective_s']:.2f} on the links; not below "
        f"{1e3 * report['floor_s']:.1f} by its FLOPs and memory"
    )
    for kind, found in report["collectives"].items():
        print(f"    {kind:20} {found['count']:4}, together {_mib(found['bytes'])}")
    print(
        f"  {report['images_per_s_per_chip']:.0f} images/s a chip; each host must read "
        f"{report['images_per_s_per_host']:.0f} images/s"
    )
    print(
        f"  {report['epochs_per_hour']:.1f} epochs an hour; the run takes "
        f"{report['hours']:.1f} hours"
    )
    for chips, found in report["scaling"].items():
        print(
            f"    {chips:5} chips, {batch} images each: collectives make "
            f"{_mib(found['collective_bytes']):>11} a chip; efficiency at least "
            f"{100 * found['efficiency']:.0f} %"
        )
    print(f"  compiled in {report['compile_s']:.0f} s")


def _fit(config: ConfigDict, where: topology.Slice, images: int, made: program.Program) -> int:
    """The largest global batch whose step fits; a power of two a chip, which queues need."""
    chips = len(where.devices)
    held = sum(size for part, size in made.parts.items() if part not in ("activations", "batch"))
    if held > made.limit:
        return 0
    queues = [spec.queue_size for spec in config.objectives.values() if _has_queue(spec)]
    most = min([math.gcd(*queues) // chips, images // chips] if queues else [images // chips])
    candidates = [2**i for i in range(max(most, 1).bit_length())]
    candidates = [n for n in candidates if all(size % (n * chips) == 0 for size in queues)]

    def fits(batch: int) -> bool:
        if batch * chips == config.batch_size:
            return made.fits
        tried = config.copy_and_resolve_references()
        tried.batch_size = batch * chips
        found = program.compile_step(tried, where, max(1, images // tried.batch_size))
        print(f"    {batch} a chip: {_mib(found.bytes)} of {_mib(found.limit)}", flush=True)
        return found.fits

    return chips * estimate.largest(fits, candidates)


def _has_queue(spec: ConfigDict) -> bool:
    return bool(spec.weight) and "queue_size" in spec


def _too_large(made: program.Program, where: topology.Slice) -> str:
    """What takes the memory, largest first, and what would make it smaller."""
    lines = [
        f"{part} takes {_mib(size)}; what would help: {_HELP.get(part, _SMALLER)}."
        for part, size in sorted(made.parts.items(), key=lambda item: -item[1])
        if size > made.limit / 10
    ]
    return (
        f"The step needs {_mib(made.bytes)} of a chip's memory, and one of {where.name} has "
        f"{_mib(made.limit)}.\n  " + "\n  ".join(lines)
    )


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"
