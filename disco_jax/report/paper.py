"""Results that the papers print, to compare with measured ones. ImageNet, percent."""

from collections.abc import Mapping
from typing import Any, NamedTuple

DATA = "imagenet2012"


class Value(NamedTuple):
    """Result printed in a paper.

    Attributes:
      top1: percent.
      top5: percent; None if the paper has none.
      source: paper and table.
    """

    top1: float
    top5: float | None
    source: str


# Hidden width of DisCo's head, and of DisCo*'s, which is the backbone's feature width (Table 4).
_WIDE = 2048
_NARROW = {"resnet18": 512, "resnet34": 512}
_STUDENTS = ("efficientnet_b0", "efficientnet_b1", "mobilenetv3_large", "resnet18", "resnet34")


def _rows(source: str, recipe: str, teacher: str, *cells: Any) -> dict[Any, Value]:
    """Returns linear results of `_STUDENTS`, from a top-1, a (top-1, top-5) or None for each."""
    table = {}
    for student, cell in zip(_STUDENTS, cells, strict=True):
        if cell is not None:
            top1, top5 = cell if isinstance(cell, tuple) else (cell, None)
            table[recipe, student, teacher] = Value(top1, top5, source)
    return table


_DISCO, _RETRO, _SEED = (
    f"{name}, Table 1"
    for name in ("DisCo (2104.09124)", "RETRO", "SEED, as printed in DisCo (2104.09124)")
)
_T2, _T4, _T5, _T6 = (f"DisCo (2104.09124), Table {n}" for n in (2, 4, 5, 6))
_T3 = "DisCo (2104.09124), appendix Table 3"

# (config.name, student, teacher or "") -> linear evaluation. Teachers of 50, 101 and 152 layers
# were trained with MoCo-v2, the wide one with SwAV; see `_teacher` for others.
LINEAR: Mapping[tuple[str, str, str], Value] = {
    **_rows(
        _DISCO, "moco_v2", "", (46.8, 72.2), (48.4, 73.8), (36.2, 62.1), (52.2, 77.6), (56.8, 81.4)
    ),
    **_rows(
        _SEED, "seed", "resnet50",
        (61.3, 82.7), (61.4, 83.1), (55.2, 80.3), (57.6, 81.8), (58.5, 82.6),
    ),
    **_rows(
        _SEED, "seed", "resnet101",
        (63.0, 83.8), (63.4, 84.6), (59.9, 83.5), (58.9, 82.5), (61.6, 84.9),
    ),
    **_rows(
        _SEED, "seed", "resnet152",
        (65.3, 86.0), (67.3, 86.9), (61.4, 84.6), (59.5, 83.3), (62.7, 85.8),
    ),
    **_rows(
        _SEED, "seed_small_patch", "resnet50w2",
        (67.6, 87.4), (68.0, 87.6), (68.2, 88.2), (63.0, 84.9), (65.7, 86.8),
    ),
    **_rows(
        _DISCO, "disco", "resnet50",
        (66.5, 87.6), (66.6, 87.5), (64.4, 86.2), (60.6, 83.7), (62.5, 85.4),
    ),
    **_rows(
        _DISCO, "disco", "resnet101",
        (68.9, 88.9), (69.0, 89.1), (65.7, 86.7), (62.3, 85.1), (64.4, 86.5),
    ),
    **_rows(
        _DISCO, "disco", "resnet152",
        (67.8, 87.0), (73.1, 91.2), (63.7, 84.9), (65.5, 86.7), (68.1, 88.6),
    ),
    **_rows(
        _DISCO, "disco", "resnet50w2",
        (69.1, 88.9), (64.0, 84.6), (58.9, 81.4), (65.2, 86.8), (67.6, 88.6),
    ),
    **_rows(_RETRO, "bingo", "resnet50", None, None, None, (61.4, 84.3), (63.5, 85.7)),
    **_rows(_RETRO, "bingo", "resnet152", None, None, None, (65.9, 87.1), (69.1, 88.9)),
    **_rows(_RETRO, "bingo", "resnet50w2", None, None, None, (65.5, 87.0), (68.9, 89.0)),
    **_rows(
        _RETRO, "retro", "resnet50",
        (66.9, 88.2), (67.1, 88.4), (66.2, 87.2), (62.9, 85.4), (64.1, 86.8),
    ),
    **_rows(
        _RETRO, "retro", "resnet101",
        (69.3, 89.8), (69.9, 89.9), (67.5, 88.6), (64.8, 86.6), (66.1, 87.9),
    ),
    **_rows(
        _RETRO, "retro", "resnet152",
        (69.8, 90.2), (73.7, 91.4), (68.0, 86.2), (66.9, 88.1), (69.4, 89.9),
    ),
    **_rows(
        _RETRO, "retro", "resnet50w2",
        (70.2, 90.4), (73.8, 91.6), (70.1, 89.2), (65.9, 87.1), (68.9, 89.7),
    ),
    **_rows("RETRO, Table 4", "retro_head", "resnet50", 66.7, 66.9, 65.8, 62.5, 63.4),
    **_rows(_T6, "disco", "resnet50 of SwAV", 70.0, 72.1, 65.0, 65.1, 67.5),
    **_rows(_T2, "attention", "resnet50", 57.1, 58.2, 51.0, 56.2, 60.2),
    **_rows(_T2, "rkd", "resnet50", 48.3, 50.3, 36.9, 56.4, 58.7),
    **_rows(_T2, "disco_attention", "resnet50", 66.7, 66.3, 64.1, 60.2, 62.3),
    **_rows(_T2, "disco_rkd", "resnet50", 66.8, 66.5, 64.4, 60.6, 62.3),
    **_rows(_T4, "disco_star", "resnet50", 65.6, 65.8, 63.8, 57.1, 58.9),
    **_rows(_T5, "swav", "", 46.8, None, 19.4, None, 63.3),
    **_rows(_T5, "swav_disco", "resnet50", 62.4, None, 55.7, None, 63.3),
    ("dino", "vit_tiny_p16", ""): Value(63.2, None, _T3),
    ("dino", "xcit_tiny_12_p16", ""): Value(67.0, None, _T3),
    ("dino_disco", "vit_tiny_p16", "vit_small_p16"): Value(68.4, None, _T3),
    ("dino_disco", "xcit_tiny_12_p16", "xcit_small_12_p16"): Value(71.1, None, _T3),
    **{
        (recipe, "mobilenetv2", ""): Value(top1, top5, "SSLight (2210.02808), Table 3")
        for recipe, top1, top5 in (
            ("sslight_moco", 61.6, 84.2),
            ("sslight_swav", 67.3, 87.2),
            ("sslight_dino", 68.3, 87.8),
        )
    },
    **{
        ("sslight_dino", student, ""): Value(top1, top5, "SSLight (2210.02808), Table 4")
        for student, top1, top5 in (
            ("resnet18", 65.7, 86.6),
            ("resnet34", 69.7, 89.5),
            ("resnet50", 73.4, 91.5),
        )
    },
    **{
        ("sslight_dino", student, ""): Value(top1, top5, "SSLight (2210.02808), Table 5")
        for student, top1, top5 in (
            ("vit_tiny_p32", 60.1, 81.8),
            ("vit_tiny_p16", 69.5, 88.5),
            ("vit_small_p16", 76.1, 92.7),
        )
    },
}  # fmt: skip

