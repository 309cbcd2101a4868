"""Tests of claims judged from the rows of a sweep's table."""

import csv
import dataclasses
import json
import os
import pathlib
import runpy
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

import helpers
from disco_jax import flags
from disco_jax.commands import sweep
from disco_jax.configs.miniature import fashion_photos
from disco_jax.configs.sweeps import common
from disco_jax.errors import UserError
from disco_jax.nested import flatten
from disco_jax.sweeps import cells, claims, table
from disco_jax.sweeps.table import Row

ROOT = pathlib.Path(__file__).parents[2]
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
    config = flags.load("miniature/claims:seeds=1,smoke=true")
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
    config = flags.load("miniature/claims:seeds=2")
    every = cells.expand(config)
    assert len(every) == 26 and len({cell.row for cell in every}) == 13
    rows = table.rows(every, {c.name: 0 for c in every}, {}, {})
    findings = claims.judge(config.claims, rows, "linear_grid")
    assert {f.claim for f in findings} == {claim.says for claim in config.claims.values()}
    count = {f.claim: sum(g.claim == f.claim for g in findings) for f in findings}
    assert set(count.values()) == {1, 2}  # one finding per student, or one comparing the students


def test_claims_in_miniature_have_eight_seeds_by_default():
    assert flags.load("miniature/claims:cut=cpu").seeds == tuple(range(8))
    assert flags.load("miniature/claims:cut=cpu,seeds=3").seeds == (0, 1, 2)
    with pytest.raises(UserError, match="seeds=0 must be 1 or more"):
        flags.load("miniature/claims:seeds=0")


def test_images_in_colour_are_the_only_difference_of_their_sweep():
    """Both data sets have the same settings, and colour operations that grey images ignore."""
    sweeps = [
        flags.load(f"miniature/claims:cut=cpu,seeds=1{data}")
        for data in ("", ",data=runs/fashion_photos.npz")
    ]
    grey, colour = (
        [cell.config for cell in cells.expand(config)]
        + list(cells.teachers(config, cells.expand(config)).values())
        for config in sweeps
    )
    data = {
        "data.source": "npz",
        "data.dir": "runs/fashion_photos.npz",
        "data.name": "fashion_photos",
    }
    assert len(grey) == len(colour) == 15
    for one, other in zip(map(flatten, grey), map(flatten, colour), strict=True):
        assert {field: other[field] for field in one if one[field] != other[field]} == data
        assert other["augment.jitter"] == (0.4, 0.4, 0.4, 0.1)
        assert (other["augment.jitter_prob"], other["augment.grey_prob"]) == (0.8, 0.2)


@pytest.fixture
def grey_file(tmp_path):
    """An .npz file of grey images in the layouts with and without a channel."""
    draw = np.random.default_rng(1).integers
    arrays = {
        "train_images": draw(0, 256, (20, 28, 28, 1), np.uint8),
        "train_labels": np.arange(20) % 10,
        "test_images": draw(0, 256, (5, 28, 28), np.uint8),
        "test_labels": np.arange(5),
    }
    np.savez(tmp_path / "grey.npz", **arrays)
    return tmp_path / "grey.npz"


def test_images_in_colour_are_differences_from_patches_of_the_photographs(grey_file):
    """Exactly one place of one photograph explains the first image."""
    colour = grey_file.with_name("colour.npz")
    fashion_photos.main([str(grey_file), str(colour)])
    with np.load(grey_file) as before, np.load(colour) as after:
        for split, count in (("train", 20), ("test", 5)):
            images = after[f"{split}_images"]
            assert images.dtype == np.uint8 and images.shape == (count, 28, 28, 3)
            assert (after[f"{split}_labels"] == before[f"{split}_labels"]).all()
        grey = before["train_images"][0].astype(int)
        blended = after["train_images"][0].astype(int)
    places = [
        (number, y, x)
        for number, photo in enumerate(fashion_photos.load_photographs())
        for y, x in np.argwhere(
            (np.abs(photo[:-27, :-27].astype(int) - grey[0, 0]) == blended[0, 0]).all(-1)
        )
        if (np.abs(photo[y : y + 28, x : x + 28] - grey) == blended).all()
    ]
    assert len(places) == 1


def test_images_in_colour_depend_on_the_seed_alone(grey_file):
    files = [grey_file.with_name(f"{name}.npz") for name in ("first", "again", "other")]
    for file, seed in zip(files, ("0", "0", "1"), strict=True):
        fashion_photos.main([str(grey_file), str(file), f"--seed={seed}"])
    first, again, other = ([x for _, x in sorted(np.load(file).items())] for file in files)
    assert all((x == y).all() for x, y in zip(first, again, strict=True))
    assert not any((x == y).all() for x, y in zip(first[::2], other[::2], strict=True))


def test_images_in_colour_are_not_blended_again(grey_file, capsys):
    colour = grey_file.with_name("colour.npz")
    fashion_photos.write(str(grey_file), str(colour))
    for words, message in (
        ([str(colour), "again.npz"], "only grey images are blended"),
        (["missing.npz", "again.npz"], "There is no file missing.npz"),
        ([str(grey_file), "again.npz", "--seed=-1"], "must be 0 or more"),
    ):
        with pytest.raises(SystemExit) as stop:
            fashion_photos.main(words)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(UserError, match="30 x 30 px are larger"):
        photograph = np.zeros((29, 40, 3), np.uint8)
        fashion_photos.blend(np.zeros((1, 30, 30), np.uint8), [photograph], np.random.PCG64(0))


def test_the_page_names_the_licences_of_the_data():
    page = (ROOT / "docs" / "claims.md").read_text()
    for text in (page, fashion_photos.__doc__):
        assert "MIT" in text and text.count("CC BY 2.0") == 2


def test_the_tables_of_the_page_are_printed_from_a_sweep(tmp_path, capsys):
    disco = row((55.04, 56.5, 57.0), recipe="disco", width=4, hidden=512, teacher="good")
    retro = row((), recipe="retro", width=4, teacher="good")
    baseline = row((50.0, 51.0, 52.0), recipe="moco_v2", width=4)
    rows = [
        dataclasses.replace(r, scores={"linear_grid": r.scores.get("knn", {})})
        for r in (baseline, disco, retro)
    ]
    (tmp_path / "table.csv").write_bytes(table.text(*table.lines(rows, ["linear_grid"])))
    claims.write(tmp_path, judge([BASE[4], disco], BETTER, WORSE))
    (tmp_path / "teachers" / "good").mkdir(parents=True)
    (tmp_path / "teachers" / "good" / "linear_grid.json").write_text('{"top1": 82.84}')
    runpy.run_path(str(ROOT / "docs" / "claims_tables.py"))["main"]([str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [
        "| method | teacher | width | head's width | linear top-1 |",
        "|---|---|---|---|---|",
        "| MoCo-v2 | | 4 | feature width | 51.0 ± 1.0 |",
        "| DisCo | good | 4 | 512 | 56.2 ± 1.0 |",
        "| RETRO | good | 4 | the teacher's, 512 | (0 of 3 seeds) |",
        "",
        "Top-1 of the teachers (seed 0): good 82.8.",
        "",
        "| claim | student | difference | verdict |",
        "|---|---|---|---|",
        "| It wins | width 4 | +5.2 ± 0.3 | held |",
        "",
        "Of 1 comparisons: 1 held.",
    ]
