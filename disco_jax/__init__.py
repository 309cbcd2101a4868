"""Self-supervised distillation of lightweight vision models in JAX.

The tasks of the command line are functions of the same names:

    import disco_jax
    disco_jax.pretrain(config, "runs/disco")
    disco_jax.knn(config, "runs/disco")

They are imported when first used, so that `import disco_jax` costs nothing.
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
        return importlib.import_module(f"disco_jax.tasks.{name}").run
    raise AttributeError(f"module 'disco_jax' has no attribute {name!r}")
