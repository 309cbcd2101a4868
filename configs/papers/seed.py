"""SEED: self-supervised distillation for visual representation (arXiv:2101.04731).

The bodies of most tables are lost in our copy of the paper. Values are those that its text, DisCo
(2104.09124) and SSLight (2210.02808) give.
"""

import dataclasses
from collections.abc import Iterator

from disco_jax.configs.papers.common import (
    DETECTION,
    MOCO_800,
    RESNET50,
    STUDENTS,
    SWAV_RESNET50,
    TEACHERS,
    distilled,
    linear,
    per_student,
    quoted,
    sizes,
)
from disco_jax.report.rows import Evaluation, Row, Table, Teacher, table

PAPER = "SEED (2101.04731)"
# SEED's own EfficientNets and MobileNetV3; ids have the names of the tables.
RESNETS = ("resnet18", "resnet34", "resnet50")
NETWORKS = {name: name if name in RESNETS else f"{name}_seed" for name in STUDENTS}
SEED_TEACHERS = {
    **TEACHERS,
    "resnet101": dataclasses.replace(TEACHERS["resnet101"], top1=70.3, row=""),
    "resnet152": dataclasses.replace(TEACHERS["resnet152"], top1=74.2),
}
MOCO_TEACHERS = ("resnet50", "resnet101", "resnet152")
# Figure 5: MoCo-v2 teachers twice as wide.
WIDE_TEACHERS = {
    name: Teacher(name, "MoCo-v2, 200 epochs", f"moco_v2:student={name}")
    for name in ("resnet50w2", "resnet101w2", "resnet152w2")
}
# Table 3: a published SimCLR network, whose length of training is lost in our copy.
SIMCLR = Teacher("resnet50", "SimCLR", shape="simclr:student=resnet50")
# Linear evaluation, top-1 and top-5, of `STUDENTS`.
TABLE1 = {
    "resnet50": ((61.3, 82.7), (61.4, 83.1), (55.2, 80.3), (57.6, 81.8), (58.5, 82.6)),
    "resnet101": ((63.0, 83.8), (63.4, 84.6), (59.9, 83.5), (58.9, 82.5), (61.6, 84.9)),
    "resnet152": ((65.3, 86.0), (67.3, 86.9), (61.4, 84.6), (59.5, 83.3), (62.7, 85.8)),
    "resnet50w2": ((67.6, 87.4), (68.0, 87.6), (68.2, 88.2), (63.0, 84.9), (65.7, 86.8)),
}
# Baselines that the abstract gives, and SSLight's section 1.
BASELINE = {"efficientnet_b0": 42.2, "mobilenetv3_large": 36.3, "resnet18": 52.5}
# Appendix A.1.2: weight decay of EfficientNets and MobileNets.
SMALL_DECAY = "weight_decay=1e-5"
# Appendix A.8: settings of the ablations under SwAV's ResNet-50.
ABLATION = "seed:teacher_method=swav,views=small_patch,weight_decay=1e-6"
QUOTED = f"{PAPER}, Table 1, as printed in DisCo (2104.09124)"
LOST = "the values of the axis are lost in our copy of the paper"
TEMPERATURES = (0.0, 1e-3, 1e-2, 3e-2, 0.1, 0.2)
QUEUES = (128, 512, 1024, 4096, 8192, 16_384, 65_536)


def tables() -> tuple[Table, ...]:
    """Returns the tables and figures in the order of the paper."""
    return (
        table("seed/figure1", f"{PAPER}, Figure 1", "accuracy and parameters", figure1()),
        table("seed/table1", f"{PAPER}, Table 1", "students and teachers", table1()),
        table("seed/figure3", f"{PAPER}, Figure 3", "1 % and 10 % of the labels", figure3()),
        table("seed/figure4", f"{PAPER}, Figure 4", "transfer to CIFAR and SUN-397", figure4()),
        table("seed/table2", f"{PAPER}, Table 2", "detection, segmentation", detection()),
        table("seed/table3", f"{PAPER}, Table 3", "variants of the teacher", table3()),
        table("seed/figure5", f"{PAPER}, Figure 5", "wider teachers", figure5()),
        table("seed/table4", f"{PAPER}, Table 4", "other targets", table4()),
        table("seed/table5", f"{PAPER}, Table 5", "teacher temperature", table5()),
        table("seed/table6", f"{PAPER}, Table 6", "a shallow head", table6()),
        table("seed/section_a7", f"{PAPER}, appendix A.7", "with supervised KD", section_a7()),
        table("seed/table8", f"{PAPER}, Table 8", "ResNet-50 as the student", table8()),
        table("seed/table9", f"{PAPER}, Table 9", "detection on VOC", detection()),
        table("seed/table10", f"{PAPER}, Table 10", "detection on COCO", detection()),
        table("seed/table11", f"{PAPER}, Table 11", "which views", table11()),
        table("seed/figure7", f"{PAPER}, Figure 7", "length of the queue", figure7()),
        table("seed/table13", f"{PAPER}, Table 13", "learning rate", _axis("learning_rate", 0.03)),
        table("seed/table14", f"{PAPER}, Table 14", "weight decay", _axis("weight_decay", 1e-6)),
    )


