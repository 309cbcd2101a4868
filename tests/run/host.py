"""One process of a multi-process run for `test_hosts.py`: python host.py TASK WORKDIR SETTINGS."""

import errno
import json
import os
import sys
import time

import numpy as np


class Shared:
    """The digits; each process reads its rows of the batch that a single process would read."""

    def __init__(self, inner, host, hosts):
        self._inner, self._host, self._hosts = inner, host, hosts

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def train(self, split, views, batch_size, seed, start, max_unreadable):
        from disco_jax.data import contract

        begin = contract.Position(start.epoch, start.offset * self._hosts)
        whole = batch_size * self._hosts
        rows = slice(self._host * batch_size, (self._host + 1) * batch_size)
        for batch in self._inner.train(split, views, whole, seed, begin, max_unreadable):
            views_here = {view: images[rows] for view, images in batch.views.items()}
            epoch, offset = batch.position.epoch, batch.position.offset
            after = contract.Position(epoch, offset // self._hosts)
            yield contract.HostBatch(views_here, {}, after, batch.labels[rows], batch.rows[rows])


class Disturbed(Shared):
    """The same, with a failure in one process before a given step, counted from this start."""

    def __init__(self, *args, event, at, process):
        super().__init__(*args)
        self._event, self._at, self._is_victim = event, at, process == args[1]

    def train(self, *args):
        for step, batch in enumerate(super().train(*args), start=1):
            if self._is_victim and step == self._at:
                if self._event == "hang":
                    time.sleep(600)
                if self._event == "no room":
                    raise OSError(errno.ENOSPC, "", "/disk/of/process")
                os.kill(os.getpid(), int(self._event))
            yield batch


def differ(state):
    """Changes the last leaf of a state on the last device of the last process."""
    import jax

    leaves, treedef = jax.tree.flatten(state)
    for i, leaf in enumerate(leaves):
        shards = [np.array(shard.data) for shard in leaf.addressable_shards]
        if jax.process_index() == jax.process_count() - 1 and i == len(leaves) - 1:
            shards[-1] = shards[-1] + np.asarray(1, shards[-1].dtype)
        placed = [
            jax.device_put(x, s.device)
            for x, s in zip(shards, leaf.addressable_shards, strict=True)
        ]
        leaves[i] = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, placed)
    return jax.tree.unflatten(treedef, leaves)


def work(task, workdir, settings):
    import jax

    import helpers
    from disco_jax import flags
    from disco_jax.commands import knn
    from disco_jax.data.arrays import ArraySource
    from disco_jax.train import replicas, state
    from disco_jax.workflows import pretrain

    here = jax.process_index(), jax.process_count()
    inner = ArraySource(helpers.digits_splits())
    if task == "knn":
        part = ArraySource(helpers.digits_splits(), process_index=here[0], process_count=here[1])
        return knn.run(flags.load("knn"), workdir, part)
    config = helpers.tiny_config(settings.pop("recipe"), **settings.pop("config"))
    if task == "replicas":
        _, begin, _, _ = helpers.smoke(config, 1)
        begin = state.replicate(begin)
        replicas.check(begin, 0)
        print("equal", flush=True)
        replicas.check(differ(begin), 1)
        return None
    event = settings.pop("event", None)
    source = Disturbed(inner, *here, **event) if event else Shared(inner, *here)
    return pretrain.run(config, workdir, source, **settings)


def main():
    import jax

    import helpers
    from disco_jax import flags
    from disco_jax import main as command
    from disco_jax.run import hosts

    jax.config.update("jax_numpy_rank_promotion", "raise")
    if "DISCO_JAX_COORDINATOR" in os.environ:
        hosts.initialize(timeout_s=int(os.environ.get("PEER_TIMEOUT_S", "100")))
    task, workdir, settings = sys.argv[1:]
    flags.prepare_jax(workdir=workdir)  # later starts of the run reuse the compiled programs
    command._start = lambda *_: print(
        json.dumps(work(task, workdir, json.loads(settings))), flush=True
    )
    with helpers.tiny_backbone():
        sys.exit(command.main([task]))


if __name__ == "__main__":
    main()
