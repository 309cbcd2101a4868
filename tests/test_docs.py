"""Checks README.md and docs/*.md against the code: commands, settings, files of a run."""

import ast
import pathlib
import re
import shlex

import numpy as np
import pytest

import disco_jax
import helpers
from disco_jax import arguments, convert, errors, flags, main, models
from disco_jax.commands import distill
from disco_jax.commands import list as listing
from disco_jax.nested import flatten
from disco_jax.report import settings_page

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(lines):
    """Yields the arguments of every `disco-jax` command in a shell script."""
    for line in lines.replace("\\\n", " ").splitlines():
        if "disco-jax " in line or "babysit" in line:
            words = shlex.split(line, comments=True)
            if words[:1] == ["disco-jax"] and len(words) > 1:
                yield words[1:]
            if words[:2] == ["launch/tpu.sh", "babysit"]:  # runs `pretrain`
                yield ["pretrain", "--workdir=W", *words[2:]]


def of_page(path):
    blocks = re.findall(r"^```bash\n(.*?)^```", path.read_text(), re.M | re.S)
    return commands("\n".join(blocks))


def of_recipe(path):
    """Yields the commands in a recipe's docstring; optional flags are written as [--flag]."""
    header = path.read_text().split('"""')[1]
    lines = "\n".join(line for line in header.splitlines() if line.startswith("    "))
    return commands(re.sub(r"\[(--[^]]*)\]", r"\1", lines))


COMMANDS = {shlex.join(words): words for path in PAGES for words in of_page(path)}
PATHS = [path for folder in flags.FOLDERS for path in flags.recipes(folder).values()]
RECIPES = {shlex.join(words) for path in PATHS for words in of_recipe(path)}


class Understood(Exception):
    """Raised instead of starting the task."""


@pytest.fixture
def understand(monkeypatch):
    """A function that parses a command line like its task and does not start the task."""

    def stops(function):
        def run(*args, **kwargs):
            raise Understood(function(*args, **kwargs))

        return run

    parse = flags.parse
    monkeypatch.setattr(flags, "parse", stops(parse))
    monkeypatch.setattr(arguments.Parser, "read", stops(arguments.Parser.read))
    monkeypatch.setattr(flags, "prepare_jax", lambda *args: None)
    # The data and the teacher of the commands are missing here.
    monkeypatch.setattr(distill, "resolve", lambda **_: (flags.load("disco"), None))

    def read(words):
        with pytest.raises(Understood):
            main._start(words[0], words[1:])

    return read


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 30 and len(RECIPES) > 20
    assert {words[0] for words in COMMANDS.values()} >= set(main.TASKS) - {"demo", "fewshot"} - {
        "plane"
    }


@pytest.mark.parametrize("line", sorted({*COMMANDS, *RECIPES}))
def test_a_command_of_a_page_or_a_recipe_is_understood(line, understand, monkeypatch):
    monkeypatch.chdir(ROOT)
    understand(shlex.split(line))


def test_a_command_with_a_mistake_is_not_understood(understand):
    for line in ("knn --workdir=W --config.kk=1", "report --wrkdir=W", "linaer --workdir=W"):
        with pytest.raises(errors.UserError):
            understand(line.split())


def test_python_on_a_page_names_what_there_is():
    blocks = [
        block
        for path in PAGES
        for block in re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)
    ]
    assert len(blocks) > 1
    for block in blocks:
        ast.parse(block)
        for name in re.findall(r"\bdisco_jax\.(\w+)\(", block):
            assert callable(getattr(disco_jax, name)), name
        for name in re.findall(r"\bconvert\.(\w+)\(", block):
            assert callable(getattr(convert, name)), name
        for reference in re.findall(r"flags\.load\(\"(.+?)\"\)", block):
            flags.load(reference)


def test_links_lead_to_files():
    for page in PAGES:
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_settings_page_is_what_the_configs_say():
    text = settings_page.markdown()
    stored = (ROOT / "docs" / "settings.md").read_text()
    assert stored == text, "disco-jax list --settings > docs/settings.md"
    rows = set(re.findall(r"^\| `([\w.]+)` \|", text, re.M))
    for name in flags.recipes():
        if name != "demo":
            assert flatten(flags.load(name)).keys() <= rows, name


