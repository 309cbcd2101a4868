"""SSLight: effective self-supervised pre-training on low-compute networks (arXiv:2210.02808)."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from disco_jax.configs.papers.common import (
    DETECTION,
    MOCO_800,
    SUPERVISED,
    alone,
    distilled,
    linear,
    quoted,
    scores,
    sizes,
)
from disco_jax.report.rows import Evaluation, Row, Table, table

PAPER = "SSLight (2210.02808)"
MOBILE = "mobilenetv2"
# The figures score 50 training images of each class, which their probes do not train on.
HELD_OUT = (("held_out.per_class", 50),)
SCALES = (0.14, 0.2, 0.3, 0.4)
# Recipe -> its objective.
OBJECTIVES = {
    "sslight_moco": "contrast",
    "sslight_swav": "swapped",
    "sslight_dino": "self_distill",
}
# Tables 4 and 5: student -> DINO's and SSLight's top-1 and top-5.
CNNS: Mapping[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "mobilenetv2": ((66.2, 86.4), (68.3, 87.8)),
    "resnet18": ((62.2, 84.0), (65.7, 86.6)),
    "resnet34": ((67.7, 88.4), (69.7, 89.5)),
    "resnet50": ((73.4, 91.5), (73.4, 91.5)),
}
VITS: Mapping[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "vit_tiny_p32": ((55.4, 78.1), (60.1, 81.8)),
    "vit_tiny_p16": ((66.7, 86.6), (69.5, 88.5)),
    "vit_small_p16": ((75.4, 92.3), (76.1, 92.7)),
}
# Table 9: top-1 and top-5 with 1 % and 10 % of the labels, of DINO, ours, ours with 400 epochs.
TABLE9 = {
    "mobilenetv2": (
        ((47.9, 75.1), (61.3, 84.2)), ((50.6, 77.6), (63.5, 85.8)), ((52.6, 78.6), (64.0, 85.8)),
    ),
    "resnet18": (
        ((44.5, 72.1), (59.2, 82.8)), ((49.8, 77.2), (63.0, 85.5)), ((51.6, 78.5), (63.7, 86.0)),
    ),
    "resnet34": (
        ((52.4, 79.0), (65.4, 86.9)), ((55.2, 81.5), (67.2, 88.4)), ((56.8, 82.6), (67.5, 88.5)),
    ),
}  # fmt: skip
# Alpha of the baselines: all pairs weigh the same, 1/7 for those of global views.
DEFAULT_ALPHA = ("objectives.self_distill.global_share", -1.0)


def tables() -> tuple[Table, ...]:
    """Returns the tables and figures in the order of the paper."""
    return (
        table("sslight/table1", f"{PAPER}, Table 1", "methods on MobileNetV2", table1()),
        table("sslight/figure1", f"{PAPER}, Figure 1", "scales of the crops", figure1()),
        table("sslight/figure2", f"{PAPER}, Figure 2", "pixel scale", figure2()),
        table("sslight/figure3", f"{PAPER}, Figure 3", "number of views, alpha", figure3()),
        table("sslight/table2", f"{PAPER}, Table 2", "steps from DINO to SSLight", table2()),
        table("sslight/table3", f"{PAPER}, Table 3", "with and without the views", table3()),
        table("sslight/table4", f"{PAPER}, Table 4", "convolutional networks", table4()),
        table("sslight/table5", f"{PAPER}, Table 5", "transformers", table5()),
        table("sslight/figure4", f"{PAPER}, Figure 4", "gain and complexity", figure4()),
        table("sslight/table6", f"{PAPER}, Table 6", "detection on COCO", detection()),
        table("sslight/table7", f"{PAPER}, Table 7", "other methods, 400 epochs", table7()),
        table("sslight/table9", f"{PAPER}, Table 9", "1 % and 10 % of the labels", table9()),
        table("sslight/table11", f"{PAPER}, Table 11", "detection, MobileNetV2", detection()),
        table("sslight/table12", f"{PAPER}, Table 12", "detection, ResNet-18", detection()),
    )


def table1() -> Iterator[Row]:
    """Yields methods with the views of their papers."""
    yield Row(f"{MOBILE}/supervised", printed=scores((71.9, 90.3)), missing=SUPERVISED)
    yield distilled("simreg", f"{MOBILE}/simreg", MOBILE, MOCO_800, "compress", {"top1": 69.1})
    yield alone(
        "sslight_moco:views=two", f"{MOBILE}/moco_v2", MOBILE, "sslight", scores((53.8, 77.6)),
        note="the paper gives batch and epochs; the rest is MoCo-v2*'s: disagreement L9",
    )  # fmt: skip
    yield from _baselines()


def table2() -> Iterator[Row]:
    """Yields the steps from DINO's views to SSLight's."""
    steps = {"baseline": 66.2, "crop_scale": 67.0, "pixel_scale": 67.9, "ours": 68.3}
    for number, (views, top1) in enumerate(steps.items(), 1):
        yield _ours(f"{MOBILE}/{number}_{views}", MOBILE, {"top1": top1}, f"views={views}")


def table3() -> Iterator[Row]:
    """Yields three methods, with the baseline's views and with SSLight's."""
    yield from _baselines()
    values = {
        "sslight_moco": (61.6, 84.2), "sslight_swav": (67.3, 87.2), "sslight_dino": (68.3, 87.8),
    }  # fmt: skip
    for recipe, value in values.items():
        cell = f"{MOBILE}/{recipe.removeprefix('sslight_')}_ours"
        yield alone(recipe, cell, MOBILE, "sslight", scores(value))


def table4() -> Iterator[Row]:
    """Yields convolutional networks, by DINO and by SSLight."""
    values = {"resnet18": (69.8, 89.1), "resnet34": (73.3, 91.4), "resnet50": (76.1, 92.9)}
    for student, value in {MOBILE: (71.9, 90.3), **values}.items():
        yield Row(f"{student}/supervised", printed=scores(value), missing=SUPERVISED)
    for student, (dino, sslight) in CNNS.items():
        yield alone("dino", f"{student}/dino", student, "sslight", scores(dino))
        yield _ours(f"{student}/ours", student, scores(sslight))


def table5() -> Iterator[Row]:
    """Yields transformers, by DINO and by SSLight."""
    for student, value in (("vit_tiny_p16", (72.2, 91.1)), ("vit_small_p16", (79.9, 95.0))):
        yield Row(f"{student}/supervised", printed=scores(value), missing=quoted(student))
    for student, (dino, sslight) in VITS.items():
        yield _ours(f"{student}/dino", student, scores(dino), "views=baseline")
        yield _ours(f"{student}/ours", student, scores(sslight))


def figure4() -> Iterator[Row]:
    """Yields the figure of Tables 4 and 5."""
    yield sizes("sslight/table4 and table5", "linear_sslight")


def figure1() -> Iterator[Row]:
    """Yields smallest shares of global crops, then largest ones of local crops."""
    for scale in SCALES:
        yield _chosen(f"global/{scale}", ("augment.scale", (scale, 1.0)),
                      ("local.scale", (0.05, 0.14)), ("local.size", 96), DEFAULT_ALPHA)  # fmt: skip
    for scale in SCALES:
        yield _chosen(f"local/{scale}", ("local.scale", (0.05, scale)), ("local.size", 96),
                      DEFAULT_ALPHA)  # fmt: skip


def figure2() -> Iterator[Row]:
    """Yields sizes of local crops; the best are 103 px with scale 0.14 and 128 px with 0.3."""
    for scale in (0.14, 0.3):
        for size in (96, 103, 128, 160):
            yield _chosen(f"{scale}/{size}", ("augment.scale", (scale, 1.0)),
                          ("local.scale", (0.05, scale)), ("local.size", size),
                          DEFAULT_ALPHA)  # fmt: skip


def figure3() -> Iterator[Row]:
    """Yields numbers of local views, then shares of the global views in the loss."""
    for count in (2, 4, 6, 8, 10):
        yield _chosen(f"views/{count}", ("local.count", count), DEFAULT_ALPHA)
    for alpha in (-1.0, 0.2, 0.3, 0.4, 0.6):
        yield _chosen(f"alpha/{alpha}", ("objectives.self_distill.global_share", alpha))


def detection() -> Iterator[Row]:
    """Yields fine-tuned detectors with a feature pyramid."""
    yield Row("all", missing=f"{DETECTION} (here with a feature pyramid, FPN)")


def table7() -> Iterator[Row]:
    """Yields other methods, and SSLight with 200 and 400 epochs; see DisCo and RETRO for theirs."""
    yield Row(
        "resnet18/shi", printed={"top1": 55.7},
        missing="how long SEED distils the network from which `moco_small` starts",
    )  # fmt: skip
    yield alone("ressl", "resnet18/ressl", "resnet18", "ressl", {"top1": 58.1})
    for student, compress, simreg in ((MOBILE, 65.8, 69.1), ("resnet18", 62.6, 65.1)):
        for name, top1 in (("compress", compress), ("simreg", simreg)):
            cell = f"{student}/{name}"
            yield distilled(name, cell, student, MOCO_800, "compress", {"top1": top1})
    for student, (_, value) in CNNS.items():
        if student != "resnet50":
            yield _ours(f"{student}/ours", student, scores(value))
    for student, value in (
        (MOBILE, (68.8, 88.3)), ("resnet18", (66.8, 87.3)), ("resnet34", (70.8, 90.0)),
    ):  # fmt: skip
        yield _ours(f"{student}/ours_400", student, scores(value), "epochs=400")


def table9() -> Iterator[Row]:
    """Yields all layers trained on few labels; Table 10 repeats ResNet-18's."""
    for student, lines in TABLE9.items():
        rows = (
            alone("dino", f"{student}/dino", student, "sslight", {}),
            _ours(f"{student}/ours", student, {}),
            _ours(f"{student}/ours_400", student, {}, "epochs=400"),
        )
        for row, line in zip(rows, lines, strict=True):
            for percent, value in zip((1, 10), line, strict=True):
                evaluation = Evaluation(
                    f"semi:protocol=sslight,percent={percent},student={student}"
                )
                yield dataclasses.replace(
                    row, id=f"{row.id}/{percent}", evaluation=evaluation, printed=scores(value)
                )


