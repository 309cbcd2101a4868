"""DisCo: distilled contrastive learning on lightweight models (arXiv:2104.09124), and appendix."""

from collections.abc import Iterator, Mapping

from disco_jax.configs.papers.common import (
    DETECTION,
    RESNET50,
    RESNET50W2,
    SELA_RESNET50,
    STUDENTS,
    SWAV_RESNET50,
    TEACHERS,
    alone,
    distilled,
    linear,
    per_student,
    quoted,
    sizes,
)
from disco_jax.report.rows import Evaluation, Row, Table, Teacher, table

PAPER = "DisCo (2104.09124)"
# Teachers of the appendix, Table 3: DINO's released files, section 6 and disagreement N1.
VIT_SMALL = Teacher(
    "vit_small_p16",
    "DINO, released file",
    shape="dino:student=vit_small_p16",
    network="momentum",
    file="dino_deitsmall16_pretrain_full_checkpoint.pth",
    top1=77.0,
)
XCIT_SMALL = Teacher(
    "xcit_small_12_p16",
    "DINO, released file",
    shape="dino:student=xcit_small_12_p16",
    network="momentum",
    file="dino_xcit_small_12_p16_pretrain_full_checkpoint.pth",
    top1=77.8,
)
# Students of figures 6 and 9, and of the semi-supervised ones.
CIFAR_STUDENTS = ("resnet18", "efficientnet_b0")
SEMI_TEACHERS = ("resnet50", "resnet101", "resnet152")
WIDTHS = (0, 512, 1024, 1280, 2048, 4096, 8192)

# Linear evaluation on ImageNet, top-1 and top-5, of `STUDENTS`.
SUPERVISED_SCORES = ((77.1, 93.3), (79.2, 94.4), 75.2, 72.1, 75.0)
BASELINE = ((46.8, 72.2), (48.4, 73.8), (36.2, 62.1), (52.2, 77.6), (56.8, 81.4))
TABLE1 = {
    "resnet50": ((66.5, 87.6), (66.6, 87.5), (64.4, 86.2), (60.6, 83.7), (62.5, 85.4)),
    "resnet101": ((68.9, 88.9), (69.0, 89.1), (65.7, 86.7), (62.3, 85.1), (64.4, 86.5)),
    "resnet152": ((67.8, 87.0), (73.1, 91.2), (63.7, 84.9), (65.5, 86.7), (68.1, 88.6)),
    "resnet50w2": ((69.1, 88.9), (64.0, 84.6), (58.9, 81.4), (65.2, 86.8), (67.6, 88.6)),
}
# Top-1 of the baseline and of DisCo under ResNet-50, which other tables repeat.
BASELINE_TOP1 = tuple(value[0] for value in BASELINE)
DISCO_TOP1 = tuple(value[0] for value in TABLE1["resnet50"])
# Section 4.2: student, epochs, top-1 with the teacher ResNet-50x2.
LONGER = (("efficientnet_b1", 290, 70.4), ("mobilenetv3_large", 340, 64.0))


def tables() -> tuple[Table, ...]:
    """Returns the tables and figures in the order of the paper."""
    return (
        table("disco/teachers", f"{PAPER}, Tables 1 and 5", "the teachers", teachers()),
        table("disco/figure1", f"{PAPER}, Figure 1", "accuracy and parameters", figure1()),
        table("disco/table1", f"{PAPER}, Table 1", "students and teachers", table1()),
        table("disco/figure5", f"{PAPER}, Figure 5", "1 % and 10 % of the labels", figure5()),
        table("disco/figure6", f"{PAPER}, Figure 6", "transfer to CIFAR", figure6()),
        table("disco/figure7", f"{PAPER}, Figure 7", "information plane", figure7()),
        table("disco/table2", f"{PAPER}, Table 2", "other distillations", table2()),
        table("disco/table3", f"{PAPER}, Table 3", "detection, segmentation", table3()),
        table("disco/table4", f"{PAPER}, Table 4", "width of the head", table4()),
        table("disco/figure9", f"{PAPER}, Figure 9", "more widths of the head", figure9()),
        table("disco/table5", f"{PAPER}, Table 5", "SwAV as the testbed", table5()),
        table("disco/table6", f"{PAPER}, Table 6", "methods of the teacher", table6()),
        table("disco/figure8", f"{PAPER}, Figure 8", "t-SNE of three networks", figure8()),
        table("disco/appendix3", f"{PAPER}, appendix Table 3", "DINO as the testbed", appendix3()),
    )


