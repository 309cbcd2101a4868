"""Tests of the wheel: it contains the recipes and works from any directory."""

import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources, so that the checkout stays clean."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("disco_jax", "configs"):
        for file in (ROOT / folder).rglob("*.py"):
            target = source / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    subprocess.run(
        [
            sys.executable, "-c",
            "import sys, setuptools.build_meta as build; build.build_wheel(sys.argv[1])", str(out),
        ],
        check=True, cwd=source, capture_output=True,
    )  # fmt: skip
    return next(out.glob("*.whl"))


def test_recipes_and_licence_travel_with_the_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name for name in names if name.startswith("disco_jax/configs/")}
    recipes = {f"disco_jax/{file.relative_to(ROOT)}" for file in (ROOT / "configs").rglob("*.py")}
    assert recipes == shipped
    assert any(name.endswith("LICENSE") for name in names)
    assert not [name for name in names if name.startswith("tests")]


def test_an_unpacked_wheel_finds_its_recipes_in_any_directory(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "from disco_jax import flags; import disco_jax\n"
        f"assert disco_jax.__file__.startswith({str(tmp_path)!r})\n"
        "assert flags.load('configs/disco.py:student=resnet34').student.backbone == 'resnet34'\n"
        "assert flags.load('sweeps/hidden_width').name == 'hidden_width'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
