"""What every field of a config may hold: its type, its range, the names that are allowed.

A rule is found by the end of a field's name, the longest match first, so that it holds in every
config that has the field. A field without one is judged by the type of its value.
"""

import dataclasses
import importlib
import math
import numbers
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from disco_jax import errors
from disco_jax.nested import flatten

MOST = 2**31 - 1  # steps are counted in 32 bits
MOST_FLOAT = 3.4e38  # what a float32 can hold

TEXT_LENGTH = 1000
PART_BYTES = 255  # between two slashes of a path, on every usual file system


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a field may hold.

    Attributes:
      fits: whether a value will do.
      says: what will do, behind "must be".
      names: the names that are allowed, for the nearest match.
    """

    fits: Callable[[Any], bool]
    says: Callable[[], str]
    names: Callable[[], Sequence[str]] = tuple


def whole(low: int, high: int = MOST) -> Rule:
    """Whole numbers in a range, both ends included."""

    def fits(value: Any) -> bool:
        return _is(value, numbers.Integral) and low <= value <= high

    return Rule(fits, lambda: f"a whole number from {low} to {high}")


def number(low: float, high: float = MOST_FLOAT, *, above: bool = False) -> Rule:
    """Finite numbers in a range.

    Args:
      low: the least.
      high: the most, included.
      above: whether `low` itself is excluded.
    """

    def fits(value: Any) -> bool:
        if not _is(value, numbers.Real) or not math.isfinite(value):
            return False
        return (low < value if above else low <= value) and value <= high

    begin = f"above {low:g}" if above else f"from {low:g}"
    return Rule(fits, lambda: f"a finite number {begin} to {high:g}")


def one_of(*names: str) -> Rule:
    """Names; "module:TABLE" stands for those in a table of this package, imported when needed."""

    def allowed() -> tuple[str, ...]:
        found: list[str] = []
        for name in names:
            module, _, table = name.partition(":")
            package = importlib.import_module(f"disco_jax.{module}") if table else None
            found += getattr(package, table) if package else [name]
        return tuple(found)

    def fits(value: Any) -> bool:
        return isinstance(value, str) and value in allowed()

    return Rule(fits, lambda: f"one of: {errors.listed(allowed())}", allowed)


def several(rule: Rule, least: int = 0, most: int | None = None) -> Rule:
    """Tuples (lists in what comes from JSON) of what `rule` takes.

    Args:
      rule: for every element.
      least: elements.
      most: elements; None: any number.
    """

    def fits(value: Any) -> bool:
        if not isinstance(value, tuple | list) or len(value) < least:
            return False
        return (most is None or len(value) <= most) and all(map(rule.fits, value))

    count = f"{least}" if least == most else f"{least} or more" if least else "any number"
    return Rule(fits, lambda: f"a tuple of {count}, each {rule.says()}", rule.names)


def pair(first: Rule, second: Rule) -> Rule:
    """Tuples of two."""

    def fits(value: Any) -> bool:
        if not isinstance(value, tuple | list) or len(value) != 2:
            return False
        return first.fits(value[0]) and second.fits(value[1])

    return Rule(fits, lambda: f"a pair of {first.says()} and {second.says()}")


def either(first: Rule, second: Rule) -> Rule:
    """What one of two rules takes."""
    return Rule(
        lambda value: first.fits(value) or second.fits(value),
        lambda: f"{first.says()}, or {second.says()}",
        lambda: (*first.names(), *second.names()),
    )


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    """Whether a value could name a file."""
    if not isinstance(value, str) or len(value) > TEXT_LENGTH:
        return False
    parts = value.encode("utf-8", "surrogateescape").split(b"/")
    printable = not any(unicodedata.category(letter) == "Cc" for letter in value)
    return printable and max(map(len, parts)) <= PART_BYTES


def _is_literal(value: Any) -> bool:
    """Whether a value is made of finite numbers, texts, truth values and tuples of them."""
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
BACKBONE = one_of("models:BACKBONES")
# Of sweeps: fields or axes and their values.
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
    "data.interpolation": one_of("", "data.views:INTERPOLATIONS"),
    "data.shuffle_buffer": COUNT,
    "data.max_unreadable": AMOUNT,
    "data.max_unreadable_percent": PERCENT,
    "data.max_pixels": whole(1, 2**40),
    **dict.fromkeys(("student.start", "start"), one_of("train.start:PARTS")),
    **dict.fromkeys(("student.layers", "teacher.layers"), whole(0, 64)),
    "bags.sampling": one_of("data.bags:SAMPLING"),
    # Views.
    "views": either(whole(1, 64), VIEWS),  # how many; those of an objective
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
    **dict.fromkeys(("student.stem", "teacher.stem"), one_of("", "models.resnet:STEMS")),
    "head": one_of("auto", "models:HEADS"),
    "norm": one_of("models.norm:MODES"),
    "width": whole(0, 4096),
    "grid": whole(0, 1024),
    "patch": whole(0, 1024),
    "drop_path": SHARE,
    "norm_group": whole(0, 2**20),
    "adapter": WIDTH,
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
    **dict.fromkeys(("view", "query_view", "key_view"), VIEW),
    **dict.fromkeys(("assign", "targets"), VIEWS),
    "teacher_views": several(VIEW),
    "keys_from": one_of("methods.base:NETWORKS"),
    "queue_size": whole(0, 2**28),
    "queue_init": one_of("teacher", "random"),
    "objectives.distill.reduction": one_of("methods.distill:REDUCTIONS"),
    "teacher_output": one_of("methods.base:OUTPUTS"),
    "attention.layers": one_of("methods.attention:LAYERS"),
    "attention.resize": one_of("methods.attention:RESIZES"),
    "compress.bank": one_of("methods.compress:BANKS"),
    "online_clusters.count": ROWS,
    **dict.fromkeys(("rate", "idle", "centre_rate"), SHARE),
    **dict.fromkeys(("distance", "angle"), AMOUNT),
    "group": whole(0, 2**20),
    "iterations": whole(1, 10_000),
    "global_share": SHARE_OR_OFF,
    **dict.fromkeys(("own_epochs", "queue_epochs", "warmup_epochs", "frozen_epochs"), EPOCHS),
    # How they learn.
    "fast.exchange": one_of("auto", "ops.collectives:EXCHANGES"),
    **dict.fromkeys(("fast.columns", "fast.statistics", "fast.shifts"), CHOICE),
    "optimizer.name": one_of("train.optimizer:NAMES"),
    "optimizer.momentum": SHARE,
    "weight_decay": AMOUNT,
    "weight_decay_end": number(-1),
    **dict.fromkeys(("trust", "clip", "per_256", "factor", "minimum", "warmup_from"), AMOUNT),
    **dict.fromkeys(("no_decay", "no_trust"), several(one_of("train.optimizer:KINDS"))),
    **dict.fromkeys(("frozen", "fixed", "unit_norm"), NAMES),
    "frozen_steps": whole(0),
    "decay": one_of("train.optimizer:DECAYS"),
    "every": one_of("epoch", "step"),
    "milestones": several(EPOCHS),
    # What is watched and kept.
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
    "layers": one_of("evaluate.streamed:LAYERS"),
    "augment": one_of("tasks.linear:AUGMENT"),
    "init": one_of("evaluate.classifier:INITS"),
    "distill.reduction": one_of("evaluate.classifier:REDUCTIONS"),
    **dict.fromkeys(("percent", "held_out_percent"), PERCENT),
    "per_class": whole(0),
    "head_rate": AMOUNT,
    **dict.fromkeys(("rates", "weight_decays"), several(AMOUNT)),
    **dict.fromkeys(("log_every_epochs", "checkpoint_every_epochs"), SOME_EPOCHS),
    "evaluate_every_epochs": EPOCHS,
    "shots": several(COUNT, 1),
    "kind": one_of("tasks.bags:KINDS"),
    **dict.fromkeys(("neighbours", "clusters", "repeats", "joint"), COUNT),
    "size": whole(0, 4096),
    **dict.fromkeys(("num_classes", "images_per_class"), COUNT),
    "classes": several(whole(0)),
    **dict.fromkeys(("names", "titles", "beside", "runs"), NAMES),
    "perplexity": ABOVE_0,
    **dict.fromkeys(("points", "bins"), whole(2, 100_000)),
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
    """The rule of a field, e.g. "student.width", or of its value's type if it has none."""
    words = field.split(".")
    for i in range(len(words)):
        if found := RULES.get(".".join(words[i:])):
            return found
    kinds = {bool: SWITCH, int: WHOLE, float: FINITE, str: TEXT, tuple: LITERAL, list: LITERAL}
    return kinds.get(type(value), NOTHING)


