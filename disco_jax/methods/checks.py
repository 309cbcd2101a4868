"""Validation of a method's settings before anything is compiled."""

from disco_jax import errors
from disco_jax.methods.base import NETWORKS, Method, Objective, Views
from disco_jax.methods.method_settings import MethodSettings
from disco_jax.models.network_spec import NetworkSpec


def check(method: Method, settings: MethodSettings) -> None:
    """Checks objectives against their settings, the data and the views.

    Args:
      method: only its objectives and views are used.
      settings: settings of the run.

    Raises:
      UserError: if any setting is invalid; lists each one with its allowed values.
    """
    problems = errors.Problems()
    for name, objective in method.objectives.items():
        setting = f"config.objectives.{name}"
        problems.attempt(objective.check_settings, setting, settings.batch_size)
        problems.attempt(_check_needs, name, objective, method.views)
        problems.attempt(_check_scores, name, objective, method.views, settings.student)
        problems.attempt(_check_data, name, objective, settings, len(method.views.locals))
    problems.raise_any()


def _check_needs(name: str, objective: Objective, views: Views) -> None:
    """Checks that the networks and views that the objective needs exist."""
    for network, needed in objective.needs(views).items():
        if network not in NETWORKS:
            raise errors.unknown(f"A network of config.objectives.{name}", network, NETWORKS)
        available = (*views.globals, *views.locals, *objective.synthetic_views)
        missing = sorted(set(needed) - set(available))
        if missing:
            raise errors.UserError(
                f"config.objectives.{name} reads view {missing[0]} of the {network}, but the "
                f"recipe creates {len(views.globals + views.locals)} views, numbered from 0. Raise "
                "config.views or config.local.count, or change the views of "
                f"config.objectives.{name}."
            )


def _check_scores(name: str, objective: Objective, views: Views, student: NetworkSpec) -> None:
    """Checks that objectives on prototypes have one set of prototypes and at least two views."""
    if not objective.reads_scores:
        return
    if len(student.prototypes) != 1:
        raise errors.UserError(
            f"config.objectives.{name} reads the scores of one set of prototypes, but "
            f"config.student.prototypes={student.prototypes!r}. Set for example "
            "--config.student.prototypes='(3000,)'."
        )
    if len((*views.globals, *views.locals)) < 2:
        raise errors.UserError(
            f"config.objectives.{name} compares at least two views, but the recipe creates one. "
            "Raise config.views or config.local.count."
        )


def _check_data(
    name: str, objective: Objective, settings: MethodSettings, local_views: int
) -> None:
    """Checks that the data provides the views, bags and feature maps that the objective needs."""
    if objective.reads_maps and settings.group_views:
        raise errors.UserError(
            f"config.objectives.{name} reads the feature maps of single views, but "
            "config.group_views=True encodes several views in one pass. Set "
            "config.group_views=False."
        )
    if objective.reads_bags and not settings.has_bags:
        raise errors.UserError(
            f"config.objectives.{name} needs bags of similar images. Compute them with "
            "`disco-jax bags` and set config.bags.file."
        )
    if objective.synthetic_views and settings.views > min(objective.synthetic_views):
        raise errors.UserError(
            f"config.views={settings.views}, but config.objectives.{name} creates view "
            f"{min(objective.synthetic_views)} itself. Set "
            f"config.views={min(objective.synthetic_views)}."
        )
    if objective.synthetic_views and local_views:
        raise errors.UserError(
            f"config.objectives.{name}.cutmix=True does not support multi-crop (config.local.count="
            f"{local_views}). Set config.local.count=0 or config.objectives.{name}.cutmix=False."
        )
