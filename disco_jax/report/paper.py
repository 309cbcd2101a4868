"""Comparison of measured results with the papers': a printed value belongs to one experiment.

A run repeats a cell of a table (`rows.Row`) only if all settings that define the experiment are
equal, the teacher was pre-trained in the same way, and the evaluation follows the same protocol.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors, files
from disco_jax.configs import data as datasets
from disco_jax.nested import flatten
from disco_jax.report import rows
from disco_jax.report.rows import Row
from disco_jax.run import upgrades, workdir

# Fields about where and how a run computes, not about what it learns. Groups end in a dot.
HOW = (
    "name", "seed", "dtype", "data.source", "data.dir", "data.cache", "data.shuffle_buffer",
    "data.splits", "data.labels", "data.max_pixels", "data.max_unreadable",
    "data.max_unreadable_percent", "data.eval_split", "bags.file", "fast.", "health.", "log.",
    "monitor.", "checkpoint.", "teacher.weights", "teacher.cache", "teacher.prototypes",
)  # fmt: skip
# Fields of an evaluation that do not change its score.
EVALUATION_HOW = (
    "name", "report", "seed", "student", "log_every_epochs", "checkpoint_every_epochs",
    "evaluate_every_epochs", "extract_batch_size", "distill.teacher", "protocol",
    "information_plane.beside",
)  # fmt: skip
# Names of the number of training images in data.json, see `Source.fingerprint`.
_COUNTS = ("records", "pictures", "images")
# Values that differ in more settings are not shown at all.
MOST_DIFFERENCES = 3


@dataclasses.dataclass(frozen=True)
class Value:
    """Value of a paper beside a measured one.

    Attributes:
      row: the cell of the paper.
      differences: settings in which the measured experiment differs, e.g. "total_epochs: 100, paper
        200"; () if it is the same experiment.
      assumed: facts that nothing in the run proves, e.g. the teacher's number of epochs.
    """

    row: Row
    differences: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()

    @property
    def top1(self) -> float | None:
        """Printed top-1 in percent, or None."""
        return self.row.printed.get("top1")

    @property
    def top5(self) -> float | None:
        """Printed top-5 in percent, or None."""
        return self.row.printed.get("top5")

    @property
    def source(self) -> str:
        """Paper and table, with the assumptions."""
        return f"{self.row.source}{'; assumed: ' if self.assumed else ''}{', '.join(self.assumed)}"


def beside(
    config: Mapping[str, Any], result: Mapping[str, Any], data: Mapping[str, Any] | None = None
) -> Value | None:
    """Returns the printed value of the experiment that produced a result.

    The sweeps' tables, comparisons and the pages of runs call this function.

    Args:
      config: config of the pre-training, as nested dicts.
      result: content of a results file; "settings" are those of the evaluation.
      data: content of the run's data.json, if there is one.

    Returns:
      The value of the cell with the same settings; otherwise that of the same recipe and student
      which differs in the fewest settings, at most `MOST_DIFFERENCES`; None without one.
    """
    own = _Experiment.of(config, result.get("step"), data)
    if own is None:
        return None
    candidates = [own.compare(row) for row in _candidates(own)]
    candidates = [
        dataclasses.replace(value, differences=(*value.differences, *other))
        for value in candidates
        if (other := _evaluation_differences(value.row, result.get("settings"))) is not None
    ]
    return _best(candidates)


def against(
    row: Row,
    config: Mapping[str, Any],
    result: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
) -> Value:
    """Returns the value of one cell with all differences of a result; see `beside`."""
    own = _Experiment.of(config, result.get("step"), data)
    if own is None:
        return Value(row, ("the run is not a pre-training of this package",))
    value = own.compare(row)
    other = _evaluation_differences(row, result.get("settings"))
    if other is None:
        other = ("evaluation: of another kind, or its settings are not stored",)
    return dataclasses.replace(value, differences=(*value.differences, *other))


def unmeasured(config: Mapping[str, Any], data: Mapping[str, Any] | None = None) -> list[Value]:
    """Returns the printed values of a run's experiment, by every evaluation of the papers.

    Args:
      config: see `beside`.
      data: see `beside`.
    """
    own = _Experiment.of(config, None, data)
    if own is None:
        return []
    values: dict[str, list[Value]] = {}
    for row in _candidates(own):
        value = own.compare(row)
        if not value.differences and row.evaluation is not None:
            values.setdefault(row.evaluation.reference, []).append(value)
    best = [_best(group) for group in values.values()]
    return [value for value in best if value is not None and not value.differences]


@dataclasses.dataclass(frozen=True)
class _Experiment:
    """Experiment of a run: what it learned.

    Attributes:
      config: its config.
      fields: field -> value, of all fields that define it.
      step: of the evaluated checkpoint, or None.
      images: number of training images, or None.
    """

    config: ConfigDict
    fields: Mapping[str, Any]
    step: int | None
    images: int | None

    @classmethod
    def of(
        cls, config: Mapping[str, Any], step: int | None, data: Mapping[str, Any] | None
    ) -> "_Experiment | None":
        """Returns the experiment of a config; None if it is not that of a pre-training."""
        if "student" not in config or "objectives" not in config or "data" not in config:
            return None
        complete = upgrades.complete(ConfigDict(json.loads(json.dumps(dict(config)))))
        try:
            fields = defining(complete)
        except errors.UserError:  # a network or an objective that is not installed here
            return None
        images = next((data[name] for name in _COUNTS if name in data), None) if data else None
        return cls(complete, fields, step, images)

    def compare(self, row: Row) -> Value:
        """Returns the value of a cell with the differences of the training."""
        expected = _expected(row.id)
        differences = [
            f"{name}: {_shown(self.fields, name)}, paper {_shown(expected, name)}"
            for name in sorted(self.fields.keys() | expected.keys())
            if self.fields.get(name) != expected.get(name)
        ]
        differences += self._unfinished()
        distils = row.evaluation is not None and row.evaluation.task == "finetune"
        assumed = ("classes of a linear probe of the paper's teacher",) if distils else ()
        if row.teacher is None:
            return Value(row, tuple(differences), assumed)
        proof = _teacher_differences(self.config.teacher.weights, row)
        return Value(row, (*differences, *proof.differences), (*proof.assumed, *assumed))

    def _unfinished(self) -> list[str]:
        """Returns what the steps and the images of the run lack."""
        images = rows.IMAGES.get(self.config.data.name)
        if self.images is None or images is None:
            return []
        if self.images != images:
            return [f"images: {self.images}, paper {images}"]
        total = self.config.total_epochs * (images // self.config.batch_size)
        unfinished = self.step is not None and self.step < (self.config.total_steps or total)
        return [f"step: {self.step}, of {total}"] if unfinished else []


def _best(values: Sequence[Value]) -> Value | None:
    """Returns the value with the fewest differences; among equal ones that with the most proof."""
    shown = [value for value in values if len(value.differences) <= MOST_DIFFERENCES]
    if not shown:
        return None
    first = min(shown, key=lambda v: (len(v.differences), len(v.assumed), -len(v.row.printed)))
    if first.differences or not first.assumed:
        return first
    rivals = {
        value.row.teacher.about: value.top1
        for value in shown
        if not value.differences and value.top1 is not None and value.row.teacher
    }
    if len(set(rivals.values())) < 2 or len(rivals) < 2:
        return first
    unknown = (f"teacher: its pre-training is unknown; the papers have {', or '.join(rivals)}",)
    return dataclasses.replace(first, differences=unknown)


def defining(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields that define what a config learns, as values of JSON.

    Fields of networks and objectives that take no part are left out, and equal settings get equal
    values: 0, "" and -1 become the number or name that they stand for.

    Raises:
      UserError: a network or an objective is unknown.
    """
    from disco_jax import methods, typed  # reports of other runs do without networks
    from disco_jax.train.run_settings import RunSettings

    settings = typed.parse(RunSettings, config, stored=True)
    plan = methods.plan(settings.method)
    active = {name for name, section in config.objectives.items() if section.weight}
    idle = [f"{network}." for network in ("momentum", "teacher") if network not in plan]
    idle += [f"objectives.{name}." for name in config.objectives if name not in active]
    if not config.local.count:
        idle.append("local.")
    fields = {
        name: value
        for name, value in flatten(json.loads(json.dumps(dataclasses.asdict(settings)))).items()
        if name not in HOW and not name.startswith((*_groups(HOW), *idle))
    }
    for network in ("student", "teacher"):
        if f"{network}.backbone" in fields:
            fields |= _network(network, getattr(settings, network), fields)
            fields = {name: value for name, value in fields.items() if value is not _ABSENT}
    if "head" in config.student.reuse:  # its shape is the teacher's
        for name in ("head", "hidden", "layers", "dim", "adapter"):
            fields.pop(f"student.{name}")
    return fields


