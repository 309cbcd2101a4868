"""The names of images that could not be decoded, kept beside a run over its restarts."""

import jax
from etils import epath

from disco_jax.data.base import Source


def keep(source: Source, workdir: epath.PathLike) -> None:
    """Counts what earlier starts of a run could not decode, and notes what this one cannot.

    Process 0 has unreadable.jsonl, process 1 unreadable_1.jsonl and so on: each reads other
    images. Nothing is written while all can be decoded.

    Args:
      source: of the run.
      workdir: of the run, which this process has claimed.
    """
    number = f"_{jax.process_index()}" if jax.process_index() else ""
    source.unreadable.keep_in(epath.Path(workdir) / f"unreadable{number}.jsonl")
