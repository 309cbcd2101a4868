"""List the recipes, networks, objectives and data sets."""

import ast
from collections.abc import Sequence
from typing import Any

from disco_jax import flags
from disco_jax.arguments import Parser
from disco_jax.configs import data
from disco_jax.report import settings_page


def main(argv: Sequence[str]) -> None:
    """Runs `disco-jax list [--sizes | --settings]`."""
    parser = Parser("list", __doc__)
    parser.add_argument(
        "--sizes", action="store_true", help="count the parameters of all networks (20 seconds)"
    )
    parser.add_argument(
        "--settings", action="store_true", help="print all config fields as Markdown instead"
    )
    values = parser.read(argv)
    if values is not None and values.settings:
        print(settings_page.markdown(), end="")
    elif values is not None:
        run(sizes=values.sizes)


def run(sizes: bool = False) -> dict[str, dict[str, str]]:
    """Prints and returns {"recipes", "methods", "networks", ...}, each a name -> description.

    Args:
      sizes: count the parameters of all networks, without heads, in M = 2^20 as in the papers.
    """
    from disco_jax import methods, models

    tables = {
        "recipes": {
            f"configs/{name}.py": _first_line(ast.get_docstring(ast.parse(path.read_text())))
            for name, path in flags.recipes().items()
        },
        "methods (crops per image; forward passes per step; memory of objectives per device)": {
            f"configs/{name}.py": text for name in flags.recipes() if (text := _needs(name))
        },
        "objectives": {
            f"config.objectives.{name}": _first_line(cls.__doc__)
            for name, cls in methods.OBJECTIVES.items()
        },
        "networks": {
            name: (f"{_millions(name):>7.2f} M  " if sizes else "") + _fields(cls, fields)
            for name, (cls, fields) in models.BACKBONES.items()
        },
        "heads": {name: _head(name) for name in models.HEADS},
        "data sets with built-in settings (any other TFDS name works too)": {
            name: f"{fields['size']} px, evaluated on {fields['eval_split']!r}"
            for name, fields in data.DATA.items()
        },
    }
    for title, rows in tables.items():
        width = max(map(len, rows))
        print(f"{title}:")
        for name, text in rows.items():
            print(f"  {name:{width}}  {text}".rstrip())
    return tables


def _needs(recipe: str) -> str:
    """Describes the views, networks and memory of a pretraining recipe; "" for other recipes."""
    from disco_jax import methods
    from disco_jax.methods.base import LABEL
    from disco_jax.train import experiment

    config = flags.load(recipe)
    if "objectives" not in config:
        return ""
    config.bags.file = config.bags.file or "bags.npz"  # not read here
    experiment.resolve_auto(config, "cpu")  # "auto" would initialize accelerators
    assembled = experiment.assemble(config)
    settings, method = assembled.settings, assembled.method
    count = settings.local.count
    crops = f"{settings.views}" + (f" + {count} small" if count else "")
    networks = ", ".join(f"{name} {len(views)}" for name, views in method.plan.items())
    also = ["the teacher's weights"] if "teacher" in method.plan else []
    if any(o.reads_bags for o in method.objectives.values()):
        also.append("bags (disco-jax bags)")
    if any(LABEL in o.aux for o in method.objectives.values()):
        also.append("labels")
    also += ["the teacher's head"] if method.reuse else []
    needs = f"; needs {', '.join(also)}" if also else ""
    memory = methods.memory_bytes(method, settings.method) / 2**20
    return f"{crops} crop{'s' if crops != '1' else ''}; {networks}; {memory:.0f} MiB{needs}"


def _head(name: str) -> str:
    from disco_jax.models import heads

    fields = heads.VARIANTS.get(name)
    if fields is None:
        kind = heads.Identity if name == "none" else heads.RegressionHead
        return _first_line(kind.__doc__)
    options = ", ".join(f"{k}={v}" for k, v in fields.items())
    return options or _first_line(heads.ProjectionHead.__doc__)


def _fields(cls: type, fields: dict[str, Any]) -> str:
    """Formats the scalar options and block counts of a variant."""
    shown = [f"{k}={v}" for k, v in fields.items() if isinstance(v, int | float | str)]
    shown += [f"blocks={fields[k]}" for k in ("stage_sizes", "repeats") if k in fields]
    return f"{cls.__name__}: {', '.join(shown)}"


def _millions(backbone: str) -> float:
    from disco_jax import models

    return models.parameters(models.backbone(backbone)) / 2**20


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0]
