"""Validation rules of config fields: types, ranges and allowed names.

A rule applies to every field whose dotted name ends in the rule's key; the longest key wins. A
field without a rule must keep the type of its value.
"""

import dataclasses
import importlib
import math
import numbers
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from disco_jax import errors
from disco_jax.nested import flatten

MOST = 2**31 - 1  # step counters are int32
MOST_FLOAT = 3.4e38  # largest float32

TEXT_LENGTH = 1000
_CLASS = re.compile(r"[\w.]+:\w+")
PART_BYTES = 255  # longest path component of common file systems


@dataclasses.dataclass(frozen=True)
class Rule:
    """A constraint on the value of a field.

    Attributes:
      fits: returns True for a valid value.
      says: returns a description of valid values, to follow "must be" in a message.
      names: returns the allowed names, to suggest the most similar one.
    """

    fits: Callable[[Any], bool]
    says: Callable[[], str]
    names: Callable[[], Sequence[str]] = tuple


def whole(low: int, high: int = MOST) -> Rule:
    """Accepts integers from `low` to `high`, both included."""

    def fits(value: Any) -> bool:
        return _is(value, numbers.Integral) and low <= value <= high

    return Rule(fits, lambda: f"a whole number from {low} to {high}")


def number(low: float, high: float = MOST_FLOAT, *, above: bool = False) -> Rule:
    """Accepts finite numbers in a range.

    Args:
      low: the smallest valid number.
      high: the largest valid number.
      above: exclude `low` itself.
    """

    def fits(value: Any) -> bool:
        if not _is(value, numbers.Real) or not math.isfinite(value):
            return False
        return (low < value if above else low <= value) and value <= high

    start = f"above {low:g}" if above else f"from {low:g}"
    return Rule(fits, lambda: f"a finite number {start} to {high:g}")


def one_of(*names: str) -> Rule:
    """Accepts the given names; "module:TABLE" adds the keys of that table of this package.

    The module is imported when the rule is first used.
    """

    def allowed() -> tuple[str, ...]:
        choices: list[str] = []
        for name in names:
            module, _, table = name.partition(":")
            package = importlib.import_module(f"disco_jax.{module}") if table else None
            choices += getattr(package, table) if package else [name]
        return tuple(choices)

    def fits(value: Any) -> bool:
        return isinstance(value, str) and value in allowed()

    return Rule(fits, lambda: f"one of: {errors.listed(allowed())}", allowed)


def or_class(rule: Rule) -> Rule:
    """Accepts what `rule` does, and "module:Class", which names a class outside this package."""

    def fits(value: Any) -> bool:
        return rule.fits(value) or (isinstance(value, str) and bool(_CLASS.fullmatch(value)))

    return Rule(fits, lambda: f"{rule.says()}, or 'module:Class'", rule.names)


def several(rule: Rule, least: int = 0, most: int | None = None) -> Rule:
    """Accepts tuples, and lists from JSON, whose elements all fit `rule`.

    Args:
      rule: constraint on each element.
      least: smallest number of elements.
      most: largest number of elements; None for no limit.
    """

    def fits(value: Any) -> bool:
        if not isinstance(value, tuple | list) or len(value) < least:
            return False
        return (most is None or len(value) <= most) and all(map(rule.fits, value))

    count = f"{least}" if least == most else f"{least} or more" if least else "any number"
    return Rule(fits, lambda: f"a tuple of {count}, each {rule.says()}", rule.names)


def pair(first: Rule, second: Rule) -> Rule:
    """Accepts tuples of two elements."""

    def fits(value: Any) -> bool:
        if not isinstance(value, tuple | list) or len(value) != 2:
            return False
        return first.fits(value[0]) and second.fits(value[1])

    return Rule(fits, lambda: f"a pair of {first.says()} and {second.says()}")


def either(first: Rule, second: Rule) -> Rule:
    """Accepts values that fit at least one of two rules."""
    return Rule(
        lambda value: first.fits(value) or second.fits(value),
        lambda: f"{first.says()}, or {second.says()}",
        lambda: (*first.names(), *second.names()),
    )


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    """Returns True for a string that could be a path: short and without control characters."""
    if not isinstance(value, str) or len(value) > TEXT_LENGTH:
        return False
    parts = value.encode("utf-8", "surrogateescape").split(b"/")
    printable = not any(unicodedata.category(letter) == "Cc" for letter in value)
    return printable and max(map(len, parts)) <= PART_BYTES