def rule_in(config: ConfigDict, field: str, value: Any) -> Rule:
    """Returns the rule of a field in a config.

    The fields of an objective outside this package are judged by their types: their names may be
    those of other settings.
    """
    from disco_jax.methods.registry import CLASS

    group, _, path = field.partition(".")
    section, _, name = path.partition(".")
    if group == "objectives" and name not in ("", "weight") and CLASS in config[group][section]:
        return rule("", value)
    return rule(field, value)


def refusal(field: str, given: Any, allowed: Rule) -> str:
    """The message for a value that a field may not hold."""
    near = errors.did_you_mean(given, allowed.names()) if isinstance(given, str) else ""
    return f"config.{field}={errors.shown(given)} must be {allowed.says()}.{near}"


def check(config: ConfigDict, problems: errors.Problems) -> None:
    """Notes every field that holds what it may not."""
    for field, value in flatten(config).items():
        allowed = rule_in(config, field, value)
        if not allowed.fits(value):
            problems.add(refusal(field, value, allowed), field)


def check_complete(config: ConfigDict, like: ConfigDict, task: str) -> None:
    """Refuses a config that lacks whole parts, as a recipe of another task does.

    Args:
      config: of a recipe.
      like: of a recipe that the task takes.
      task: its name.

    Raises:
      UserError: names what is missing.
    """
    if missing := [f"config.{name}" for name in like if name not in config]:
        raise errors.UserError(
            f"The recipe is none for `disco-jax {task}`: it has no {', '.join(missing[:4])}. "
            "`disco-jax list` shows all recipes."
        )