_ABSENT = object()


def _network(network: str, spec: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a network with defaults replaced; `_ABSENT` where it has no such field.

    Args:
      network: student or teacher.
      spec: its section of the config.
      fields: the flat config.
    """
    from disco_jax import models
    from disco_jax.models import heads

    options, backbone = models.options(spec.backbone), models.build_encoder(spec).backbone
    resolved: dict[str, Any] = {
        name: getattr(backbone, name) if name in options else _ABSENT
        for name in ("width", "stem", "grid", "patch", "zero_init_residual", "drop_path")
    }
    if spec.hidden == -1:
        resolved["hidden"] = models.width(spec)
    if spec.layers == heads.VARIANTS.get(spec.head, {}).get("layers", 2):
        resolved["layers"] = 0
    if network == "teacher":  # frozen, without stochastic depth
        resolved |= {"zero_init_residual": _ABSENT, "drop_path": _ABSENT}
    names = {f"{network}.{name}": value for name, value in resolved.items()}
    return {name: value for name, value in names.items() if name in fields}


def _groups(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name.endswith("."))


@functools.cache
def _expected(name: str) -> Mapping[str, Any]:
    """Returns the fields that define the cell with an id, with its teacher's network."""
    from disco_jax.train import experiment
    from disco_jax.train import teacher as teachers

    row = rows.rows()[name]
    config = row.config()
    if row.teacher is not None:
        own = row.teacher.config()
        config.teacher.update(teachers.shape(own.student), network=row.teacher.network)
        config.teacher.update(mean=tuple(own.augment.mean), std=tuple(own.augment.std))
    return defining(experiment.resolve(config))


def _shown(fields: Mapping[str, Any], name: str) -> str:
    return errors.shown(fields[name]) if name in fields else "absent"


def _candidates(own: _Experiment) -> list[Row]:
    """Returns the cells that train the same student under a teacher with the same backbone."""
    student, teacher = own.fields["student.backbone"], own.fields.get("teacher.backbone")
    return [
        row
        for row in rows.rows().values()
        if row.state == rows.RUNS and row.arguments.get("student") == student
        if (row.teacher.backbone if row.teacher else None) == teacher
    ]


@dataclasses.dataclass(frozen=True)
class _Proof:
    """Outcome of the comparison of a run's teacher with a paper's."""

    differences: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()


def _teacher_differences(weights: str, row: Row) -> _Proof:
    """Compares the weights of a run's teacher with the teacher of a cell."""
    from disco_jax.train import teacher as teachers

    expected = row.teacher
    assert expected is not None
    if weights in ("", teachers.RANDOM):
        own_weights = "random weights" if weights else "no weights"
        return _Proof((f"teacher: {own_weights}, paper {expected.about}",))
    config = _read_config(weights)
    if config is not None and expected.recipe:
        own, paper = defining(config), defining(expected.config())
        return _Proof(
            tuple(
                f"teacher's {name}: {_shown(own, name)}, paper {_shown(paper, name)}"
                for name in sorted(own.keys() | paper.keys())
                if own.get(name) != paper.get(name)
            )
        )
    file = _file_of(weights)
    if file and file == expected.file:
        return _Proof()
    if config is not None or file in _published():
        return _Proof((f"teacher: {file or weights}, paper {expected.about}",))
    return _Proof(assumed=(f"a teacher by {expected.about}",))


def _read_config(weights: str) -> ConfigDict | None:
    """Returns the config of the run that trained a teacher; None for a file, or an import."""
    from disco_jax.convert.manifest import MANIFEST

    path = epath.Path(weights)
    try:
        if not (path / workdir.CONFIG).exists() or (path / MANIFEST).exists():
            return None
        config = workdir.read_config(weights)
        defining(config)
    except (errors.UserError, OSError, AttributeError):
        return None
    return config


def _file_of(weights: str) -> str:
    """Returns the name of the file with a teacher's weights, also of an imported one."""
    from disco_jax.convert.manifest import MANIFEST

    path = epath.Path(weights)
    try:
        if (path / MANIFEST).exists():
            return epath.Path(files.read_json(path / MANIFEST)["file"]).name
    except (errors.UserError, OSError):
        return ""
    return path.name


@functools.cache
def _published() -> frozenset[str]:
    """Returns the names of the published files of all teachers."""
    return frozenset(
        row.teacher.file for row in rows.rows().values() if row.teacher and row.teacher.file
    )


# Fields that separate kinds of evaluations, e.g. few labels from all of them.
_TASK_FIELDS = (
    "data.name", "labelled.listed", "layers", "distill.weight", "vote", "held_out.per_class",
)  # fmt: skip


def _evaluation_differences(row: Row, settings: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """Returns how an evaluation differs from a cell's protocol; None if it is of another kind.

    Args:
      row: the cell.
      settings: config of the evaluation; None if its results do not hold it.
    """
    if row.evaluation is None or settings is None:
        return None
    paper, own = evaluation_fields(row.evaluation.config(), paper=True), evaluation_fields(settings)
    same_task = paper.keys() == own.keys() and all(
        paper.get(name) == own.get(name) for name in _TASK_FIELDS
    )
    if not same_task:
        return None
    return tuple(
        f"evaluation's {name}: {_shown(own, name)}, paper {_shown(paper, name)}"
        for name in sorted(paper)
        if paper[name] != own[name]
    )


def evaluation_fields(config: Any, paper: bool = False) -> dict[str, Any]:
    """Returns the fields of an evaluation that change its score, as values of JSON.

    Args:
      config: config of the evaluation.
      paper: whether the paper ran it, on its own list of labelled images if it has few of them.
    """
    fields = flatten(json.loads(ConfigDict(config).to_json_best_effort()))
    fields = {name: value for name, value in fields.items() if name not in EVALUATION_HOW}
    if fields.get("data.name"):  # where the data set is, does not matter
        fields |= {"data.dir": "", "data.source": ""}
    if fields.get("labelled.listed"):  # the list may be a file or a data set of TFDS
        drawn = fields.pop("labelled.percent") or fields.pop("labelled.per_class", 0)
        fields["labelled images"] = "drawn" if drawn and not paper else "the papers' list"
        for name in ("labelled.seed", "labelled.per_class", "data.subset"):
            fields.pop(name, None)
        if datasets.is_part(fields["data.name"]):
            fields["data.name"] = ""
    return fields
