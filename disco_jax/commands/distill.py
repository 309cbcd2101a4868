"""Distil a student from your images and a teacher, with settings derived from both."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags as absl_flags
from ml_collections import ConfigDict

from disco_jax import convert, errors, flags, models, typed
from disco_jax.configs import disco
from disco_jax.data import paths, pipeline
from disco_jax.data.contract import Source
from disco_jax.data.data_settings import DataSettings
from disco_jax.train import stored_settings
from disco_jax.train import teacher as teachers
from disco_jax.workflows import pretrain

# Fields of `config.data` that may be required to open a data set.
_OPENING = ("splits", "labels", "range")
# Images with smaller sides use the stem for small images.
SMALL_PX = 64


def main(argv: Sequence[str]) -> None:
    """Runs `disco-jax distill --data D --teacher T --student S --workdir W [--config.x=y]`."""
    from disco_jax import main as entry

    inputs = {name: _value(argv, name) or "" for name in ("data", "teacher", "student")}
    wants_help = {"-h", "--help"} & set(argv)
    missing = [f"--{name}" for name, value in inputs.items() if not value]
    if missing and not wants_help:
        raise errors.UserError(f"{', '.join(missing)} missing. See disco-jax distill --help.")
    # JAX must be set up before `resolve` counts the devices.
    flags.prepare_jax(flags.parse_distributed(argv), _value(argv, "workdir") or "")
    opening = {name: value for name in _OPENING if (value := _value(argv, f"config.data.{name}"))}
    config, source = (
        (disco.get_config(), None) if wants_help else resolve(**inputs, opening=opening)
    )
    opened = config.data.copy_and_resolve_references()
    values = flags.parse(
        "distill", argv, help_line=entry.TASKS["distill"].help, config=config, extra=_define
    )
    if values is not None:
        _train(values.config, values.workdir, source if values.config.data == opened else None)


def run(*, data: str, teacher: str, student: str, workdir: str, **changes: Any) -> dict[str, Any]:
    """Distils `student` from `teacher` on the images in `data`.

    Args:
      data: a folder of images or .tar archives, a pattern such as "photos/**/*.jpg", a list of
        files, a prepared TFDS data set's version folder, or an .npz file.
      teacher: the directory of a pretraining run or an import, or a PyTorch checkpoint.
      student: a backbone, e.g. "resnet18".
      workdir: the run's directory.
      changes: config fields to change, with `__` for dots: total_epochs=100,
        objectives__distill__weight=1.0.

    Returns:
      See `pretrain.run`.

    Raises:
      UserError: see `resolve` and `pretrain.run`.
    """
    fields = {k.replace("__", "."): v for k, v in changes.items()}
    opening = {name: fields[f"data.{name}"] for name in _OPENING if f"data.{name}" in fields}
    config, source = resolve(data=data, teacher=teacher, student=student, opening=opening)
    config.update_from_flattened_dict(fields)
    return _train(config, workdir, source)


def resolve(
    *, data: str, teacher: str, student: str, opening: Mapping[str, str] | None = None
) -> tuple[ConfigDict, Source]:
    """Returns the DisCo config for some images, a teacher and a student, and the opened images.

    Image size and normalisation come from the teacher. The batch has at most 256 images and at
    most an eighth of the data set; the queue has at most 65,536 entries and at most as many as
    there are images.

    Args:
      data, teacher, student: see `run`.
      opening: values of the `config.data` fields in `_OPENING`, if the data set needs them.

    Raises:
      UserError: the data or the teacher does not exist or has an unknown format.
    """
    models.find(student, "--student")
    config = disco.get_config()
    config.student.backbone = student
    config.data.update(paths.data_fields(data))
    config.data.update(opening or {})
    _follow_teacher(config, teacher)
    source = pipeline.open_source(typed.parse(DataSettings, config.data, "config.data"))
    _fit_data(config, source)
    return config, source


def _train(config: ConfigDict, workdir: str, source: Source | None) -> dict[str, Any]:
    print(f"Resolved config (change any field with --config.FIELD=VALUE):\n{_readable(config)}")
    return pretrain.run(config, workdir, source)


def _follow_teacher(config: ConfigDict, teacher: str) -> None:
    """Sets the teacher's network, image size and normalisation in `config`."""
    path = pathlib.Path(teacher).expanduser()
    if not path.exists():
        raise errors.UserError(
            f"--teacher={teacher} does not exist. Give the directory of a pretraining run or an "
            "import, or a PyTorch checkpoint (.pth, .pth.tar, .safetensors)."
        )
    config.teacher.weights = str(path)
    if teachers.place(str(path)).is_file():
        imported = convert.read_network(str(path))
        config.teacher.update(teachers.shape(teachers.spec_of(imported)))
        config.augment.mean, config.augment.std = imported.normalisation
    else:
        run = stored_settings.read(path)
        config.teacher.update(teachers.shape(run.student))
        for field in ("size", "mean", "std", "interpolation"):
            config.augment[field] = getattr(run.augment, field)
        config.data.eval_resize = run.data.eval_resize
    config.student.dim = config.teacher.dim
    config.student.stem = "small" if config.augment.size < SMALL_PX else "imagenet"


def _fit_data(config: ConfigDict, source: Source) -> None:
    """Sets the batch size, the queue size and the evaluation split from the data set."""
    held_out = [split for split in ("validation", "test") if split in source.splits]
    if held_out and config.data.eval_split not in source.splits:
        config.data.eval_split = held_out[0]
    count, devices = source.count(config.data.train_split), jax.device_count()
    batch = min(256, max(count // 8, 1)) // devices * devices or devices
    config.batch_size = batch
    queue = max(min(65_536, count) // batch, 1) * batch
    for fields in config.objectives.values():
        if "queue_size" in fields:
            fields.queue_size = queue


def _define(values: absl_flags.FlagValues) -> None:
    for name, text in (
        (
            "data",
            "a folder, pattern or list of images, a folder of .tar archives, a TFDS version "
            "folder, or an .npz file",
        ),
        ("teacher", "the directory of a run or an import, or a PyTorch checkpoint"),
        ("student", "a backbone; see disco-jax list"),
    ):
        absl_flags.DEFINE_string(name, None, text, flag_values=values)


def _value(argv: Sequence[str], name: str) -> str | None:
    """Returns the value of --name in `argv`, or None; used before the config exists."""
    words = list(argv)
    for i, word in enumerate(words):
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
        if word == f"--{name}" and i + 1 < len(words):
            return words[i + 1]
    return None


def _readable(config: ConfigDict) -> str:
    return config.to_json_best_effort(indent=2, sort_keys=True)
