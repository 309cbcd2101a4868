"""Students, teachers and protocols that the papers share."""

from collections.abc import Iterator, Sequence
from typing import Any

from disco_jax.report.rows import Evaluation, Row, Teacher

# Columns of the tables of DisCo, SEED and RETRO.
STUDENTS = ("efficientnet_b0", "efficientnet_b1", "mobilenetv3_large", "resnet18", "resnet34")

# What several cells lack.
DETECTION = "detection and segmentation are not implemented"
SUPERVISED = "a score by the network's own classifier; `supervised` trains it as torchvision does"
# The papers quote supervised results of other trainings.
QUOTED = {
    "efficientnet": "quoted from arXiv:1905.11946, whose training this package does not have",
    "mobilenet": "quoted from arXiv:1905.02244, whose training this package does not have",
    "resnet": "quoted from arXiv:1512.03385, with ten crops of each test image",
    "vit": "quoted from DeiT (arXiv:2012.12877), whose training this package does not have",
}

# Teachers of DisCo, section 4.1; their top-1 is that of DisCo's Table 1.
RESNET50 = Teacher(
    "resnet50",
    "MoCo-v2, 200 epochs",
    "moco_v2:student=resnet50",
    file="moco_v2_200ep_pretrain.pth.tar",
    top1=67.4,
    row="disco/teachers/resnet50",
)
RESNET101 = Teacher(
    "resnet101",
    "MoCo-v2, 200 epochs",
    "moco_v2:student=resnet101",
    top1=69.1,
    row="disco/teachers/resnet101",
)
RESNET152 = Teacher(  # DisCo's code publishes one of 800 epochs: disagreement M2
    "resnet152",
    "MoCo-v2, 400 epochs",
    "moco_v2:student=resnet152,epochs=400",
    top1=74.1,
    row="disco/teachers/resnet152",
)
RESNET50W2 = Teacher(  # the file is of 400 epochs, the paper says 800: disagreement D10
    "resnet50w2",
    "SwAV, 400 epochs",
    "swav:student=resnet50w2,script=rn50w2,epochs=400",
    file="swav_RN50w2_400ep_pretrain.pth.tar",
    top1=77.3,
    row="disco/teachers/resnet50w2",
)
SWAV_RESNET50 = Teacher(
    "resnet50",
    "SwAV, 800 epochs",
    "swav:student=resnet50,script=batch4096,epochs=800",
    file="swav_800ep_pretrain.pth.tar",
    top1=75.3,
    row="disco/teachers/swav_resnet50",
)
MOCO_800 = Teacher(
    "resnet50",
    "MoCo-v2, 800 epochs",
    "moco_v2:student=resnet50,epochs=800",
    file="moco_v2_800ep_pretrain.pth.tar",
)
SELA_RESNET50 = Teacher(
    "resnet50",
    "SeLa-v2, 400 epochs",
    shape="swav:student=resnet50",
    file="selav2_400ep_pretrain.pth.tar",
    top1=71.8,
)
TEACHERS = {
    "resnet50": RESNET50,
    "resnet101": RESNET101,
    "resnet152": RESNET152,
    "resnet50w2": RESNET50W2,
}


def linear(protocol: str, student: str) -> Evaluation:
    """Returns a linear evaluation on ImageNet by a paper's protocol."""
    return Evaluation(f"linear:protocol={protocol},student={student}")


def quoted(student: str) -> str:
    """Returns what a supervised cell of DisCo, SEED or RETRO lacks."""
    return next(text for prefix, text in QUOTED.items() if student.startswith(prefix))


def scores(value: Any) -> dict[str, float]:
    """Returns the printed metrics of a cell: top-1, (top-1, top-5), or None for an empty cell."""
    if value is None:
        return {}
    values = value if isinstance(value, tuple) else (value,)
    return dict(zip(("top1", "top5"), values, strict=False))


def sizes(cells: str, result: str) -> Row:
    """Returns a figure of top-1 and parameters.

    Args:
      cells: the cells whose runs it draws.
      result: name of their linear evaluation.
    """
    command = "disco-jax cost --workdir OUT --config.runs=\"('RUN','RUN')\""
    return Row("plot", command=f"{command} --config.result={result}", note=f"runs of {cells}")


def per_student(values: Sequence[Any], students: Sequence[str] = STUDENTS) -> Iterator[Any]:
    """Yields (student, printed metrics) of a line of a table; a None is no cell."""
    for student, value in zip(students, values, strict=True):
        if value is not None:
            yield student, scores(value)


def distilled(
    recipe: str,
    cell: str,
    student: str,
    teacher: Teacher,
    protocol: str,
    printed: Any,
    **fields: Any,
) -> Row:
    """Returns the cell of a distilled student that a linear evaluation scores.

    Args:
      recipe: a recipe with the arguments `student` and `teacher`; it may have arguments already.
      cell: id of the cell within its table.
      student: backbone of the student.
      teacher: the teacher.
      protocol: of `linear`.
      printed: metric -> percent.
      fields: further fields of the `Row`.
    """
    separator = "," if ":" in recipe else ":"
    reference = f"{recipe}{separator}student={student},teacher={teacher.backbone}"
    evaluation = linear(protocol, student)
    return Row(cell, reference, evaluation, teacher=teacher, printed=printed, **fields)


def alone(recipe: str, cell: str, student: str, protocol: str, printed: Any, **fields: Any) -> Row:
    """Returns the cell of a student without a teacher; see `distilled`."""
    reference = f"{recipe}{',' if ':' in recipe else ':'}student={student}"
    return Row(cell, reference, linear(protocol, student), printed=printed, **fields)
