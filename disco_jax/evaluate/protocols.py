"""Choice of an evaluation's protocol and settings by the run that it evaluates."""

import logging

from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors, flags
from disco_jax.configs import data, linear, probes
from disco_jax.evaluate.features import TrainedModel
from disco_jax.run import workdir
from disco_jax.train import stored_settings
from disco_jax.train.run_settings import RunSettings

_LOG = logging.getLogger(__name__)

# Recipes whose argument `student` selects settings of a backbone.
_BY_STUDENT = ("linear", "semi", "finetune")


def choose(reference: str, run: str) -> str:
    """Completes the reference of an evaluation's recipe by the run that it evaluates.

    Args:
      reference: the value of --config; see `complete`.
      run: directory of the run; if there is none, the task reports it.
    """
    if flags.shipped_name(reference) not in _BY_STUDENT:
        return reference
    if not (epath.Path(run) / workdir.CONFIG).exists():
        return reference
    completed = complete(reference, stored_settings.read(run))
    if completed != reference:
        _LOG.info("Protocol by the run's config: --config=%s", completed)
    return completed


def complete(reference: str, settings: RunSettings) -> str:
    """Completes the reference of an evaluation's recipe by the config of a run.

    A run on ImageNet is probed by its paper's protocol unless the reference names another one; a
    run on other images by `cached`. The student's settings are those of the run's backbone.

    Args:
      reference: e.g. "linear", "semi:percent=10".
      settings: of a pretraining run or an import.
    """
    name = flags.shipped_name(reference)
    if name not in _BY_STUDENT:
        return reference
    stated = {pair.partition("=")[0] for pair in reference.partition(":")[2].split(",")}
    if name == "linear" and "protocol" not in stated and data.is_imagenet(settings.data.name):
        return flags.with_arguments(_protocol_for(settings), reference.partition(":")[2])
    if "student" not in stated:
        return flags.with_arguments(reference, f"student={settings.student.backbone}")
    return reference


def fit(config: ConfigDict, trained: TrainedModel) -> ConfigDict:
    """Returns the config with the settings that depend on the run's backbone.

    Logs one warning if the protocol is that of another paper than the run's.

    Args:
      config: see `probes.classification`; a rate of 0 becomes that of the backbone's family.
      trained: network of the run.

    Raises:
      UserError: the config is made for another backbone, or has other settings for this one.
    """
    _check_student(config, trained)
    _warn_of_other_paper(config, trained.settings)
    config = config.copy_and_resolve_references()
    rate = config.learning_rate
    if not rate.base_lr:
        rate.base_lr = trained.encoder.backbone.probe_rate
        linear.follow_rate(config)
    return config


def _protocol_for(run: RunSettings) -> str:
    """Returns the linear probe of a run's paper; see `probes.protocol_for`."""
    self_distills = bool(run.objectives["self_distill"]["weight"])
    reference: str = probes.protocol_for(run.name, run.student.backbone, self_distills)
    return reference


def _check_student(config: ConfigDict, trained: TrainedModel) -> None:
    backbone = trained.settings.student.backbone
    if config.student not in ("", backbone):
        raise errors.UserError(
            f"The settings are for config.student={config.student!r}, but the run's backbone is "
            f"{backbone!r}: set the recipe's argument, --config=RECIPE:student={backbone}."
        )
    protocol = _of_linear(config)
    if protocol and not config.student and _depends_on_backbone(protocol, backbone):
        raise errors.UserError(
            f"The protocol {protocol!r} has other settings for {backbone}: set the recipe's "
            f"argument, --config=linear:protocol={protocol},student={backbone}."
        )


def _of_linear(config: ConfigDict) -> str:
    """Returns the protocol of a paper's linear probe; "" for all other protocols."""
    recipe, _, protocol = config.protocol.partition(":")
    return protocol if recipe == "linear" and protocol in linear.OF_PAPERS else ""


def _depends_on_backbone(protocol: str, backbone: str) -> bool:
    """Returns whether a protocol has other settings, beside the rate, if it knows the backbone."""
    general, own = (
        linear.get_config(f"protocol={protocol},student={student}") for student in ("", backbone)
    )
    return any(
        general[name] != own[name] for name in general if name not in ("student", "learning_rate")
    )


def _warn_of_other_paper(config: ConfigDict, run: RunSettings) -> None:
    """Logs a warning if the paper of the run has another linear probe than the config's."""
    protocol = _of_linear(config)
    if protocol and protocol != probes.testbed(run.name):
        _LOG.warning(
            "The protocol %s is not that of the paper of %s, which is --config=%s.",
            protocol,
            run.name or "this run",
            _protocol_for(run),
        )
