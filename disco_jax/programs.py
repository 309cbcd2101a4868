"""Location of JAX's persistent compilation cache.

It is $JAX_COMPILATION_CACHE_DIR if that is set, else the run's directory, so that another machine
that resumes the run finds the programs too. JAX creates the folder at the first compilation,
before the run's directory has been checked. Programs therefore go to the user's cache until the
directory is known to belong to the run, and a refused start leaves no files in a foreign directory.
"""

import contextlib
import os

from etils import epath

from disco_jax.files import PROGRAMS, user_cache

_pending_workdir = ""  # directory that receives the programs once `settle` confirms it


def begin(workdir: str = "") -> None:
    """Caches programs in the user's cache, or in `workdir` if it has a cache already.

    Args:
      workdir: the run's directory, which `settle` may confirm later; "" for none.
    """
    global _pending_workdir
    _pending_workdir = ""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = os.path.join(user_cache(), "xla")
    with contextlib.suppress(OSError):  # no home directory: every start compiles again
        os.makedirs(folder, exist_ok=True)
        _set_cache_dir(folder)
    _pending_workdir = workdir.rstrip("/")
    with contextlib.suppress(OSError):  # the task reports an unreadable directory itself
        if workdir and (epath.Path(workdir) / PROGRAMS).exists():
            settle(workdir)


def settle(workdir: epath.PathLike) -> None:
    """Caches programs in `workdir` if it is the directory that was passed to `begin`."""
    global _pending_workdir
    if _pending_workdir and epath.Path(workdir) == epath.Path(_pending_workdir):
        _set_cache_dir(f"{_pending_workdir}/{PROGRAMS}")
        _pending_workdir = ""


def _set_cache_dir(folder: str) -> None:
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if jax.config.values["jax_compilation_cache_dir"] != folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()  # JAX may have opened the previous folder
