"""Settings of a method: its networks, views, objectives and how queues are stored."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from disco_jax.models.layers.settings import FastSettings
from disco_jax.models.network_spec import NetworkSpec


@dataclasses.dataclass(frozen=True)
class StudentSpec(NetworkSpec):
    """The trained network, the section `config.student`.

    Attributes:
      norm: BatchNorm statistics: local | sync | shuffle | running
      reuse: ("head",): a frozen copy of the teacher's head behind a learned adapter
      weights: Initial weights of the student and its EMA copy: the directory of a run or of an
        import, or a PyTorch checkpoint; "": random. A resumed run does not read them again.
      start: the part of `weights` that is loaded: backbone | all (with the head)
      network: the network of a run that is loaded: student | momentum
    """

    norm: str = "local"
    reuse: tuple[str, ...] = ()
    weights: str = ""
    start: str = "backbone"
    network: str = "student"


@dataclasses.dataclass(frozen=True)
class MomentumSettings:
    """The EMA copy of the student, the section `config.momentum`.

    Attributes:
      ema_rate: weight of the old parameters in each EMA update
      ema_rate_end: the rate at the end of the run, along half a cosine; -1: constant
      follow: time of the EMA update: before the momentum network encodes | after the optimizer's
        step
      norm: BatchNorm statistics: local | sync | shuffle | running
    """

    ema_rate: float = 0.999
    ema_rate_end: float = -1.0
    follow: str = "before"
    norm: str = "shuffle"


@dataclasses.dataclass(frozen=True)
class TeacherSpec(NetworkSpec):
    """The frozen network, the section `config.teacher`.

    Attributes:
      norm: BatchNorm statistics: local | sync | shuffle | running
      head: auto: every field but the backbone's name comes from the weights
      weights: The directory of a run or of an import, or a PyTorch checkpoint; random: untrained.
      network: the network of a run that teaches: student | momentum
      mean: normalisation of its images; (): as stored with the weights, else augment.mean
      std: as mean
      cache: a folder of `disco-jax cache` with its outputs, which replace its forward pass
    """

    norm: str = "local"
    head: str = "auto"
    weights: str = ""
    network: str = "student"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    cache: str = ""


@dataclasses.dataclass(frozen=True)
class MethodSettings:
    """Settings of a run from which `methods.build` makes its method.

    Attributes:
      batch_size: images per step over all devices.
      dtype: compute dtype: "float32", "bfloat16" or "auto".
      views: number of global views, numbered from 0.
      local_views: number of local views, numbered after the global ones.
      group_views: whether views of one size go through a network in one pass.
      has_bags: whether the data provide bags of similar images.
      normalization: per-channel mean and standard deviation by which the recipe normalizes images.
      student: the student, and the momentum network except for its statistics.
      momentum: the momentum network.
      teacher: the teacher.
      objectives: name -> fields of its section; see `registry.build`.
      fast: how networks and losses are computed.
    """

    batch_size: int
    dtype: str
    views: int
    local_views: int
    group_views: bool
    has_bags: bool
    normalization: tuple[tuple[float, ...], tuple[float, ...]]
    student: StudentSpec
    momentum: MomentumSettings
    teacher: TeacherSpec
    objectives: Mapping[str, Mapping[str, Any]]
    fast: FastSettings
