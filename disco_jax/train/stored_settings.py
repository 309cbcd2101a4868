"""Settings of a run, read from its directory."""

from etils import epath

from disco_jax import errors, typed
from disco_jax.run import workdir
from disco_jax.train.run_settings import RunSettings


def read(path: epath.PathLike) -> RunSettings:
    """Reads the settings of a pretraining run or of an import from its directory.

    Raises:
      UserError: the directory belongs to something else, for example an evaluation.
    """
    config = workdir.read_config(str(path))
    if "student" not in config or "augment" not in config:
        raise errors.UserError(f"{path} is not the directory of a pretraining run or of an import.")
    return typed.parse(RunSettings, config, f"{path}: config", stored=True)