def figure1() -> Iterator[Row]:
    """Yields the figure of Table 1's students."""
    yield sizes("seed/table1", "linear_seed")


def table1() -> Iterator[Row]:
    """Yields supervised training, baselines and SEED, by linear probe and by neighbours."""
    for name, student in NETWORKS.items():
        yield Row(f"{name}/supervised", missing=quoted(name))
        printed = {"top1": BASELINE[name]} if name in BASELINE else {}
        row = _baseline(f"{name}/none", student, printed)
        yield from (row, _neighbours(row))
    for teacher, values in TABLE1.items():
        for name, printed in per_student(values):
            row = _seed(f"{name}/{teacher}", NETWORKS[name], SEED_TEACHERS[teacher], printed)
            row = dataclasses.replace(row, source=QUOTED)
            yield from (row, _neighbours(row))


def figure3() -> Iterator[Row]:
    """Yields linear classifiers on few labels; the values are drawn."""
    for name, student in NETWORKS.items():
        for teacher in ("none", *MOCO_TEACHERS):
            for percent in (1, 10):
                evaluation = Evaluation(f"semi:protocol=seed,percent={percent},student={student}")
                yield _pretrained(f"{name}/{teacher}/{percent}", student, teacher, evaluation)


def figure4() -> Iterator[Row]:
    """Yields linear classifiers on offline features of other data sets; the values are drawn."""
    for data in ("cifar10", "cifar100", "sun397"):
        for network in ("efficientnet_b0", "resnet18"):
            for teacher in ("none", *MOCO_TEACHERS):
                evaluation = Evaluation(f"transfer:protocol=seed,data={data}")
                cell, student = f"{network}/{teacher}/{data}", NETWORKS[network]
                row = _pretrained(cell, student, teacher, evaluation)
                yield dataclasses.replace(
                    row, note="the paper's rate 0.001; `protocol=seed_search` searches it"
                )  # fmt: skip


def detection() -> Iterator[Row]:
    """Yields fine-tuned detectors; the values are lost in our copy."""
    yield Row("resnet18", missing=DETECTION)


def table3() -> Iterator[Row]:
    """Yields ResNet-18 under ResNet-50s of several methods and lengths."""
    yield _baseline("resnet18/none", "resnet18", {"top1": 52.5})
    yield _seed("resnet18/moco_v2", "resnet18", RESNET50, {"top1": 57.6})
    yield _seed("resnet18/moco_v2_800", "resnet18", MOCO_800, {})
    yield _seed("resnet18/swav", "resnet18", SWAV_RESNET50, {})
    yield distilled(
        "seed:teacher_method=swav,views=small_patch", "resnet18/swav_patches", "resnet18",
        SWAV_RESNET50, "seed", {},
    )  # fmt: skip
    yield distilled("seed:teacher_method=simclr", "resnet18/simclr", "resnet18", SIMCLR, "seed", {})


def figure5() -> Iterator[Row]:
    """Yields students under wider teachers; the values are drawn."""
    for network in ("efficientnet_b0", "resnet18"):
        for name, teacher in WIDE_TEACHERS.items():
            cell = f"{network}/{name}"
            yield distilled("seed", cell, NETWORKS[network], teacher, "seed", {})


def table4() -> Iterator[Row]:
    """Yields ResNet-18 under ResNet-50 with other targets (appendix A.4)."""
    recipes = {
        "l2": ("squared_distance", None),
        "online_clusters": ("online_clusters", 56.4),
        "binary_contrast": ("binary_contrast", None),
        "seed": ("seed", 57.9),
    }
    for name, (recipe, top1) in recipes.items():
        printed = {} if top1 is None else {"top1": top1}
        yield distilled(recipe, f"resnet18/{name}", "resnet18", RESNET50, "seed", printed)
    yield distilled(
        "seed:moco=true", "resnet18/seed_moco", "resnet18", RESNET50, "seed", {"top1": 57.6},
        note="the weights of the two losses are not given: 1 and 1",
    )  # fmt: skip
    for clusters in (4096, 16_384):
        yield Row(
            f"resnet18/kmeans_{clusters}", f"pseudo_labels:student=resnet18,clusters={clusters}",
            linear("seed", "resnet18"), printed={"top1": 51.0},
            note="the paper gives 51.0 and says that the number of clusters hardly matters",
        )  # fmt: skip


