"""Statistical test of papers' claims on the rows of a sweep's table."""

import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from scipy import stats

from disco_jax import errors
from disco_jax.files import whole
from disco_jax.report import page
from disco_jax.sweeps import table
from disco_jax.sweeps.table import Row

LEVEL = 0.95  # confidence level of the one-sided t test over seeds
HELD, FAILED, OPEN, UNDONE = "held", "did not hold", "open", "not done"
FILE = "claims.csv"
HEAD = ("claim", "score", "where", "difference (points)", "+-", "seeds", "verdict")


@dataclasses.dataclass(frozen=True)
class Finding:
    """Result of one comparison of a claim.

    Attributes:
      claim: the claim as a sentence.
      where: values shared by the compared rows.
      score: name of the evaluation.
      difference: top-1 difference in points, mean over the seeds of both rows; positive supports
        the claim. None if there is nothing to compare yet.
      spread: sample standard deviation of the difference over seeds; None for one seed.
      seeds: number of compared seeds.
      verdict: "held" or "did not hold" if the difference is significant (one-sided t test of the
        paired differences, 95 %), otherwise "open". An "at least" claim also holds if the mean is
        not negative. "not done": no results.
    """

    claim: str
    where: str
    score: str
    difference: float | None
    spread: float | None
    seeds: int
    verdict: str


def judge(
    claims: Mapping[str, Mapping[str, Any]], rows: Sequence[Row], score: str
) -> list[Finding]:
    """Evaluates all claims.

    Args:
      claims: name -> `sweeps.common.claim`.
      rows: rows of the table.
      score: name of the compared evaluation.

    Raises:
      UserError: if no two rows of the sweep match a claim.
    """
    return [f for name, claim in claims.items() for f in _findings(name, claim, rows, score)]


def _findings(name: str, claim: Any, rows: Sequence[Row], score: str) -> list[Finding]:
    """Returns a finding per pair of rows, or per two pairs for a claim with `most`."""
    pairs = _pairs(claim, rows)
    compared = [
        (_where(claim, worse), _score_differences(better, worse, score)) for better, worse in pairs
    ]
    if claim.most:
        axis, value = claim.most
        stronger = [i for i, (better, _) in enumerate(pairs) if better.values.get(axis) == value]
        weaker = [i for i in range(len(pairs)) if i not in stronger]
        compared = [
            (
                f"{compared[i][0]} against {compared[j][0]}",
                _subtract(compared[i][1], compared[j][1]),
            )
            for i, j in itertools.product(stronger, weaker)
        ]
    if not compared:
        raise errors.UserError(
            f"config.claims.{name}: no rows of the sweep match `better`={claim.better} and "
            f"`worse`={claim.worse}. Its axes: {', '.join(_axes(rows))}."
        )
    return [_finding(claim, where, differences, score) for where, differences in compared]


def _pairs(claim: Any, rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Returns pairs of rows that match the claim and agree on all other axes."""
    named = {axis for axis, _ in (*claim.better, *claim.worse)}

    def alike(first: Row, second: Row) -> bool:
        common_axes = first.values.keys() & second.values.keys() - named
        return first is not second and all(first.values[a] == second.values[a] for a in common_axes)

    better, worse = (
        [row for row in rows if all(_has(row, *axis_value) for axis_value in selection)]
        for selection in (claim.better, claim.worse)
    )
    return [(first, second) for first in better for second in worse if alike(first, second)]


def _has(row: Row, axis: str, value: Any) -> bool:
    return axis in row.values and row.values[axis] == value


def _score_differences(better: Row, worse: Row, score: str) -> dict[int, float]:
    """Returns seed -> score difference, for the seeds of both rows."""
    better_scores, worse_scores = better.scores.get(score, {}), worse.scores.get(score, {})
    return {
        seed: better_scores[seed] - worse_scores[seed]
        for seed in better_scores
        if seed in worse_scores
    }


def _subtract(first: Mapping[int, float], second: Mapping[int, float]) -> dict[int, float]:
    return {seed: first[seed] - second[seed] for seed in first if seed in second}


def _finding(claim: Any, where: str, differences: Mapping[int, float], score: str) -> Finding:
    values = list(differences.values())
    mean = statistics.fmean(values) if values else None
    spread = statistics.stdev(values) if len(values) > 1 else None
    verdict = _verdict(mean, spread, len(values), claim.at_least)
    return Finding(claim.says, where, score, mean, spread, len(values), verdict)


def _verdict(mean: float | None, spread: float | None, seeds: int, at_least: bool) -> str:
    if mean is None:
        return UNDONE
    if spread is None:  # one seed gives no estimate of chance
        return OPEN
    margin = stats.t.ppf(LEVEL, seeds - 1) * spread / seeds**0.5
    if mean > margin or (at_least and mean >= 0):
        return HELD
    return FAILED if mean < -margin else OPEN


def _where(claim: Any, worse: Row) -> str:
    """Formats the values of the worse row that the claim does not fix."""
    named = {*claim.better, *claim.worse}
    free = {
        axis: value
        for axis, value in worse.values.items()
        if (axis, value) not in named and axis not in dict(claim.worse)
    }
    return ", ".join(f"{axis.rsplit('.', 1)[-1]}={value}" for axis, value in free.items())


def _axes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(axis for row in rows for axis in row.values))


def section(findings: Sequence[Finding]) -> str:
    """Builds an HTML section of the findings; returns "" if there are none."""
    if not findings:
        return ""
    remark = (
        "A claim held, or did not hold, if the differences over seeds are significant (one-sided t "
        f"test, {100 * LEVEL:.0f} %); otherwise it is open. An 'at least' claim also holds if the "
        "mean difference is not negative."
    )
    return page.section("Claims", page.note(remark), page.table(HEAD, lines(findings)))


def write(folder: epath.Path, findings: Sequence[Finding]) -> None:
    """Writes `FILE` into a folder."""
    with whole(folder / FILE) as unfinished:
        unfinished.write_bytes(table.text(HEAD, lines(findings)))


def lines(findings: Sequence[Finding]) -> list[list[Any]]:
    """Returns the cells of a table with the columns `HEAD`."""
    return [
        [f.claim, f.score, f.where, f.difference, f.spread, f.seeds, f.verdict] for f in findings
    ]
