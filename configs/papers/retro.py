"""RETRO: reusing the teacher's projection head for efficient embedding distillation."""

import dataclasses
from collections.abc import Iterator

from disco_jax.configs.papers import disco
from disco_jax.configs.papers.common import (
    DETECTION,
    RESNET101,
    RESNET152,
    STUDENTS,
    TEACHERS,
    alone,
    distilled,
    per_student,
    sizes,
)
from disco_jax.report.rows import Evaluation, Row, Table, table

PAPER = "RETRO"
# Section 4.1: as DisCo's, with a longer training of ResNet-152 and another ResNet-101.
RETRO_TEACHERS = {
    **TEACHERS,
    "resnet101": dataclasses.replace(RESNET101, top1=70.3, row=""),
    "resnet152": dataclasses.replace(
        RESNET152,
        about="MoCo-v2, 800 epochs",
        recipe="moco_v2:student=resnet152,epochs=800",
        row="",
    ),
}
TABLE1 = {
    "resnet50": ((66.9, 88.2), (67.1, 88.4), (66.2, 87.2), (62.9, 85.4), (64.1, 86.8)),
    "resnet101": ((69.3, 89.8), (69.9, 89.9), (67.5, 88.6), (64.8, 86.6), (66.1, 87.9)),
    "resnet152": ((69.8, 90.2), (73.7, 91.4), (68.0, 86.2), (66.9, 88.1), (69.4, 89.9)),
    "resnet50w2": ((70.2, 90.4), (73.8, 91.6), (70.1, 89.2), (65.9, 87.1), (68.9, 89.7)),
}
RETRO_TOP1 = tuple(value[0] for value in TABLE1["resnet50"])
BINGO = {
    "resnet50": (None, None, None, (61.4, 84.3), (63.5, 85.7)),
    "resnet152": (None, None, None, (65.9, 87.1), (69.1, 88.9)),
    "resnet50w2": (None, None, None, (65.5, 87.0), (68.9, 89.0)),
}
# Table 2, ResNet-18, top-1 with 1 % and 10 % of the labels.
TABLE2 = {
    ("moco_v2", "none"): (30.9, 45.8),
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
# Method -> its protocol of few labels.
SEMI = {"moco_v2": "disco", "seed": "seed", "disco": "disco", "bingo": "bingo", "retro": "retro"}


def tables() -> tuple[Table, ...]:
    """Returns the tables and figures in the order of the paper."""
    return (
        table("retro/figure1", f"{PAPER}, Figure 1", "accuracy and parameters", figure1()),
        table("retro/table1", f"{PAPER}, Table 1", "students and teachers", table1()),
        table("retro/table2", f"{PAPER}, Table 2", "1 % and 10 % of the labels", table2()),
        table("retro/figure4", f"{PAPER}, Figure 4", "transfer to CIFAR", figure4()),
        table("retro/table3", f"{PAPER}, Table 3", "detection, segmentation", table3()),
        table("retro/table4", f"{PAPER}, Table 4", "parts of the method", table4()),
        table("retro/figure3", f"{PAPER}, Figure 3", "forward passes of a step", figure3()),
        table("retro/table5", f"{PAPER}, Table 5", "learned parameters", table5()),
        table("retro/table6", f"{PAPER}, Table 6", "other distillations", table6()),
    )


def figure1() -> Iterator[Row]:
    """Yields the figure of Table 1's students."""
    yield sizes("retro/table1", "linear_disco")


def table1() -> Iterator[Row]:
    """Yields the baseline, RETRO and BINGO; DisCo's and SEED's lines are in their own tables."""
    # Top-5 of ResNet-34 is 81.1 here and 81.4 in DisCo's Table 1.
    baseline = (*disco.BASELINE[:-1], (56.8, 81.1))
    for student, printed in per_student(baseline):
        yield alone("moco_v2", f"{student}/none", student, "disco", printed)
    for name, values in TABLE1.items():
        for student, printed in per_student(values):
            cell, teacher = f"{student}/{name}", RETRO_TEACHERS[name]
            yield distilled("retro", cell, student, teacher, "disco", printed)
    for name, lines in BINGO.items():
        for student, printed in per_student(lines):
            cell, teacher = f"{student}/bingo_{name}", RETRO_TEACHERS[name]
            yield distilled("bingo", cell, student, teacher, "bingo", printed)


def table2() -> Iterator[Row]:
    """Yields ResNet-18 with few labels, by the protocol of each method's paper."""
    for (method, name), values in TABLE2.items():
        for percent, top1 in zip((1, 10), values, strict=True):
            arguments = "student=resnet18"
            teacher = None if name == "none" else RETRO_TEACHERS[name]
            if teacher is not None:
                arguments += f",teacher={teacher.backbone}"
            yield Row(
                f"resnet18/{method}_{name}/{percent}", f"{method}:{arguments}",
                Evaluation(f"semi:protocol={SEMI[method]},percent={percent},student=resnet18"),
                teacher=teacher, printed={"top1": top1},
            )  # fmt: skip


def figure4() -> Iterator[Row]:
    """Yields linear classifiers on CIFAR; the values are drawn."""
    for data in ("cifar10", "cifar100"):
        for student in disco.CIFAR_STUDENTS:
            for name in disco.SEMI_TEACHERS:
                yield Row(
                    f"{student}/{name}/{data}", f"retro:student={student},teacher={name}",
                    Evaluation(f"transfer:protocol=disco,data={data}"),
                    teacher=RETRO_TEACHERS[name],
                )  # fmt: skip


def table3() -> Iterator[Row]:
    """Yields detection and segmentation with ResNet-34: AP of boxes and masks."""
    printed = {
        "voc": {
            "resnet50": (57.2, 81.4, 63.3), "resnet101": (57.3, 81.8, 63.5),
            "resnet152": (57.5, 81.9, 64.1),
        },
        "coco": {
            "resnet50": (41.5, 60.2, 45.3), "resnet101": (41.5, 60.3, 45.4),
            "resnet152": (41.4, 60.6, 45.4),
        },
        "coco_masks": {
            "resnet50": (35.9, 57.8, 38.8), "resnet101": (36.0, 57.8, 38.9),
            "resnet152": (36.1, 57.3, 39.2),
        },
    }  # fmt: skip
    for data, lines in printed.items():
        for name, values in lines.items():
            metrics = dict(zip(("AP", "AP50", "AP75"), values, strict=True))
            yield Row(f"resnet34/{name}/{data}", printed=metrics, missing=DETECTION)


def table4() -> Iterator[Row]:
    """Yields DisCo, the reused head, and the symmetric loss."""
    methods = {
        "disco": ("disco", disco.DISCO_TOP1),
        "head": ("retro:symmetric=false", (66.7, 66.9, 65.8, 62.5, 63.4)),
        "retro": ("retro", RETRO_TOP1),
    }
    for name, (recipe, values) in methods.items():
        for student, printed in per_student(values):
            teacher = RETRO_TEACHERS["resnet50"]
            yield distilled(recipe, f"{student}/{name}", student, teacher, "disco", printed)


def figure3() -> Iterator[Row]:
    """Yields the count of forward passes."""
    yield Row("plot", command="disco-jax list", note="forward passes of every recipe")


def table5() -> Iterator[Row]:
    """Yields the learned parameters, in units of 2^20."""
    values = {
        "disco": (6.57, 8.96, 6.76, 11.91, 21.55),
        "retro": (6.32, 8.71, 6.51, 11.66, 21.30),
    }
    for method, line in values.items():
        for student, millions in zip(STUDENTS, line, strict=True):
            yield Row(
                f"{student}/{method}", printed={"parameters": millions},
                command=f"disco-jax pretrain --config {method}:student={student} --workdir RUN",
                note="the first line that a training prints",
            )  # fmt: skip


def table6() -> Iterator[Row]:
    """Yields other distillations of ResNet-18."""
    teacher, student = RETRO_TEACHERS["resnet50"], "resnet18"
    kd = Evaluation(f"finetune:protocol=kd,student={student}")
    yield alone("moco_v2", f"{student}/none", student, "disco", {"top1": 52.2})
    yield Row(  # 51.5 in DisCo's Table 2; the value is SEED's, whose KD may be another
        f"{student}/kd", f"moco_v2:student={student}", kd, printed={"top1": 55.3}
    )
    yield distilled("rkd", f"{student}/rkd", student, teacher, "disco", {"top1": 61.6})
    yield Row(
        f"{student}/kd_disco", f"disco:student={student},teacher=resnet50", kd, teacher=teacher,
        printed={"top1": 60.6},
    )  # fmt: skip
    yield distilled(
        "rkd:disco=true", f"{student}/rkd_disco", student, teacher, "disco", {"top1": 60.6}
    )
    yield distilled("bingo", f"{student}/bingo", student, teacher, "bingo", {"top1": 61.4})
    yield distilled("retro", f"{student}/retro", student, teacher, "disco", {"top1": 62.9})
