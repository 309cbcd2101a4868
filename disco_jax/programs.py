"""Where compiled programs are kept, so that the next start need not compile them again.

In $JAX_COMPILATION_CACHE_DIR if it is set, else in the run's directory, so that a machine that
takes over has them too. JAX makes its folder when it compiles for the first time, which is before
a directory is checked: programs go there once it is known to be the run's, until then to the
user's cache. So a start that is refused leaves nothing in a directory that is not its own.
"""

import contextlib
import os

from etils import epath

from disco_jax.files import PROGRAMS

_awaited = ""  # the directory that the programs of this process go to, once it is the run's


def begin(workdir: str = "") -> None:
    """Keeps programs in the user's cache, or where an earlier start of the run has left its own.

    Args:
      workdir: the run's directory, which `settle` may name later; "": there is none.
    """
    global _awaited
    _awaited = ""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(cache, "disco_jax", "xla")
    with contextlib.suppress(OSError):  # of a user without a home: compiled anew at every start
        os.makedirs(folder, exist_ok=True)
        _keep(folder)
    _awaited = workdir.rstrip("/")
    with contextlib.suppress(OSError):  # which the task tells in its own words
        if workdir and (epath.Path(workdir) / PROGRAMS).exists():
            settle(workdir)


def settle(workdir: epath.PathLike) -> None:
    """Keeps programs in `workdir` from now on, if it is the directory that `begin` was told of."""
    global _awaited
    if _awaited and epath.Path(workdir) == epath.Path(_awaited):
        _keep(f"{_awaited}/{PROGRAMS}")
        _awaited = ""


def _keep(folder: str) -> None:
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if jax.config.values["jax_compilation_cache_dir"] != folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()  # it may have opened the folder before
