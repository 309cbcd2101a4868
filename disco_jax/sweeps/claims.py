"""Whether the rows of a sweep's table bear out what a paper says of them."""

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

LEVEL = 0.95  # one-sided, of Student's t over the seeds
HELD, FAILED, OPEN, UNDONE = "held", "did not hold", "open", "not done"
FILE = "claims.csv"
HEAD = ("claim", "score", "where", "difference (points)", "+-", "seeds", "verdict")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One comparison of a claim.

    Attributes:
      claim: as a sentence.
      where: what the rows that were compared share.
      score: name of the evaluation.
      difference: of top-1 in points, mean over the seeds that both rows have; positive speaks for
        the claim. None: nothing to compare yet.
      spread: sample standard deviation of the difference over seeds; None with one.
      seeds: how many.
      verdict: "held" or "did not hold" where the difference is beyond chance (one-sided t test of
        the paired differences, 95 %), else "open". Of a claim of "at least" it is enough that the
        mean is not below 0. "not done": no results.
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
    """What every claim comes to.

    Args:
      claims: name -> `common.claim`.
      rows: of the table.
      score: the evaluation that is compared.

    Raises:
      UserError: a claim that no two rows of the sweep can tell about.
    """
    return [f for name, claim in claims.items() for f in _findings(name, claim, rows, score)]


def _findings(name: str, claim: Any, rows: Sequence[Row], score: str) -> list[Finding]:
    """A finding a pair of rows, or of two such pairs."""
    pairs = _pairs(claim, rows)
    compared = [(_where(claim, worse), _paired(better, worse, score)) for better, worse in pairs]
    if claim.most:
        axis, value = claim.most
        there = [i for i, (better, _) in enumerate(pairs) if better.values.get(axis) == value]
        others = [i for i in range(len(pairs)) if i not in there]
        compared = [
            (f"{compared[i][0]} against {compared[j][0]}", _less(compared[i][1], compared[j][1]))
            for i, j in itertools.product(there, others)
        ]
    if not compared:
        raise errors.UserError(
            f"config.claims.{name}: no rows of the sweep differ as `better`={claim.better} and "
            f"`worse`={claim.worse} say. Its axes: {', '.join(_axes(rows))}."
        )
    return [_finding(claim, where, found, score) for where, found in compared]


def _pairs(claim: Any, rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Rows to compare: picked by the claim, alike in all that it does not name."""
    named = {axis for axis, _ in (*claim.better, *claim.worse)}

    def alike(one: Row, other: Row) -> bool:
        both = one.values.keys() & other.values.keys() - named
        return one is not other and all(one.values[a] == other.values[a] for a in both)

    better, worse = (
        [row for row in rows if all(_has(row, *wanted) for wanted in picked)]
        for picked in (claim.better, claim.worse)
    )
    return [(one, other) for one in better for other in worse if alike(one, other)]


def _has(row: Row, axis: str, value: Any) -> bool:
    return axis in row.values and row.values[axis] == value


def _paired(better: Row, worse: Row, score: str) -> dict[int, float]:
    """Seed -> the difference, of seeds that both have."""
    ours, theirs = better.scores.get(score, {}), worse.scores.get(score, {})
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def _less(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def _finding(claim: Any, where: str, found: Mapping[int, float], score: str) -> Finding:
    values = list(found.values())
    mean = statistics.fmean(values) if values else None
    spread = statistics.stdev(values) if len(values) > 1 else None
    verdict = _verdict(mean, spread, len(values), claim.at_least)
    return Finding(claim.says, where, score, mean, spread, len(values), verdict)


def _verdict(mean: float | None, spread: float | None, seeds: int, at_least: bool) -> str:
    if mean is None:
        return UNDONE
    if spread is None:  # one seed says nothing of chance
        return OPEN
    margin = stats.t.ppf(LEVEL, seeds - 1) * spread / seeds**0.5
    if mean > margin or (at_least and mean >= 0):
        return HELD
    return FAILED if mean < -margin else OPEN


def _where(claim: Any, worse: Row) -> str:
    """What the claim leaves open of the row that should score less."""
    named = {*claim.better, *claim.worse}
    told = {
        axis: value
        for axis, value in worse.values.items()
        if (axis, value) not in named and axis not in dict(claim.worse)
    }
    return ", ".join(f"{axis.rsplit('.', 1)[-1]}={value}" for axis, value in told.items())


def _axes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(axis for row in rows for axis in row.values))


def section(findings: Sequence[Finding]) -> str:
    """HTML of what was found; "" of nothing."""
    if not findings:
        return ""
    remark = (
        "A claim held, or did not, where the differences of the seeds are beyond chance (one-sided "
        f"t test, {100 * LEVEL:.0f} %); else it is open. Of a claim of at least as much it is "
        "enough that the mean is not below."
    )
    return page.section("Claims", page.note(remark), page.table(HEAD, lines(findings)))


def write(folder: epath.Path, findings: Sequence[Finding]) -> None:
    """Writes `FILE` to a folder."""
    with whole(folder / FILE) as unfinished:
        unfinished.write_bytes(table.text(HEAD, lines(findings)))


def lines(findings: Sequence[Finding]) -> list[list[Any]]:
    """Cells of a table under `HEAD`."""
    return [
        [f.claim, f.score, f.where, f.difference, f.spread, f.seeds, f.verdict] for f in findings
    ]
