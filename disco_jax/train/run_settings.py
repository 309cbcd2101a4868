"""All settings of a pretraining run: the fields of its config, their defaults and meanings."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from disco_jax.data.data_settings import AugmentSettings, BagSettings, DataSettings, LocalSettings
from disco_jax.methods.method_settings import (
    MethodSettings,
    MomentumSettings,
    StudentSpec,
    TeacherSpec,
)
from disco_jax.models.layers.settings import FastSettings
from disco_jax.train.optimizer import OptimizerSettings, RateSettings


@dataclasses.dataclass(frozen=True)
class HealthSettings:
    """Detection of collapse, the section `config.health`.

    Attributes:
      min_std: the embedding is collapsed if health/std is below it; 0: never
      patience: consecutive log lines below `min_std` that count as a collapse; more than 1, because
        networks start nearly collapsed
      stop: whether a collapse ends the run instead of being logged as a warning
    """

    min_std: float = 0.01
    patience: int = 10
    stop: bool = False


@dataclasses.dataclass(frozen=True)
class LogSettings:
    """Logs and reports of a run, the section `config.log`.

    Attributes:
      every_steps: steps between two log lines
      tensorboard: for the run and its evaluations; in a bucket only with TFDS data
      report: write the contact sheet of views at the start and report.html at the end
      replicas_every_steps: interval at which replicas are compared bit by bit; 0: never
      hang_s: seconds without a step after which the process ends; includes compilation, evaluation
        and saving; 0: never
    """

    every_steps: int = 50
    tensorboard: bool = True
    report: bool = True
    replicas_every_steps: int = 0
    hang_s: float = 1800.0


@dataclasses.dataclass(frozen=True)
class MonitorSettings:
    """kNN accuracy during training, the section `config.monitor`.

    Attributes:
      knn_every_steps: steps between two evaluations; 0: never
      split: "": data.eval_split
      images: sampled evenly over the classes; 0: all
      k: number of neighbours
    """

    knn_every_steps: int = 0
    split: str = ""
    images: int = 5000
    k: int = 20


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
    """Checkpoints of a run, the section `config.checkpoint`.

    Attributes:
      every_steps: steps between two checkpoints
      keep: newest checkpoints that are kept
      best_metric: also keeps the checkpoint with the lowest value of it; "": none
    """

    every_steps: int = 1000
    keep: int = 3
    best_metric: str = "loss"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings:
    """All settings of a pretraining run.

    Attributes:
      name: the recipe, as tables and figures show it
      seed: seed of weights, images and views
      batch_size: images a step over all devices of all hosts
      total_epochs: length of the run in epochs
      total_steps: length of the run in steps; 0: total_epochs decides
      dtype: compute dtype: float32 | bfloat16 | auto (float32 on CPUs only)
      data: images of the run
      views: global crops of an image; objectives number them from 0
      augment: crop and photometric operations of the global views
      local: Additional smaller crops, numbered after the global ones. Fields that `local` does not
        have are those of `augment`.
      group_views: true: views of one size go through a network in one pass and share batch
        statistics (SwAV, DINO, SSLight); false: one pass a view (MoCo, DisCo, SEED).
      bags: Groups of similar images from `disco-jax bags`.
      student: the trained network; dim=0: as wide as the teacher output it is compared with
      momentum: the EMA copy of the student
      teacher: the frozen network
      objectives: Terms of the loss: objective -> fields of its section; see `methods/registry.py`.
      fast: Speed: these options change what is learned only by rounding.
      optimizer: the optimizer
      learning_rate: the learning rate
      health: Detects collapse: health/std below min_std in `patience` consecutive log lines.
        min_std=0 disables it; stop=true ends the run.
      log: logs and reports
      monitor: kNN accuracy during training, logged as knn/top1: classifies each image of a labelled
        split by the student's features of the others. Each time costs a forward pass over `images`.
      checkpoint: checkpoints
    """

    name: str = ""
    seed: int = 0
    batch_size: int = 256
    total_epochs: int = 200
    total_steps: int = 0
    dtype: str = "auto"
    data: DataSettings
    views: int = 2
    augment: AugmentSettings
    local: LocalSettings
    group_views: bool = False
    bags: BagSettings
    student: StudentSpec
    momentum: MomentumSettings
    teacher: TeacherSpec
    objectives: Mapping[str, Mapping[str, Any]]
    fast: FastSettings
    optimizer: OptimizerSettings
    learning_rate: RateSettings
    health: HealthSettings
    log: LogSettings
    monitor: MonitorSettings
    checkpoint: CheckpointSettings

    @property
    def method(self) -> MethodSettings:
        """The settings that `methods.build` reads."""
        return MethodSettings(
            batch_size=self.batch_size,
            dtype=self.dtype,
            views=self.views,
            local_views=self.local.count,
            group_views=self.group_views,
            has_bags=bool(self.bags.file),
            normalization=self.augment.normalization,
            student=self.student,
            momentum=self.momentum,
            teacher=self.teacher,
            objectives=self.objectives,
            fast=self.fast,
        )

    def total(self, steps_per_epoch: int) -> int:
        """Returns the number of steps of the run."""
        return self.total_steps or self.total_epochs * steps_per_epoch