def _chosen(cell: str, *changes: tuple[str, Any]) -> Row:
    """Returns a cell of MobileNetV2 that is scored on held-out training images."""
    evaluation = dataclasses.replace(linear("sslight", MOBILE), changes=HELD_OUT)
    return Row(
        f"{MOBILE}/{cell}", f"sslight_dino:student={MOBILE}", evaluation, changes,
        note="values are drawn; the ticks of the axis are this package's",
    )  # fmt: skip


def _baselines() -> Iterator[Row]:
    """Yields three methods with the baseline's views (Tables 1 and 3)."""
    values = {"sslight_moco": (60.6, 83.3), "sslight_swav": (65.2, 85.6)}
    for recipe, value in values.items():
        cell = f"{MOBILE}/{recipe.removeprefix('sslight_')}"
        yield alone(f"{recipe}:views=baseline", cell, MOBILE, "sslight", scores(value))
    yield alone("dino", f"{MOBILE}/dino", MOBILE, "sslight", scores((66.2, 86.4)))


def _ours(cell: str, student: str, printed: dict[str, float], *arguments: str) -> Row:
    """Returns a cell of DINO with SSLight's views."""
    reference = ",".join((f"sslight_dino:student={student}", *arguments))
    return Row(cell, reference, linear("sslight", student), printed=printed)
