"""Keep what a teacher says of the views of some epochs, for students that come later."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags
from etils import epath
from ml_collections import ConfigDict

from disco_jax import errors, files, flags, programs
from disco_jax.data import targets
from disco_jax.data.base import Source
from disco_jax.tasks import cached, pretrain
from disco_jax.tasks.prepare import Prepared, check, prepare
from disco_jax.train import hosts, lease, state, step, unreadable, workdir


def main(argv: Sequence[str]) -> None:
    """`disco-jax cache --config RECIPE --workdir DIR [--epochs E] [--dry-run]`."""
    values = flags.parse("cache", argv, help_line=__doc__, extra=_define, check=check)
    if values is not None:
        flags.prepare_jax(flags.distributed_options(values), "" if values.dry_run else values.workdir)
        run(values.config, values.workdir, epochs=values.epochs, dry_run=values.dry_run)


def _define(values: absl_flags.FlagValues) -> None:
    absl_flags.DEFINE_integer(
        "epochs", 10, "kept; longer runs see them again", lower_bound=1, flag_values=values
    )
    absl_flags.DEFINE_bool("dry_run", False, "only tell the size", flag_values=values)


def run(
    config: ConfigDict,
    folder: str,
    source: Source | None = None,
    *,
    epochs: int = 10,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Runs the teacher over the views that `config` makes in its first epochs.

    Started again it goes on where it was stopped. A run takes the outputs with
    `--config.teacher.cache=FOLDER`.

    Args:
      config: of the pretraining run that will read them.
      folder: gets targets.json and a folder of each host.
      source: images; None opens `config.data`.
      epochs: E; a longer run sees the views of the E epochs again and again.
      dry_run: only prints the size.

    Returns:
      {"steps", "bytes"}.

    Raises:
      UserError: the method has no teacher or reads its feature maps, the folder belongs to other
        settings, or a setting will not do.
    """
    config = config.copy_and_resolve_references()
    config.teacher.cache = ""
    ready = prepare(config, source)
    outputs = cached.wanted(ready.method, ready.record)
    steps = epochs * ready.steps_per_epoch
    size = targets.size_bytes(outputs, config.batch_size, steps)
    if not jax.process_index():
        print(
            f"{epochs} epochs, {steps} steps of {config.batch_size} images, views "
            f"{', '.join(map(str, outputs))}: {size / 2**30:.3g} GiB in bfloat16",
            flush=True,
        )
    if dry_run:
        return {"steps": steps, "bytes": size}
    path = epath.Path(folder)
    assert ready.teacher is not None  # `wanted` refuses a method without one
    told = cached.made_of(ready.config, ready.method, ready.record, ready.source, ready.teacher)
    meta = {"steps": steps, "epochs": epochs, "made_of": told}
    with _claimed(path, meta):
        _fill(ready, path, steps)
    return {"steps": steps, "bytes": size}


@contextlib.contextmanager
def _claimed(path: epath.Path, meta: dict[str, Any]) -> Iterator[None]:
    """Makes the folder these outputs', for as long as the context lasts."""

    def take() -> None:
        if not (path / targets.FILE).exists():
            workdir.check_free(path, f" and holds no outputs ({targets.FILE} is missing)")
        path.mkdir(parents=True, exist_ok=True)
        held.enter_context(lease.held(path))
        files.remove_unfinished(path)
        if (path / targets.FILE).exists():
            before = targets.read_meta(str(path))
            cached.compare(f"--workdir={path}", before, meta["made_of"])
            if before["steps"] != meta["steps"]:
                raise errors.UserError(
                    f"--workdir={path} is for {before['epochs']} epochs: give "
                    f"--epochs={before['epochs']}, or another folder."
                )
            return
        targets.write_meta(path, meta)

    with contextlib.ExitStack() as held:
        hosts.first(take)
        programs.settle(path)
        yield


def _fill(ready: Prepared, path: epath.Path, steps: int) -> None:
    """Encodes and keeps the batches that are missing."""
    unreadable.keep(ready.source, path)
    writer = targets.Writer(path, jax.process_index(), jax.process_count())
    names = tuple(next(iter(ready.method.teacher_outputs(ready.record).values())))
    encode = step.parallel_targets(
        step.make_targets(ready.method, ready.recipe, ready.config.seed, names)
    )
    frozen = state.everywhere(ready.frozen)
    rows = ready.config.batch_size // jax.process_count()
    with pretrain.batches_of(ready, writer.position) as batches:
        for number in range(writer.steps, steps):
            batch, after = next(batches)
            made = encode(jnp.int32(number), frozen, batch)
            local = jax.tree.map(lambda x: _rows(x, rows), made)
            writer.add(targets.Position(*after), local)
    writer.flush()


def _rows(x: jax.Array, count: int) -> np.ndarray:
    """[local devices, B, D] of this host -> [b, D]."""
    shards = sorted(x.addressable_shards, key=lambda shard: shard.device.id)
    return np.concatenate([np.asarray(s.data) for s in shards]).reshape(count, -1)
