"""Settings of evaluations of a run: the fields of their configs, with defaults and meanings."""

import dataclasses
from typing import Any

from disco_jax import typed
from disco_jax.train.optimizer import OptimizerSettings, RateSettings


@dataclasses.dataclass(frozen=True)
class EvalDataSettings:
    """Images of an evaluation, the section `config.data`.

    Attributes:
      source: tfds | folder | npz
      name: another data set of TFDS
      dir: another data set: a folder or .npz
      train_split: split to train on
      eval_split: split to test on
      subset: a text file with one file name a line: training reads only these images
      splits: as in a run; "" for another data set: the names of the folders decide
      labels: as in a run; "" for another data set: none
      range: as in a run; "" for another data set: full
      size: px
      eval_resize: shorter side in px before the centre crop; 0: resize straight to `size`
      interpolation: filter of crops and of the resize in evaluations: bilinear | bicubic
      eval_interpolation: filter of the resize in evaluations; "": the same
    """

    source: str = ""
    name: str = ""
    dir: str = ""
    train_split: str = ""
    eval_split: str = ""
    subset: str = ""
    splits: str = ""
    labels: str = ""
    range: str = ""
    size: int = 0
    eval_resize: int = -1
    interpolation: str = ""
    eval_interpolation: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Settings that all evaluations of a run share.

    Attributes:
      name: stem of the result files in the run's directory
      report: rewrite the run's report.html
      network: student | momentum
      output: features | embedding | hidden (input of the head's last layer)
      blocks: ViTs: concatenate the class tokens of this many last blocks
      batch_size: images that are encoded at once, or of a training step
      data: "", 0 and -1: as in the run. Another data set: name (TFDS), or dir (folder or .npz).
    """

    name: str = ""
    report: bool = True
    network: str = "student"
    output: str = "features"
    blocks: int = 1
    batch_size: int = 256
    data: EvalDataSettings


@dataclasses.dataclass(frozen=True)
class LabelledSettings:
    """Labelled images of a training, the section `config.labelled`.

    Attributes:
      percent: share of the images of each class in percent; 0: see `per_class`
      per_class: images of each class; 0: all images, unless `percent` is set
      seed: seed of the draw
      listed: length of the papers' list, which `data.subset` must have on ImageNet; 0: any
    """

    percent: float = 0.0
    per_class: int = 0
    seed: int = 0
    listed: int = 0


@dataclasses.dataclass(frozen=True)
class HeldOutSettings:
    """Training images to test on, the section `config.held_out`.

    Attributes:
      per_class: images of each class; 0: off
      seed: seed of the draw
    """

    per_class: int = 0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class GridSettings:
    """Search of learning rates and weight decays, the section `config.grid`.

    Attributes:
      rates: learning rates for a batch of 256, in place of `learning_rate.base_lr`; (): no search
      weight_decays: weight decays, in place of `optimizer.weight_decay`
      held_out_percent: share of the training images of each class that select, in percent
      folds: parts of a cross-validation; 0: one held-out part
    """

    rates: tuple[float, ...] = ()
    weight_decays: tuple[float, ...] = ()
    held_out_percent: float = 10.0
    folds: int = 0


@dataclasses.dataclass(frozen=True)
class DistillSettings:
    """Distillation of a teacher's classes, the section `config.distill`.

    Attributes:
      weight: share of its loss, in the range 0..1; the rest is that of the labels
      teacher: RUN/NAME of a linear probe or a fine-tuning
      temperature: of both softmaxes, > 0
      reduction: of the divergence over classes: element (divided by their number) | batch
    """

    weight: float = 0.0
    teacher: str = ""
    temperature: float = 2.0
    reduction: str = "element"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeSettings(EvaluationSettings):
    """Settings of a training with labels: linear probes and fine-tuning.

    Attributes:
      protocol: recipe and protocol, e.g. "linear:disco"; a label in the results
      student: the backbone that the config is made for; "": any
      seed: seed of the classifier, the order of images and their crops
      total_epochs: length of the training in epochs
      layers: classifier | all
      norm: BatchNorm statistics of the network: running | sync | local
      augment: linear (random crops and flips) | flip | none
      normalise: scale each row to length 1, then standardise each dimension by its mean and
        deviation
      init: normal: N(0, 0.01), bias 0 | torch: U(+-1/sqrt(fan_in))
      labelled: A class-balanced part of the training split, in percent or images a class; 0: all
        images.
      held_out: Tests on that many training images of each class instead of the test images, and
        does not train on them: the images on which SSLight chooses its settings; 0: off.
      optimizer: the optimizer
      head_rate: learning rate of the classifier divided by that of the network
      learning_rate: the learning rate; base_lr=0: the `probe_rate` of the student's family
      grid: Searches a grid of rates and weight decays instead, trained side by side on frozen
        features. The best one on a held-out part of the training images is tested; with `folds`,
        the best mean of a cross-validation with so many parts.
      distill: Distils a teacher's classes beside the labels.
      log_every_epochs: epochs between two log lines
      evaluate_every_epochs: on the test images; 0: once at the end
      checkpoint_every_epochs: only trainings that read images have checkpoints
      extract_batch_size: images that a host encodes at once
    """

    protocol: str = ""
    student: str = ""
    seed: int = 0
    total_epochs: int = 100
    layers: str = "classifier"
    norm: str = "running"
    augment: str = "linear"
    normalise: bool = False
    init: str = "normal"
    labelled: LabelledSettings
    held_out: HeldOutSettings
    optimizer: OptimizerSettings
    head_rate: float = 1.0
    learning_rate: RateSettings
    grid: GridSettings
    distill: DistillSettings
    log_every_epochs: int = 10
    evaluate_every_epochs: int = 0
    checkpoint_every_epochs: int = 1
    extract_batch_size: int = 256

    def with_rate(self, base_lr: float) -> "ProbeSettings":
        """Returns the settings with another learning rate for a batch of 256."""
        rate = dataclasses.replace(self.learning_rate, base_lr=base_lr)
        return dataclasses.replace(self, learning_rate=rate)

    def with_weight_decay(self, weight_decay: float) -> "ProbeSettings":
        """Returns the settings with another weight decay."""
        optimizer = dataclasses.replace(self.optimizer, weight_decay=weight_decay)
        return dataclasses.replace(self, optimizer=optimizer)


@dataclasses.dataclass(frozen=True)
class InformationPlaneSettings:
    """Estimates of mutual information, the section `config.information_plane`.

    Attributes:
      split: the split whose images are used; "": the test images
      images: largest number of images; 0: all
      points: estimates during the training; 0: one at the end of each epoch
      first_steps: also estimates after each step of the first epoch
      bins: bins of each probability
      grouping: rows | official (reproduces an error in the estimator's code)
      beside: directories of runs that have a plane already
    """

    split: str = ""
    images: int = 0
    points: int = 40
    first_steps: bool = False
    bins: int = 30
    grouping: str = "rows"
    beside: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaneSettings(ProbeSettings):
    """Settings of a training whose path in the information plane is recorded.

    Attributes:
      information_plane: the estimates
    """

    information_plane: InformationPlaneSettings


def eval_data(section: Any) -> EvalDataSettings:
    """Returns the images of an evaluation, from the section `config.data`."""
    return typed.parse(EvalDataSettings, section, "config.data", defaults=True)