def _is_literal(value: Any) -> bool:
    """Returns True for finite numbers, strings, booleans and nested tuples of them."""
    if isinstance(value, tuple | list):
        return all(map(_is_literal, value))
    return any(rule.fits(value) for rule in (SWITCH, WHOLE, FINITE, TEXT))


SWITCH = Rule(lambda value: isinstance(value, bool), lambda: "true or false")
WHOLE, FINITE = whole(-MOST), number(-MOST_FLOAT)
TEXT = Rule(
    _is_text,
    lambda: (
        f"a text of at most {TEXT_LENGTH} characters, {PART_BYTES} bytes between two slashes, "
        "without control characters"
    ),
)
LITERAL = Rule(
    lambda value: isinstance(value, tuple | list) and _is_literal(value),
    lambda: "a tuple of finite numbers, texts, or tuples of them",
)
VALUE = Rule(_is_literal, lambda: "a finite number, a text or a tuple of them")
NOTHING = Rule(lambda value: False, lambda: "a number, a text, true or false, or a tuple")

COUNT, SIZE, WIDTH = whole(1), whole(1, 4096), whole(0, 2**17)
EPOCHS, SOME_EPOCHS = whole(0, 100_000), whole(1, 100_000)
SHARE, PERCENT, SHARE_OR_OFF = number(0, 1), number(0, 100), number(-1, 1)
AMOUNT, ABOVE_0 = number(0), number(0, MOST_FLOAT, above=True)
SEED, ROWS, VIEW = whole(0), whole(1, 2**20), whole(0, 255)
VIEWS, PAIRS = several(VIEW, 1), several(several(VIEW, 2, 2), 1)
CHANCE, NAMES = either(SHARE, several(SHARE, 1)), several(TEXT)
CHOICE = one_of("auto", "on", "off")
BACKBONE = or_class(one_of("models:BACKBONES"))
# Fields or axes of a sweep with their values.
CHANGES = several(pair(TEXT, VALUE))
AXES = several(pair(TEXT, several(VALUE, 1)))

