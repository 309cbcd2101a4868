"""Classes outside this package, which a setting names as "module:Class"."""

import importlib
from collections.abc import Callable
from typing import Any

from disco_jax import errors


def load_class(setting: str, path: str, is_valid: Callable[[Any], bool], requirement: str) -> type:
    """Imports the class "module:Class".

    Only modules on Python's path are imported; no file is executed by its location.

    Args:
      setting: the setting with this path, for messages.
      path: "module:Class".
      is_valid: returns whether a value may be used as such a class.
      requirement: a description of valid classes, to follow "must be" in a message.

    Raises:
      UserError: the path has another form, the module cannot be imported, has no such class, or the
        class is not valid.
    """
    module_name, _, class_name = str(path).partition(":")
    if not module_name or not class_name:
        raise errors.UserError(
            f"{setting}={errors.shown(path)} must have the form 'module:Class', for example "
            "'my_package.my_module:MyClass'."
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything
        raise errors.UserError(
            f"{setting}={errors.shown(path)}: the module cannot be imported "
            f"({type(error).__name__}: {error}). Install its package, or add its folder to "
            "PYTHONPATH."
        ) from error
    cls = getattr(module, class_name, None)
    if cls is None:
        classes = [name for name, value in vars(module).items() if is_valid(value)]
        raise errors.unknown(f"{setting}: the class of {module_name}", class_name, classes)
    if not is_valid(cls):
        raise errors.UserError(f"{setting}={errors.shown(path)} must be {requirement}.")
    return cls