def teachers() -> Iterator[Row]:
    """Yields the pre-training of the teachers, which the tables head with their top-1."""
    for name, teacher in {**TEACHERS, "swav_resnet50": SWAV_RESNET50}.items():
        protocol = "swav" if teacher.recipe.startswith("swav") else "disco"
        evaluation = linear(protocol, teacher.backbone)
        yield Row(
            name, teacher.recipe, evaluation, teacher.changes, printed={"top1": teacher.top1 or 0.0}
        )


def figure1() -> Iterator[Row]:
    """Yields the figure of Table 1's students under ResNet-50."""
    yield sizes("disco/table1", "linear_disco")


def table1() -> Iterator[Row]:
    """Yields supervised training, the baseline, and DisCo under four teachers."""
    for student, printed in per_student(SUPERVISED_SCORES):
        yield Row(f"{student}/supervised", printed=printed, missing=quoted(student))
    for student, printed in per_student(BASELINE):
        yield alone("moco_v2", f"{student}/none", student, "disco", printed)
    for name, values in TABLE1.items():
        for student, printed in per_student(values):
            cell = f"{student}/{name}"
            yield distilled("disco", cell, student, TEACHERS[name], "disco", printed)
    for student, epochs, top1 in LONGER:
        cell = f"{student}/resnet50w2_{epochs}"
        yield distilled(
            f"disco:epochs={epochs}", cell, student, RESNET50W2, "disco", {"top1": top1},
            source=f"{PAPER}, section 4.2",
        )  # fmt: skip


def figure5() -> Iterator[Row]:
    """Yields linear classifiers on few labels; MobileNetV3 is in the appendix, Figure 1."""
    for student in STUDENTS:
        for name in ("none", *SEMI_TEACHERS):
            for percent in (1, 10):
                evaluation = Evaluation(f"semi:protocol=disco,percent={percent},student={student}")
                yield _pretrained(f"{student}/{name}/{percent}", student, name, evaluation)


def figure6() -> Iterator[Row]:
    """Yields linear classifiers on CIFAR-100; CIFAR-10 is in the appendix, Figure 2."""
    for data in ("cifar10", "cifar100"):
        for student in CIFAR_STUDENTS:
            for name in ("none", *SEMI_TEACHERS):
                evaluation = Evaluation(f"transfer:protocol=disco,data={data}")
                yield _pretrained(f"{student}/{name}/{data}", student, name, evaluation)


def figure7() -> Iterator[Row]:
    """Yields the information plane of students with narrow and wide heads."""
    for student in ("resnet18", "resnet34"):
        for hidden in (512, 2048):
            yield Row(
                f"{student}/{hidden}", f"disco:student={student},teacher=resnet50",
                Evaluation("plane:protocol=code,data=cifar10"), (("student.hidden", hidden),),
                RESNET50,
            )  # fmt: skip


def table2() -> Iterator[Row]:
    """Yields single knowledge, then DisCo with each."""
    recipes = {
        "at": ("attention", (57.1, 58.2, 51.0, 56.2, 60.2)),
        "rkd": ("rkd", (48.3, 50.3, 36.9, 56.4, 58.7)),
        "disco": ("disco", DISCO_TOP1),
        "at_disco": ("attention:disco=true", (66.7, 66.3, 64.1, 60.2, 62.3)),
        "rkd_disco": ("rkd:disco=true", (66.8, 66.5, 64.4, 60.6, 62.3)),
    }
    for student, printed in per_student(BASELINE_TOP1):
        yield alone("moco_v2", f"{student}/none", student, "disco", printed)
    for name, (recipe, values) in recipes.items():
        for student, printed in per_student(values):
            yield distilled(recipe, f"{student}/{name}", student, RESNET50, "disco", printed)
    # KD distils classes while the linear classifier is trained.
    kd = {"kd": (46.5, 48.5, 37.3, 51.5, 58.8), "kd_disco": (65.8, 65.9, 65.2, 60.6, 65.9)}
    for name, values in kd.items():
        for student, printed in per_student(values):
            yield _pretrained(
                f"{student}/{name}", student, "none" if name == "kd" else "resnet50",
                Evaluation(f"finetune:protocol=kd,student={student}"), printed,
            )  # fmt: skip