RULES = {
    # A run and its data.
    "seed": SEED,
    "seeds": several(SEED, 1),
    "batch_size": ROWS,
    "extract_batch_size": ROWS,
    "total_epochs": SOME_EPOCHS,
    "total_steps": whole(0),
    "dtype": one_of("auto", "models:DTYPES"),
    "data.source": one_of("", "data.pipeline:SOURCES"),
    "data.eval_resize": whole(-1, 8192),
    "data.size": whole(0, 4096),
    **dict.fromkeys(
        ("data.interpolation", "data.eval_interpolation"),
        one_of("", "data.views:INTERPOLATIONS"),
    ),
    "data.shuffle_buffer": COUNT,
    "data.max_unreadable": AMOUNT,
    "data.max_unreadable_percent": PERCENT,
    "data.max_pixels": whole(1, 2**40),
    **dict.fromkeys(("student.start", "start"), one_of("train.start:PARTS")),
    **dict.fromkeys(("student.layers", "teacher.layers"), whole(0, 64)),
    "bags.sampling": one_of("data.bags:SAMPLING"),
    # Views.
    "views": either(whole(1, 64), VIEWS),  # config.views is a count, an objective's views are ids
    "local.count": whole(0, 64),
    "augment.size": SIZE,
    "local.size": SIZE,
    "augment.interpolation": one_of("data.views:INTERPOLATIONS"),
    "antialias": one_of("data.views:ANTIALIAS"),
    "order": several(one_of("data.views:OPERATIONS")),
    "scale": several(SHARE, 2, 2),
    "ratio": several(number(0, 1000, above=True), 2, 2),
    "blur_sigma": several(number(0, 1000), 2, 2),
    "augment.jitter": several(number(0, 1000), 4, 4),
    "augment.mean": several(FINITE, 3, 3),
    "augment.std": several(ABOVE_0, 3, 3),
    **dict.fromkeys(("jitter_prob", "grey_prob", "blur_prob", "solarize_prob"), CHANCE),
    "flip_prob": SHARE,
    # Networks.
    "backbone": BACKBONE,
    **dict.fromkeys(
        ("student.stem", "teacher.stem"), one_of("", "models.backbones.backbone:STEMS")
    ),
    "head": one_of("auto", "models:HEADS"),
    "norm": one_of("models.layers.norm:MODES"),
    "width": whole(0, 4096),
    "grid": whole(0, 1024),
    "patch": whole(0, 1024),
    "drop_path": SHARE,
    "norm_group": whole(0, 2**20),
    **dict.fromkeys(("adapter", "predictor"), WIDTH),
    "hidden": whole(-1, 2**17),
    "dim": WIDTH,
    "prototypes": several(ROWS),
    "reuse": several(one_of("methods:REUSABLE")),
    "momentum.ema_rate": SHARE,
    "momentum.ema_rate_end": SHARE_OR_OFF,
    "momentum.follow": one_of("before", "after"),
    "teacher.network": one_of("train.teacher:NETWORKS"),
    "teacher.mean": several(FINITE, 0, 3),
    "teacher.std": several(ABOVE_0, 0, 3),
    # Objectives.
    "weight": AMOUNT,
    **dict.fromkeys(
        (
            "temperature",
            "student_temperature",
            "target_temperature",
            "momentum_temperature",
            "warmup_temperature",
            "epsilon",
        ),
        ABOVE_0,
    ),
    "teacher_temperature": AMOUNT,
    "pairs": PAIRS,
    "groups": several(PAIRS, 1),
    **dict.fromkeys(("view", "query_view", "key_view", "first", "second"), VIEW),
    **dict.fromkeys(("assign", "targets"), VIEWS),
    "teacher_views": several(VIEW),
    "keys_from": one_of("methods.base:NETWORKS"),
    "queue_size": whole(0, 2**28),
    "queue_init": one_of("teacher", "random"),
    "objectives.distill.reduction": one_of("methods.regression:REDUCTIONS"),
    "teacher_output": one_of("methods.base:OUTPUTS"),
    "attention.layers": one_of("methods.attention:LAYERS"),
    "attention.resize": one_of("methods.attention:RESIZES"),
    "compress.bank": one_of("methods.compress:BANKS"),
    "online_clusters.count": ROWS,
    **dict.fromkeys(("rate", "idle", "centre_rate"), SHARE),
    **dict.fromkeys(("distance", "angle"), AMOUNT),
    **dict.fromkeys(("group", "cutmix_group"), whole(0, 2**20)),
    "iterations": whole(1, 10_000),
    "global_share": SHARE_OR_OFF,
    **dict.fromkeys(("own_epochs", "queue_epochs", "warmup_epochs", "frozen_epochs"), EPOCHS),
    # Optimisation.
    "fast.exchange": one_of("auto", "ops.collectives:EXCHANGES"),
    **dict.fromkeys(("fast.columns", "fast.statistics", "fast.shifts"), CHOICE),
    "optimizer.name": one_of("train.optimizer:NAMES"),
    "optimizer.momentum": SHARE,
    "weight_decay": AMOUNT,
    "weight_decay_end": number(-1),
    **dict.fromkeys(("trust", "clip", "base_lr", "factor", "minimum", "warmup_from"), AMOUNT),
    **dict.fromkeys(("no_decay", "no_trust"), several(one_of("train.optimizer:KINDS"))),
    **dict.fromkeys(("frozen", "frozen_until", "unit_norm"), NAMES),
    "frozen_steps": whole(0),
    "decay": one_of("train.optimizer:DECAYS"),
    "every": one_of("epoch", "step"),
    "milestones": several(EPOCHS),
    # Logging, checkpoints and monitoring.
    **dict.fromkeys(("log.every_steps", "checkpoint.every_steps", "checkpoint.keep"), COUNT),
    **dict.fromkeys(("replicas_every_steps", "knn_every_steps"), whole(0)),
    "hang_s": number(0, 1e9),
    "min_std": AMOUNT,
    "patience": COUNT,
    "images": whole(0),
    "k": COUNT,
    # Evaluations.
    "network": one_of("train.teacher:NETWORKS"),
    "output": one_of("models.encoder:OUTPUTS"),
    "blocks": whole(1, 64),
    "vote": one_of("evaluate.knn:VOTES"),
    "layers": one_of("evaluate.online:LAYERS"),
    "augment": one_of("commands.linear:AUGMENT"),
    "init": one_of("evaluate.classifier:INITS"),
    "distill.reduction": one_of("evaluate.classifier:REDUCTIONS"),
    **dict.fromkeys(("percent", "held_out_percent"), PERCENT),
    **dict.fromkeys(("per_class", "listed"), whole(0)),
    "head_rate": AMOUNT,
    **dict.fromkeys(("rates", "weight_decays"), several(AMOUNT)),
    **dict.fromkeys(("log_every_epochs", "checkpoint_every_epochs"), SOME_EPOCHS),
    "evaluate_every_epochs": EPOCHS,
    "folds": whole(0, 1000),
    "shots": several(COUNT, 1),
    "kind": one_of("commands.bags:KINDS"),
    **dict.fromkeys(("neighbours", "clusters", "repeats", "joint"), COUNT),
    "size": whole(0, 4096),
    **dict.fromkeys(("num_classes", "images_per_class"), COUNT),
    "classes": several(whole(0)),
    **dict.fromkeys(("names", "titles", "beside", "runs"), NAMES),
    "perplexity": ABOVE_0,
    "points": either(whole(0, 0), whole(2, 100_000)),
    "bins": whole(2, 100_000),
    "metric": one_of("euclidean", "cosine"),
    "grouping": one_of("evaluate.information:GROUPINGS"),
    "students": several(BACKBONE),
    # Sweeps.
    "axes": AXES,
    "further": several(AXES),
    **dict.fromkeys(("arguments", "changes", "fields", "better", "worse"), CHANGES),
    "evaluate": several(either(TEXT, pair(TEXT, CHANGES))),
    "most": either(several(VALUE, 0, 0), pair(TEXT, VALUE)),
}


