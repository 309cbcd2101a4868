"""Self-supervised distillation of lightweight vision models in JAX.

Each command of `disco-jax` is also a function of the same name:

    import disco_jax
    disco_jax.pretrain(config, "runs/disco")
    disco_jax.knn(config, "runs/disco")

Their modules are imported at first use, which keeps `import disco_jax` fast.
"""

import importlib

from disco_jax.version import __version__

TASKS = (
    "pretrain",
    "distill",
    "knn",
    "linear",
    "fewshot",
    "plane",
    "tsne",
    "cost",
    "compare",
    "demo",
    "export",
    "embed",
)

__all__ = ["__version__", *TASKS]


def __getattr__(name: str):
    if name in TASKS:
        return importlib.import_module(f"disco_jax.commands.{name}").run
    raise AttributeError(f"module 'disco_jax' has no attribute {name!r}")
