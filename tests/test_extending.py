"""Tests that the examples of docs/extending.md train outside the package."""

import pathlib
import re
import shlex
import sys

import numpy as np
import pytest

import helpers
from disco_jax import main
from disco_jax.evaluate import features
from disco_jax.run import workdir

pytestmark = pytest.mark.wiring  # compares names and settings

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "extending.md").read_text()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A directory with the page's files, which is on Python's path and current."""
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S):
        name, _, text = block.partition("\n")
        path = tmp_path / name.removeprefix("# ")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    np.savez(tmp_path / "digits.npz", **helpers.digits())
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def words():
    """Returns the words of the page's command, with data that is in the project."""
    (block,) = re.findall(r"^```bash\n(.*?)^```", PAGE, re.M | re.S)
    _, program, *rest = shlex.split(block.replace("\\\n", " "))
    assert program == "disco-jax"
    data = ["--config.data.source=npz", "--config.data.dir=digits.npz"]
    return [word for word in rest if not word.startswith("--config.data.dir")] + data


def test_an_objective_and_a_backbone_outside_the_package_train(project):
    assert main.main([*words(), "--config.log.report=false"]) == 0
    config = workdir.read_config(str(project / "runs/mine"))
    assert config.objectives.decorrelation.weight == 0.2
    metrics = (project / "runs/mine/metrics.jsonl").read_text()
    assert '"decorrelation/loss"' in metrics
    trained = features.load(str(project / "runs/mine"))
    assert type(trained.encoder.backbone).__name__ == "PlainNet"


@pytest.mark.parametrize(
    "student, message",
    [
        ("my_package.plain_net:PlainNed", "Did you mean 'PlainNet'?"),
        ("my_package.plain_nets:PlainNet", "the module cannot be imported"),
        ("my_package.decorrelation:Decorrelation", "must be a subclass of disco_jax.models"),
        ("my_package", "or 'module:Class'"),
    ],
)
def test_a_backbone_that_cannot_be_used_is_refused(project, capsys, student, message):
    task, flag, recipe, *rest = words()
    code = main.main([task, flag, f"{recipe},student={student}", *rest])
    assert code == 2 and message in capsys.readouterr().err