def rule(field: str, value: Any) -> Rule:
    """Returns the rule of a field, e.g. "student.width", else the rule of its value's type."""
    words = field.split(".")
    for i in range(len(words)):
        if match := RULES.get(".".join(words[i:])):
            return match
    kinds = {bool: SWITCH, int: WHOLE, float: FINITE, str: TEXT, tuple: LITERAL, list: LITERAL}
    return kinds.get(type(value), NOTHING)


def rule_in(config: ConfigDict, field: str, value: Any) -> Rule:
    """Returns the rule of a field in a config.

    The fields of an objective outside this package are checked by their types: their names may
    equal those of other settings.
    """
    group, _, path = field.partition(".")
    section, _, name = path.partition(".")
    if group != "objectives" or name in ("", "weight"):
        return rule(field, value)

    from disco_jax.methods.registry import CLASS  # imports JAX

    return rule("" if CLASS in config[group][section] else field, value)


def refusal(field: str, value: Any, allowed: Rule) -> str:
    """Returns the error message for an invalid value of a field."""
    near = errors.did_you_mean(value, allowed.names()) if isinstance(value, str) else ""
    return f"config.{field}={errors.shown(value)} must be {allowed.says()}.{near}"


def check(config: ConfigDict, problems: errors.Problems) -> None:
    """Records every field with an invalid value in `problems`."""
    for field, value in flatten(config).items():
        allowed = rule_in(config, field, value)
        if not allowed.fits(value):
            problems.add(refusal(field, value, allowed), field)


def check_known(config: ConfigDict, like: ConfigDict, where: str) -> None:
    """Checks that a pretraining config has no fields beyond those of `like`, which nothing reads.

    Args:
      config: config of a recipe; may have sections of objectives outside this package.
      like: config of a shipped recipe.
      where: the recipe's file, for the message.

    Raises:
      UserError: there are such fields; the message names all of them.
    """
    from disco_jax.methods.registry import CLASS

    allowed = flatten(like)
    own = {f"objectives.{name}." for name, section in config.objectives.items() if CLASS in section}
    problems = errors.Problems()
    for name in flatten(config):
        if name not in allowed and not name.startswith(tuple(own)):
            problems.add(
                f"--config={where} sets config.{name}, which is not a field of a pretraining "
                f"config.{errors.did_you_mean(name, allowed)}",
                name,
            )
    problems.raise_any()


def check_complete(config: ConfigDict, like: ConfigDict, task: str) -> None:
    """Checks that a config has all top-level fields of `like`, i.e. belongs to the same task.

    Args:
      config: config of a recipe.
      like: config of a recipe that the task accepts.
      task: name of the task, for the message.

    Raises:
      UserError: fields are missing; the message names the first four.
    """
    if missing := [f"config.{name}" for name in like if name not in config]:
        raise errors.UserError(
            f"The recipe cannot be used with `disco-jax {task}`: it has no "
            f"{', '.join(missing[:4])}. `disco-jax list` shows all recipes."
        )