def test_settings_take_docstrings_and_the_comments_beside_and_above_fields():
    notes = settings_page.descriptions()
    assert notes["pretrain"]["student.head"].startswith("mlp | mlp_bn")
    assert notes["pretrain"]["teacher.hidden"] == notes["pretrain"]["student.hidden"]
    assert notes["pretrain"]["momentum.follow"].endswith("after the optimizer's step")
    assert notes["pretrain"]["monitor"].startswith("kNN accuracy during training")
    assert "augment.count" not in notes["pretrain"]
    assert notes["evaluation"]["layers"] == "classifier | all"
    page = settings_page.markdown()
    assert "| `objectives.contrast.keys_from` | `'momentum'` | the network that encodes" in page


def test_the_page_to_choose_by_counts_as_the_code_does():
    text = (ROOT / "docs" / "choose.md").read_text()
    counted = re.findall(r"^\| [^|]+ \| `(\w+)`[^|]* \| (student [^|]+) \|", text, re.M)
    assert len(counted) > 7
    for recipe, networks in counted:
        assert f"; {networks}; " in listing._needs(recipe), recipe
    sizes = 0
    for names, numbers in re.findall(r"^\| (`[^|]+) \| ([\d., ]+) \|", text, re.M):
        for name, number in zip(re.findall(r"`(\w+)`", names), numbers.split(", "), strict=True):
            assert f"{models.parameters(models.backbone(name)) / 2**20:.1f}" == number, name
            sizes += 1
    assert sizes == 8


def drawn():
    """Returns the file names in the tree of docs/rundir.md."""
    text = (ROOT / "docs" / "rundir.md").read_text()
    tree = text.split("```\n")[1]
    return set(re.findall(r"^  (\S+)", tree, re.M))


@pytest.mark.wiring  # names of files alone are compared
def test_a_run_directory_is_as_it_is_drawn(tmp_path, monkeypatch):
    """Compares the files of a run and its evaluations with the tree."""
    from disco_jax.commands import knn, linear
    from disco_jax.workflows import pretrain

    digits = helpers.digits()
    few = {key: value[: 128 if key.startswith("train") else 40] for key, value in digits.items()}
    np.savez(tmp_path / "few.npz", **few)
    monkeypatch.setitem(models.BACKBONES, "tiny", (helpers.TinyBackbone, {}))
    config = helpers.smoke_config("moco_v2", **{"student.backbone": "tiny"})
    config.data.update(source="npz", dir=str(tmp_path / "few.npz"))
    config.log.report = True
    run = tmp_path / "run"
    pretrain.run(config, str(run))
    assert (run / "figures" / "views.png").exists() and (run / "report.html").exists()
    (run / "report.html").unlink()
    knn.run(flags.load("knn"), str(run))
    assert "knn" in (run / "report.html").read_text()
    probe = flags.load("linear")
    probe.update(total_epochs=1, report=False)
    before = (run / "report.html").read_text()
    linear.run(probe, str(run))
    assert (run / "report.html").read_text() == before
    names = {
        "events.out.*" if path.name.startswith("events.out.") else path.name + "/" * path.is_dir()
        for path in run.iterdir()
    }
    assert names <= drawn()
    occasional = {
        "xla_cache/", "profile/", "manifest.json", "linear_disco/",
        "tsne.json", "tsne.npz", "tsne.png", "unreadable.jsonl",
    }  # fmt: skip
    assert names == drawn() - occasional


def test_the_readme_is_short_and_its_counts_are_true():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 700
    trained = [name for name in flags.recipes() if "objectives" in flags.load(name)]
    assert f"[{len(set(trained) - {'demo'})} recipes]" in text
    assert f"[{len(models.BACKBONES)} networks]" in text


def test_the_recipes_page_lists_every_recipe_that_trains_a_student():
    text = (ROOT / "docs" / "recipes.md").read_text()
    table = re.findall(r"^\| (`\w+`[^|]*) \|", text, re.M)
    listed = {name for cell in table for name in re.findall(r"`(\w+)`", cell)}
    assert listed == {name for name in flags.recipes() if "objectives" in flags.load(name)} - {
        "demo"
    }