def table3() -> Iterator[Row]:
    """Yields detection and segmentation with ResNet-34: AP of boxes and masks."""
    printed = {
        "voc": {
            "none": (53.6, 79.1, 58.7), "resnet50": (56.5, 80.6, 62.5),
            "resnet101": (56.1, 80.3, 61.8), "resnet152": (56.6, 80.8, 63.4),
        },
        "coco": {
            "none": (38.1, 56.8, 40.7), "resnet50": (40.0, 59.1, 43.4),
            "resnet101": (40.0, 59.1, 43.2), "resnet152": (39.4, 58.7, 42.7),
        },
        "coco_masks": {
            "none": (33.0, 53.2, 35.3), "resnet50": (34.9, 56.3, 37.1),
            "resnet101": (34.7, 55.9, 37.4), "resnet152": (34.4, 55.4, 36.7),
        },
    }  # fmt: skip
    for data, lines in printed.items():
        for name, values in lines.items():
            metrics = dict(zip(("AP", "AP50", "AP75"), values, strict=True))
            yield Row(f"resnet34/{name}/{data}", printed=metrics, missing=DETECTION)


def table4() -> Iterator[Row]:
    """Yields heads as wide as the features (DisCo*) and 2048 wide; SEED's line is seed/table1."""
    for student, printed in per_student((65.6, 65.8, 63.8, 57.1, 58.9)):
        yield distilled("disco_star", f"{student}/features", student, RESNET50, "disco", printed)
    for student, printed in per_student(DISCO_TOP1):
        yield distilled("disco", f"{student}/2048", student, RESNET50, "disco", printed)


def figure9() -> Iterator[Row]:
    """Yields further widths; the figure's values are not printed."""
    for student in ("efficientnet_b0", "resnet18", "resnet34"):
        for hidden in WIDTHS:
            yield distilled(
                "disco", f"{student}/{hidden}", student, RESNET50, "disco", {},
                changes=(("student.hidden", hidden),),
            )  # fmt: skip


def table5() -> Iterator[Row]:
    """Yields SwAV alone and with DisCo, under SwAV's ResNet-50."""
    students = ("efficientnet_b0", "mobilenetv3_large", "resnet34")
    for student, printed in per_student((46.8, 19.4, 63.3), students):
        yield alone("swav", f"{student}/none", student, "swav", printed)
    for student, printed in per_student((62.4, 55.7, 63.3), students):
        yield distilled("swav_disco", f"{student}/disco", student, SWAV_RESNET50, "swav", printed)


def table6() -> Iterator[Row]:
    """Yields DisCo under ResNet-50s of three methods."""
    methods = {
        "moco_v2": (RESNET50, DISCO_TOP1),
        "sela_v2": (SELA_RESNET50, (62.2, 68.2, 66.2, 64.1, 65.3)),
        "swav": (SWAV_RESNET50, (70.0, 72.1, 65.0, 65.1, 67.5)),
    }
    for student, printed in per_student(BASELINE_TOP1):
        yield alone("moco_v2", f"{student}/none", student, "disco", printed)
    for name, (teacher, values) in methods.items():
        for student, printed in per_student(values):
            yield distilled("disco", f"{student}/{name}", student, teacher, "disco", printed)


def figure8() -> Iterator[Row]:
    """Yields the figure of EfficientNet-B0 and ResNet-50 by MoCo-v2, and B0 by DisCo."""
    yield Row(
        "plot",
        command="disco-jax tsne --workdir RESNET50 --config configs/tsne.py:protocol=disco "
        "--config.beside=\"('BASELINE','DISCO')\"",
        note="runs of disco/teachers/resnet50, disco/table1/efficientnet_b0/none and "
        "disco/table1/efficientnet_b0/resnet50",
    )


def appendix3() -> Iterator[Row]:
    """Yields DINO alone and with DisCo."""
    for student, printed in per_student((63.2, 67.0), ("vit_tiny_p16", "xcit_tiny_12_p16")):
        yield alone("dino", f"{student}/none", student, "dino", printed)
    for student, teacher, top1 in (
        ("vit_tiny_p16", VIT_SMALL, 68.4),
        ("xcit_tiny_12_p16", XCIT_SMALL, 71.1),
    ):
        yield distilled("dino_disco", f"{student}/disco", student, teacher, "dino", {"top1": top1})


def _pretrained(
    cell: str,
    student: str,
    teacher: str,
    evaluation: Evaluation,
    printed: Mapping[str, float] | None = None,
) -> Row:
    """Returns a cell for one of Table 1's networks; `teacher` is one of `TEACHERS`, or "none"."""
    printed = printed or {}
    if teacher == "none":
        return Row(cell, f"moco_v2:student={student}", evaluation, printed=printed)
    reference = f"disco:student={student},teacher={teacher}"
    return Row(cell, reference, evaluation, teacher=TEACHERS[teacher], printed=printed)
