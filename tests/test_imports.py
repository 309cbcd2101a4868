"""Checks the direction and depth of imports, and that TensorFlow is imported lazily."""

import ast
import functools
import pathlib

import pytest

import disco_jax

PACKAGE = pathlib.Path(disco_jax.__file__).parent
ORDER = [
    "ops", "models", "methods", "train", "evaluate", "plan", "report", "workflows", "sweeps",
    "commands",
]  # fmt: skip
# Packages outside this order, with the packages that they may import.
BESIDE = {"data": {"ops"}, "run": {"data"}, "convert": {"ops", "models"}}
# Packages whose settings are dataclasses, and their files that handle whole configs.
TYPED = ["ops", "models", "methods", "train", "data", "run", "evaluate", "plan"]
WITH_CONFIG = {
    "train/experiment.py": "converts a config to settings, and completes it for config.json",
    "evaluate/protocols.py": "completes the config of an evaluation from the run's settings",
    "train/prepare.py": "passes a config to `fields.check` and to `experiment`",
    "run/workdir.py": "writes, reads and compares config.json",
    "run/upgrades.py": "upgrades a config.json of an earlier version",
}
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {
    ".".join(("disco_jax", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in FILES
}
MAX_DEPTH = 12  # files in the longest chain of imports at the top of files


def imports(path, *, top_level_only=False):
    """Yields the dotted names that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folders_used(path):
    parts = (name.split(".") for name in imports(path))
    used = {p[1] for p in parts if p[0] == "disco_jax" and len(p) > 1}
    return {folder for folder in used if (PACKAGE / folder).is_dir()}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_arrow_points_up(path):
    folder = path.relative_to(PACKAGE).parts[0]
    used = folders_used(path) - {folder}
    if folder in ORDER:
        above = set(ORDER[ORDER.index(folder) + 1 :])
        assert not used & above
        if folder in ("ops", "models", "methods"):
            assert not used & set(BESIDE)
    elif folder in BESIDE:
        assert used <= BESIDE[folder]


@pytest.mark.parametrize("path", sorted((PACKAGE / "commands").glob("*.py")), ids=lambda p: p.name)
def test_no_command_imports_another(path):
    assert not {name for name in imports(path) if name.startswith("disco_jax.commands")}


@pytest.mark.parametrize("room", TYPED)
def test_settings_are_typed_below_the_commands(room):
    """Parameters named `config`, and imports of ml_collections, are those of `WITH_CONFIG`."""
    for path in sorted((PACKAGE / room).rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        tree = ast.parse(path.read_text())
        arguments = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        reads = any(used.startswith("ml_collections") for used in imports(path))
        assert (reads or "config" in arguments) == (name in WITH_CONFIG), name


def imported_modules(module):
    """Returns the modules of this package that a module imports at the top of its file."""
    names = set()
    for node in ast.parse(MODULES[module].read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {path if path in MODULES else node.module for path in paths}
    return (names & MODULES.keys()) - {module}


@functools.cache
def chain(module):
    """Returns the longest chain of imports that starts at a module, the module first."""
    return [module, *max(map(chain, imported_modules(module)), key=len, default=[])]


def test_chains_of_imports_are_short():
    longest = max(map(chain, MODULES), key=len)
    assert len(longest) <= MAX_DEPTH, " <- ".join(longest)


def test_ops_import_jax_and_chex_alone():
    allowed = {"jax", "chex", "disco_jax", "dataclasses", "collections", "typing", "functools"}
    for path in (PACKAGE / "ops").glob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= allowed, path


def test_linen_starts_at_models():
    for path in (PACKAGE / "ops").glob("*.py"):
        assert not any(name.startswith("flax") for name in imports(path))


def test_tensorflow_is_imported_in_functions_of_data_and_of_its_own_format():
    heavy = {"tensorflow", "tensorflow_datasets"}
    for path in FILES:
        relative = path.relative_to(PACKAGE).parts
        assert not heavy & {n.split(".")[0] for n in imports(path, top_level_only=True)}, path
        if relative == ("convert", "tflite.py"):  # uses TensorFlow's converter
            continue
        if relative[0] != "data" or relative[-1] == "arrays.py":
            assert not heavy & {name.split(".")[0] for name in imports(path)}, path


def test_only_one_file_names_the_device_axis():
    for path in FILES:
        if path.name != "collectives.py":
            assert '"replica"' not in path.read_text(), path
