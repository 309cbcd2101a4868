"""Print the recipes, networks, objectives and data sets there are."""

import ast
from collections.abc import Sequence

from disco_jax import flags
from disco_jax.configs import common


def main(argv: Sequence[str]) -> None:
    """Prints the list; takes no flags."""
    if argv:
        print("usage: disco-jax list (no flags)")
        return
    run()


def run() -> dict[str, dict[str, str]]:
    """Prints and returns {"recipes", "objectives", "networks", "data sets"}: name -> what it is."""
    from disco_jax import methods, models

    found = {
        "recipes": {
            f"configs/{name}.py": _first_line(ast.get_docstring(ast.parse(path.read_text())))
            for name, path in flags.recipes().items()
        },
        "objectives": {
            f"config.objectives.{name}": _first_line(cls.__doc__)
            for name, cls in methods.OBJECTIVES.items()
        },
        "networks": {
            name: f"{spec['block']} blocks {spec['stage_sizes']}, width {spec['width']}, "
            f"{spec['stem']} stem"
            for name, (_, spec) in models.BACKBONES.items()
        },
        "data sets with settings of their own (any other TFDS name works too)": {
            name: f"{fields['size']} px, evaluated on {fields['eval_split']!r}"
            for name, fields in common.DATA.items()
        },
    }
    for title, rows in found.items():
        width = max(map(len, rows))
        print(f"{title}:")
        for name, text in rows.items():
            print(f"  {name:{width}}  {text}")
    return found


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0]
