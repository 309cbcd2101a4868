"""Tests of claims judged from the rows of a sweep's table."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

import helpers
from disco_jax import flags
from disco_jax.commands import sweep
from disco_jax.configs.sweeps import common
from disco_jax.errors import UserError
from disco_jax.sweeps import cells, claims, table
from disco_jax.sweeps.table import Row

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
    """Differences 5, 5.5, 5: mean 5.167, deviation 0.289, far above 2.92 * 0.289 / sqrt(3)."""
    (finding,) = judge([*BASE.values(), OURS], BETTER, WORSE)
    assert (finding.where, finding.seeds, finding.verdict) == ("width=4", 3, "held")
    assert finding.difference == pytest.approx(31 / 6)
    assert finding.spread == pytest.approx((1 / 12) ** 0.5)


@pytest.mark.parametrize(
    "scores, at_least, verdict",
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
def test_verdicts(scores, at_least, verdict):
    (finding,) = judge(
        [BASE[4], row(scores, recipe="disco", width=4)], BETTER, WORSE, at_least=at_least
    )
    assert finding.verdict == verdict


def test_a_gain_may_be_largest_somewhere():
    """Gains of the wide head: 6, 7, 6 points at width 4, 1 at width 8, so 5, 6, 5 more."""
    rows = [
        row((40.0, 40.0, 40.0), recipe="disco", width=4, hidden=16),
        row((46.0, 47.0, 46.0), recipe="disco", width=4, hidden=512),
        row((70.0, 70.0, 70.0), recipe="disco", width=8, hidden=16),
        row((71.0, 71.0, 71.0), recipe="disco", width=8, hidden=512),
    ]
    (finding,) = judge(rows, ((HIDDEN, 512),), ((HIDDEN, 16),), most=(WIDTH, 4))
    assert finding.difference == pytest.approx(16 / 3)
    assert finding.verdict == "held"
    assert "width=4 against" in finding.where and "width=8" in finding.where
    (finding,) = judge(rows, ((HIDDEN, 512),), ((HIDDEN, 16),), most=(WIDTH, 8))
    assert finding.verdict == "did not hold"


def test_an_axis_that_the_claim_names_is_free_in_the_other_rows():
    """Compares the widest row with all others of its recipe, but not with itself."""
    rows = [*BASE.values(), row((80.0,), recipe="moco", width=16)]
    findings = judge(rows, (*WORSE, (WIDTH, 16)), WORSE)
    assert [f.difference for f in findings] == [30.0, 10.0]
    assert [f.where for f in findings] == ["width=4", "width=8"]


def test_a_claim_about_rows_that_are_not_there_is_refused(tmp_path):
    config = flags.load("miniature/claims:smoke=true")
    config.claims.over_moco.better = ((RECIPE, "dicso"),)
    with pytest.raises(UserError, match=r"config.claims.over_moco: no rows .* Its axes: recipe"):
        sweep.run(config, str(tmp_path / "sweep"))
    assert not (tmp_path / "sweep").exists()


def test_findings_are_written(tmp_path):
    findings = judge([*BASE.values(), OURS], BETTER, WORSE)
    claims.write(tmp_path, findings)
    (line,) = csv.DictReader((tmp_path / "claims.csv").read_text().splitlines())
    assert (line["claim"], line["verdict"], line["score"]) == ("It wins", "held", "knn")
    assert "It wins" in claims.section(findings) and claims.section([]) == ""


RECIPE_OF_OURS = """
from disco_jax.configs.sweeps import common


def get_config(arg=None):
    config = common.sweep("ours")
    config.arguments = (("data", "digits"), ("smoke", "true"), ("student", "resnet8"))
    config.axes = (("recipe", ("moco_v2",)), ("config.student.width", (4, 8)))
    config.seeds = (0, 1)
    config.changes = (
        ("data.source", "npz"),
        ("data.dir", "few.npz"),
        ("augment.size", 16),
        ("student.backbone", "tiny"),
        ("log.report", False),
    )
    config.evaluate = (("knn", (("report", False),)),)
    config.figure.score = "knn"
    config.claims.wide = common.claim(
        "Wide is better", (("config.student.width", 8),), (("config.student.width", 4),)
    )
    return config
"""


@pytest.mark.wiring  # compares the files of a sweep with one another, whatever the scores
def test_a_sweep_with_a_claim_runs_without_tensorflow(tmp_path):
    few = {key: x[:128] for key, x in helpers.digits().items()}
    np.savez(tmp_path / "few.npz", **few)
    (tmp_path / "ours.py").write_text(RECIPE_OF_OURS)
    code = f"""
import sys
sys.path[:0] = {[str(helpers.PARITY.parent), str(helpers.PARITY)]}
sys.modules["tensorflow"] = sys.modules["tensorflow_datasets"] = None
import helpers
from disco_jax import main
with helpers.tiny_networks():
    sys.exit(main.main(["sweep", "--config=ours.py", "--workdir=runs"]))
"""
    process = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XLA_FLAGS": helpers.one_device_flags()},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "4 of 4 cells are done" in process.stdout
    (line,) = csv.DictReader((tmp_path / "runs" / "claims.csv").read_text().splitlines())
    tops = [
        json.loads((tmp_path / "runs/cells" / name / "knn.json").read_text())["top1"]
        for width in (8, 4)
        for name in (f"recipe=moco_v2,width={width},seed={seed}" for seed in (0, 1))
    ]
    mean = (tops[0] - tops[2] + tops[1] - tops[3]) / 2
    assert float(line["difference (points)"]) == pytest.approx(mean, abs=1e-3)
    assert line["seeds"] == "2"
    assert "Wide is better" in (tmp_path / "runs" / "table.html").read_text()


def test_every_claim_in_miniature_compares_rows():
    config = flags.load("miniature/claims")
    every = cells.expand(config)
    assert len(every) == 39 and len({cell.row for cell in every}) == 13
    rows = table.rows(every, {c.name: 0 for c in every}, {}, {})
    findings = claims.judge(config.claims, rows, "linear_grid")
    assert {f.claim for f in findings} == {claim.says for claim in config.claims.values()}
    count = {f.claim: sum(g.claim == f.claim for g in findings) for f in findings}
    assert set(count.values()) == {1, 2}  # one finding per student, or one comparing the students
