"""A file in the run directory with the names of images that could not be decoded."""

import jax
from etils import epath

from disco_jax.data.contract import Source


def keep(source: Source, workdir: epath.PathLike) -> None:
    """Stores the names of unreadable images of `source` in the run directory.

    The images that earlier starts could not decode are counted too. Process 0 writes
    unreadable.jsonl, process 1 unreadable_1.jsonl and so on, because each process reads other
    images. No file is written if all images can be decoded.

    Args:
      source: the images of the run.
      workdir: the run directory, which this process has claimed.
    """
    number = f"_{jax.process_index()}" if jax.process_index() else ""
    source.unreadable.keep_in(epath.Path(workdir) / f"unreadable{number}.jsonl")