def table5() -> Iterator[Row]:
    """Yields teacher temperatures, 0 being one-hot; the best on ImageNet is 0.01."""
    for temperature in TEMPERATURES:
        yield distilled(
            "seed", f"imagenet/{temperature:g}", "resnet18", RESNET50, "seed",
            {"top1": 57.6} if temperature == 0.01 else {},
            changes=(("objectives.similarity.teacher_temperature", temperature),),
        )  # fmt: skip
    for data in ("cifar10", "cifar100"):
        teacher = Teacher(
            "resnet50", f"MoCo-v2 on {data}, 200 epochs", f"moco_v2:student=resnet50,data={data}"
        )
        for temperature in TEMPERATURES:
            yield distilled(
                f"seed:data={data}", f"{data}/{temperature:g}", "resnet18", teacher, "seed", {},
                changes=(("objectives.similarity.teacher_temperature", temperature),),
                note="the training of teacher and probe on CIFAR is not described",
            )  # fmt: skip


def table6() -> Iterator[Row]:
    """Yields baselines with linear heads, before and after distillation; the values are lost."""
    for name in ("efficientnet_b0", "mobilenetv3_large"):
        yield _baseline(f"{name}/none", NETWORKS[name], {}, "hidden=0")
        yield distilled("seed:hidden=0", f"{name}/resnet50", NETWORKS[name], RESNET50, "seed", {})


def section_a7() -> Iterator[Row]:
    """Yields ResNet-18 with a 3x3 stem, fine-tuned on CIFAR-100."""
    values = {"plain": 75.2, "seed": 75.4, "kd": 76.0, "seed_kd": 78.1}
    for name, top1 in values.items():
        yield Row(
            f"resnet18/{name}", printed={"top1": top1},
            missing="epochs and rates of the fine-tuning of all layers, which are not described",
        )  # fmt: skip


def table8() -> Iterator[Row]:
    """Yields ResNet-50 under deeper teachers; the values are lost."""
    yield _baseline("resnet50/none", "resnet50", {"top1": 67.4})
    for teacher in ("resnet50", "resnet101", "resnet152", "resnet50w2"):
        row = _seed(f"resnet50/{teacher}", "resnet50", SEED_TEACHERS[teacher], {})
        yield from (row, _neighbours(row))


def table11() -> Iterator[Row]:
    """Yields strategies of views under SwAV's ResNet-50; the values are lost."""
    for views in ("identical", "cross", "to_large", "small_patch"):
        recipe, cell = f"seed:teacher_method=swav,views={views}", f"resnet18/{views}"
        yield distilled(recipe, cell, "resnet18", SWAV_RESNET50, "seed", {})


def figure7() -> Iterator[Row]:
    """Yields lengths of the queue; 65,536 is 1.5 points better than 256."""
    for size in QUEUES:
        yield distilled(
            ABLATION, f"resnet18/{size}", "resnet18", SWAV_RESNET50, "seed", {},
            changes=(("objectives.similarity.queue_size", size),),
        )  # fmt: skip


def _axis(name: str, value: float) -> Iterator[Row]:
    """Yields the cell of Tables 13 and 14 whose value is known, and what is lost of the others."""
    cell = f"resnet18/{name}={value:g}"
    yield distilled(ABLATION, cell, "resnet18", SWAV_RESNET50, "seed", {})
    yield Row("resnet18/others", missing=LOST)


def _baseline(cell: str, student: str, printed: dict[str, float], *arguments: str) -> Row:
    """Returns a MoCo-v2 baseline."""
    decay = () if student in RESNETS else (SMALL_DECAY,)
    reference = ",".join((f"moco_v2:student={student}", *decay, *arguments))
    return Row(cell, reference, linear("seed", student), printed=printed)


def _seed(cell: str, student: str, teacher: Teacher, printed: dict[str, float]) -> Row:
    """Returns a student of SEED; under SwAV's ResNet-50x2 with small patches and 800 epochs."""
    recipe = "seed"
    if teacher.recipe.startswith("swav"):
        recipe = "seed:teacher_method=swav"
    if teacher.backbone == "resnet50w2":
        recipe += ",views=small_patch,epochs=800"
    return distilled(recipe, cell, student, teacher, "seed", printed)


def _neighbours(row: Row) -> Row:
    """Returns a cell whose embedding is scored by nearest neighbours; the values are lost."""
    return dataclasses.replace(
        row, id=f"{row.id}/knn", evaluation=Evaluation("knn:protocol=seed"), printed={}
    )


def _pretrained(cell: str, student: str, teacher: str, evaluation: Evaluation) -> Row:
    """Returns a cell for one of Table 1's networks; `teacher` is a name, or "none"."""
    if teacher == "none":
        return dataclasses.replace(_baseline(cell, student, {}), evaluation=evaluation)
    row = _seed(cell, student, SEED_TEACHERS[teacher], {})
    return dataclasses.replace(row, evaluation=evaluation)
