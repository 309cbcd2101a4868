"""Settings of a config that decide how networks are computed, and the values of their "auto"."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from disco_jax import errors
from disco_jax.ops.collectives import EXCHANGES

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def _on_tpu(backend: str) -> str:
    return "on" if backend == "tpu" else "off"


# Config fields that may be "auto": their other values, and the value of "auto" on a backend.
_AUTO: dict[str, tuple[tuple[str, ...], Callable[[str], str]]] = {
    "dtype": (tuple(DTYPES), lambda backend: "float32" if backend == "cpu" else "bfloat16"),
    "fast.exchange": (EXCHANGES, lambda backend: "all_to_all" if backend == "tpu" else "gather"),
    "fast.columns": (("on", "off"), _on_tpu),
    "fast.statistics": (("on", "off"), _on_tpu),
    "fast.shifts": (("on", "off"), lambda backend: "on" if backend == "cpu" else "off"),
}
# Values of `config.fast` with which networks are computed by XLA's default layers.
PLAIN: dict[str, Any] = {
    "exchange": "gather", "stem": False, "columns": "off", "statistics": "off", "shifts": "off",
    "teacher": False,
}  # fmt: skip


def resolve_auto(field: str, choice: str, backend: str = "") -> str:
    """Returns the value of a config field that may be "auto".

    Args:
      field: name of the field in the config, e.g. "fast.columns".
      choice: its value.
      backend: "cpu", "gpu" or "tpu"; "": the default backend of this process.

    Raises:
      UserError: the field does not allow the value.
    """
    allowed, automatic = _AUTO[field]
    if choice == "auto":
        return automatic(backend or jax.default_backend())
    if choice not in allowed:
        raise errors.unknown(f"config.{field}", choice, ["auto", *allowed])
    return choice


def resolve_config(config: Any, backend: str) -> None:
    """Replaces every "auto" of a pretraining config by its value on a backend, in place.

    Raises:
      UserError: a field has a value that is not allowed.
    """
    for field in _AUTO:
        group, _, name = field.rpartition(".")
        section = config[group] if group else config
        section[name] = resolve_auto(field, section.get(name, "auto"), backend)


def compute_dtype(name: str) -> Any:
    """Returns the dtype of a config's `dtype`: for "auto" float32 on CPUs, bfloat16 elsewhere.

    Raises:
      UserError: the name is unknown.
    """
    return DTYPES[resolve_auto("dtype", name)]
