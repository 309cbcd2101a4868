"""Save a teacher's outputs for the views of some epochs, for later students."""

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
from disco_jax.data.contract import Source
from disco_jax.run import hosts, lease, unreadable, workdir
from disco_jax.train import session, state, step, teacher_cache
from disco_jax.train.prepare import Prepared, check, prepare


def main(argv: Sequence[str]) -> None:
    """Runs `disco-jax cache --config RECIPE --workdir DIR [--epochs E] [--dry-run]`."""
    values = flags.parse("cache", argv, help_line=__doc__, extra=_define, check=check)
    if values is not None:
        flags.prepare_jax(
            flags.distributed_options(values), "" if values.dry_run else values.workdir
        )
        run(values.config, values.workdir, epochs=values.epochs, dry_run=values.dry_run)


def _define(values: absl_flags.FlagValues) -> None:
    absl_flags.DEFINE_integer(
        "epochs", 10, "epochs to save; longer runs repeat them", lower_bound=1, flag_values=values
    )
    absl_flags.DEFINE_bool("dry_run", False, "only print the size", flag_values=values)


def run(
    config: ConfigDict,
    folder: str,
    source: Source | None = None,
    *,
    epochs: int = 10,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Saves the teacher's outputs for the views of the first epochs of `config`.

    A restart resumes after the last saved batch. Runs read the outputs with
    `--config.teacher.cache=FOLDER`.

    Args:
      config: config of the pretraining run that will read the outputs.
      folder: receives targets.json and one folder per host.
      source: images; None opens `config.data`.
      epochs: number of epochs to save; a longer run repeats their views.
      dry_run: only print the size.

    Returns:
      {"steps", "bytes"}.

    Raises:
      UserError: the method has no teacher or reads its feature maps, the folder belongs to other
        settings, or a setting is invalid.
    """
    config = config.copy_and_resolve_references()
    config.teacher.cache = ""
    ready = prepare(config, source)
    outputs = teacher_cache.required_outputs(ready.experiment)
    steps = epochs * ready.experiment.steps_per_epoch
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
    assert ready.teacher is not None  # `required_outputs` rejects methods without a teacher
    origin = teacher_cache.origin(ready.experiment, ready.source, ready.teacher)
    meta = {"steps": steps, "epochs": epochs, "made_of": origin}
    with _claimed(path, meta):
        _fill(ready, path, steps)
    return {"steps": steps, "bytes": size}


@contextlib.contextmanager
def _claimed(path: epath.Path, meta: dict[str, Any]) -> Iterator[None]:
    """Locks the folder and writes or checks its targets.json."""

    def take() -> None:
        if not (path / targets.FILE).exists():
            workdir.check_free(path, f" and contains no outputs ({targets.FILE} is missing)")
        path.mkdir(parents=True, exist_ok=True)
        stack.enter_context(lease.held(path))
        files.remove_unfinished(path)
        if (path / targets.FILE).exists():
            before = targets.read_meta(str(path))
            teacher_cache.compare(f"--workdir={path}", before, meta["made_of"])
            if before["steps"] != meta["steps"]:
                raise errors.UserError(
                    f"--workdir={path} was created for {before['epochs']} epochs: set "
                    f"--epochs={before['epochs']}, or give another folder."
                )
            return
        targets.write_meta(path, meta)

    with contextlib.ExitStack() as stack:
        hosts.on_process_zero(take)
        programs.settle(path)
        yield


def _fill(ready: Prepared, path: epath.Path, steps: int) -> None:
    """Encodes and saves the missing batches."""
    unreadable.keep(ready.source, path)
    writer = targets.Writer(path, jax.process_index(), jax.process_count())
    names = tuple(next(iter(ready.method.teacher_outputs(ready.experiment.record).values())))
    encode = step.parallel_targets(
        step.make_targets(ready.method, ready.experiment.views, ready.settings.seed, names)
    )
    frozen = state.replicate(ready.frozen)
    rows = ready.settings.batch_size // jax.process_count()
    with session.batches_of(ready, writer.position) as batches:
        for number in range(writer.steps, steps):
            batch, after = next(batches)
            outputs = encode(jnp.int32(number), frozen, batch)
            local = jax.tree.map(lambda x: _rows(x, rows), outputs)
            writer.add(targets.Position(*after), local)
    writer.flush()


def _rows(x: jax.Array, count: int) -> np.ndarray:
    """Gathers this host's part of [devices, B, D] to NumPy [count, D]."""
    shards = sorted(x.addressable_shards, key=lambda shard: shard.device.id)
    return np.concatenate([np.asarray(s.data) for s in shards]).reshape(count, -1)