# (config.name, teacher) -> top-1 with 1 % and 10 % of the labels, for ResNet-18 students.
_SEMI = {
    ("moco_v2", ""): (30.9, 45.8),
    ("seed", "resnet50"): (39.1, 50.2),
    ("seed", "resnet101"): (41.4, 54.8),
    ("seed", "resnet152"): (44.3, 54.8),
    ("disco", "resnet50"): (39.2, 50.1),
    ("disco", "resnet101"): (47.8, 54.7),
    ("disco", "resnet152"): (47.1, 54.7),
    ("bingo", "resnet50"): (42.8, 57.5),
    ("bingo", "resnet152"): (50.3, 61.2),
    ("bingo", "resnet50w2"): (48.2, 60.2),
    ("retro", "resnet50"): (43.1, 57.9),
    ("retro", "resnet101"): (49.2, 60.5),
    ("retro", "resnet152"): (50.9, 62.0),
    ("retro", "resnet50w2"): (50.6, 61.9),
}


def values(config: Mapping[str, Any]) -> dict[str, Value]:
    """Returns the printed results for a run's recipe and networks.

    Args:
      config: config of a pretraining run, as nested dicts.

    Returns:
      {"linear", "semi 1 %", "semi 10 %"} -> value, without missing ones; {} for other data sets.
    """
    if config.get("data", {}).get("name") != DATA or "student" not in config:
        return {}
    recipe, student = _recipe(config), config["student"]["backbone"].removesuffix("_seed")
    teacher = _teacher(recipe, config.get("teacher", {}))
    printed = {}
    if (recipe, student, teacher) in LINEAR:
        printed["linear"] = LINEAR[recipe, student, teacher]
    if student == "resnet18" and (recipe, teacher) in _SEMI:
        for percent, top1 in zip((1, 10), _SEMI[recipe, teacher], strict=True):
            printed[f"semi {percent} %"] = Value(top1, None, "RETRO, semi-supervised table")
    return printed


def _recipe(config: Mapping[str, Any]) -> str:
    """Returns the recipe in `LINEAR`'s keys; the head's width separates DisCo and DisCo*."""
    recipe, student = config.get("name", ""), config["student"]
    hidden = student.get("hidden", _WIDE)
    if recipe != "disco" or hidden == _WIDE:
        return recipe
    backbone = student["backbone"].removesuffix("_seed")
    return "disco_star" if hidden in (-1, _NARROW.get(backbone, 1280)) else ""


def _teacher(recipe: str, teacher: Mapping[str, Any]) -> str:
    """Returns the teacher in `LINEAR`'s keys; its head identifies its training method."""
    if not teacher.get("weights"):
        return ""
    backbone, head = teacher["backbone"], teacher.get("head", "auto")
    if head == "auto" or recipe.startswith(("swav", "dino")):
        return backbone
    expected = "swav" if backbone == "resnet50w2" else "mlp"
    if head.startswith(expected):
        return backbone
    return f"{backbone} of {'SwAV' if head.startswith('swav') else head}"


def kind(result: str) -> str:
    """Returns the key of `values` for a results file, e.g. "linear_disco" -> "linear", or "".

    Probes that extract features once ("linear", "linear_grid") are compared with the papers, too.
    """
    if result.startswith("linear") and result != "linear_kd":
        return "linear"
    if result.startswith("semi_"):
        return f"semi {result.rsplit('_', 1)[-1]} %"
    return ""
