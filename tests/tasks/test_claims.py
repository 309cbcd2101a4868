"""What the rows of a sweep's table say of a claim."""

import csv

import pytest
from ml_collections import ConfigDict

from disco_jax import flags
from disco_jax.configs import common
from disco_jax.errors import UserError
from disco_jax.sweeps import claims
from disco_jax.sweeps.table import Row
from disco_jax.tasks import sweep

RECIPE, WIDTH, HIDDEN = "recipe", "config.student.width", "config.student.hidden"


def row(scores, **values):
    every = {{"width": WIDTH, "hidden": HIDDEN}.get(k, k): v for k, v in values.items()}
    return Row(every, 1, {"knn": dict(enumerate(scores))} if scores else {}, 3, {})


BASE = {4: row((50.0, 51.0, 52.0), recipe="moco", width=4), 8: row((70,), recipe="moco", width=8)}
OURS = row((55.0, 56.5, 57.0), recipe="disco", width=4, hidden=512)


def judge(rows, better, worse, **rest):
    one = common.claim("It wins", better, worse, **rest)
    return claims.judge(ConfigDict({"one": one}), rows, "knn")


BETTER, WORSE = ((RECIPE, "disco"),), ((RECIPE, "moco"),)


def test_rows_are_compared_seed_by_seed_where_the_rest_is_alike():
    """5, 5.5, 5: mean 5.167, deviation 0.289, far beyond 2.92 * 0.289 / sqrt(3)."""
    (found,) = judge([*BASE.values(), OURS], BETTER, WORSE)
    assert (found.where, found.seeds, found.verdict) == ("width=4", 3, "held")
    assert found.difference == pytest.approx(31 / 6)
    assert found.spread == pytest.approx((1 / 12) ** 0.5)


@pytest.mark.parametrize(
    "ours, at_least, verdict",
    [
        ((51.0, 52.0, 53.0), False, "held"),
        ((49.0, 50.1, 50.9), False, "did not hold"),
        ((49.0, 50.1, 50.9), True, "did not hold"),
        ((52.0, 51.5, 52.2), False, "open"),  # 2, 0.5, 0.2: mean 0.9, within 2.92 * 0.96 / sqrt(3)
        ((52.0, 51.5, 52.2), True, "held"),
        ((50.0, 50.0, 52.2), True, "open"),
        ((60.0,), False, "open"),  # one seed
        ((), False, "not done"),
    ],
)
def test_verdicts(ours, at_least, verdict):
    (found,) = judge(
        [BASE[4], row(ours, recipe="disco", width=4)], BETTER, WORSE, at_least=at_least
    )
    assert found.verdict == verdict


def test_a_gain_may_be_largest_somewhere():
    """At 4 the wide head gives 6, 7, 6 points, at 8 it gives 1: 5, 6, 5 more."""
    rows = [
        row((40.0, 40.0, 40.0), recipe="disco", width=4, hidden=16),
        row((46.0, 47.0, 46.0), recipe="disco", width=4, hidden=512),
        row((70.0, 70.0, 70.0), recipe="disco", width=8, hidden=16),
        row((71.0, 71.0, 71.0), recipe="disco", width=8, hidden=512),
    ]
    (found,) = judge(rows, ((HIDDEN, 512),), ((HIDDEN, 16),), most=(WIDTH, 4))
    assert found.difference == pytest.approx(16 / 3)
    assert found.verdict == "held"
    assert "width=4 against" in found.where and "width=8" in found.where
    (found,) = judge(rows, ((HIDDEN, 512),), ((HIDDEN, 16),), most=(WIDTH, 8))
    assert found.verdict == "did not hold"


def test_an_axis_that_the_claim_names_is_free_in_the_other_rows():
    """The widest row against every other of its recipe, not against itself."""
    rows = [*BASE.values(), row((80.0,), recipe="moco", width=16)]
    found = judge(rows, (*WORSE, (WIDTH, 16)), WORSE)
    assert [f.difference for f in found] == [30.0, 10.0]
    assert [f.where for f in found] == ["width=4", "width=8"]


def test_a_claim_about_rows_that_are_not_there_is_refused(tmp_path):
    config = flags.load("miniature/claims:smoke=true")
    config.claims.over_moco.better = ((RECIPE, "dicso"),)
    with pytest.raises(UserError, match=r"config.claims.over_moco: no rows .* Its axes: recipe"):
        sweep.run(config, str(tmp_path / "sweep"))
    assert not (tmp_path / "sweep").exists()


def test_findings_are_written(tmp_path):
    found = judge([*BASE.values(), OURS], BETTER, WORSE)
    claims.write(tmp_path, found)
    (line,) = csv.DictReader((tmp_path / "claims.csv").read_text().splitlines())
    assert (line["claim"], line["verdict"], line["score"]) == ("It wins", "held", "knn")
    assert "It wins" in claims.section(found) and claims.section([]) == ""


@pytest.mark.slow
def test_the_claims_in_miniature_run_end_to_end(tmp_path):
    """Two steps a cell on tiny images: every cell is scored and every claim has a verdict."""
    config = flags.load("miniature/claims:smoke=true")
    config.update(seeds=(0, 1))
    config.changes = (*config.changes, ("log.report", False))
    found = sweep.run(config, str(tmp_path))
    assert found["done"] == found["cells"] == 26 and not found["failed"]
    lines = list(csv.DictReader((tmp_path / "claims.csv").read_text().splitlines()))
    assert {line["verdict"] for line in lines} <= {"held", "open", "did not hold"}
    assert {line["claim"] for line in lines} == {c.says for c in config.claims.values()}
    assert all(line["seeds"] == "2" for line in lines)
