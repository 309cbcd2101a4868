"""Prints the tables of `claims.md` as Markdown, from the directory of a `miniature/claims` sweep.

python docs/claims_tables.py runs/claims
"""

import csv
import json
import pathlib
import sys
from collections.abc import Iterable, Sequence

METHODS = {"moco_v2": "MoCo-v2", "disco": "DisCo", "retro": "RETRO", "seed": "SEED"}
FEATURES = "feature width"
# Method -> width of its head where the sweep does not vary it.
HEADS = {"moco_v2": FEATURES, "seed": FEATURES, "retro": "the teacher's, 512"}
SCORE = "linear_grid"


def main(argv: Sequence[str]) -> None:
    """Prints the scores, the teachers' scores, the claims and the number of each verdict."""
    folder = pathlib.Path(argv[0])
    results, findings = read(folder / "table.csv"), read(folder / "claims.csv")
    score_head = ("method", "teacher", "width", "head's width", "linear top-1")
    claim_head = ("claim", "student", "difference", "verdict")
    parts = (
        markdown(score_head, map(score_cells, results)),
        teachers(folder),
        markdown(claim_head, map(claim_cells, findings)),
        verdicts(findings),
    )
    print("\n\n".join(parts))


def score_cells(row: dict[str, str]) -> list[str]:
    """Returns the cells of a line of the table of scores, for a row of `table.csv`."""
    recipe, hidden = row["recipe"], row["student.hidden"]
    head = {"": HEADS.get(recipe, ""), "-1": FEATURES}.get(hidden, hidden)
    score = mean_and_spread(row[f"{SCORE} top-1 (%)"], row[f"{SCORE} +-"])
    evaluated, planned = row["seeds"].split("/")
    missing = "" if evaluated == planned else f"({evaluated} of {planned} seeds)"
    line = [METHODS[recipe], row["teacher"], row["student.width"], head]
    return [*line, " ".join(filter(None, (score, missing)))]


def teachers(folder: pathlib.Path) -> str:
    """Returns a sentence with the top-1 accuracy of each teacher, which has one seed."""
    files = sorted((folder / "teachers").glob(f"*/{SCORE}.json"))
    tops = [f"{file.parent.name} {json.loads(file.read_text())['top1']:.1f}" for file in files]
    return f"Top-1 of the teachers (seed 0): {', '.join(tops)}."


def claim_cells(row: dict[str, str]) -> list[str]:
    """Returns the cells of a line of the table of claims, for a row of `claims.csv`."""
    student = row["where"].replace("=", " ").replace(" against ", " less ")
    difference = mean_and_spread(row["difference (points)"], row["+-"], sign="+")
    return [row["claim"], student, difference, row["verdict"]]


def verdicts(findings: Sequence[dict[str, str]]) -> str:
    """Returns a sentence with the number of comparisons of each verdict."""
    every = [row["verdict"] for row in findings]
    counts = (f"{every.count(verdict)} {verdict}" for verdict in dict.fromkeys(every))
    return f"Of {len(every)} comparisons: {', '.join(counts)}."


def mean_and_spread(mean: str, spread: str, sign: str = "-") -> str:
    """Formats a mean and its standard deviation with one decimal; "" without a mean.

    Args:
      mean: a number, or "" without results.
      spread: a number, or "" for one seed.
      sign: "+" also marks positive means.
    """
    if not mean:
        return ""
    return f"{float(mean):{sign}.1f}" + (f" ± {float(spread):.1f}" if spread else "")


def read(file: pathlib.Path) -> list[dict[str, str]]:
    """Returns the rows of a CSV file with a header."""
    return list(csv.DictReader(file.read_text().splitlines()))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in row)}|" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


if __name__ == "__main__":
    main(sys.argv[1:])
