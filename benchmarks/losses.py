"""InfoNCE and its gradient on the CPU: one pass over the queue, compared with the plain formula.

    python benchmarks/losses.py [--rounds 7]

Prints the time of the formula divided by ours, as the median of the ratios of alternating rounds,
and the temporary memory of each. Each timed run directly follows an untimed run of the same
function, because otherwise a run after the formula pays for the pages and the cache lines that its
logits evicted.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from disco_jax.ops.losses import info_nce
from disco_jax.ops.vectors import l2_normalize

SIZES = (65_536, 262_144, 1_048_576)
BATCH, DIM, TEMPERATURE = 32, 128, 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(f"{'K':>9} {'formula ms':>11} {'ours ms':>9} {'ratio':>6} {'MB':>7} {'ours MB':>8}")
    for size in SIZES:
        arguments = [
            l2_normalize(rows(count, seed)) for seed, count in enumerate((BATCH, BATCH, size))
        ]
        compiled = [jax.jit(with_gradient(f)).lower(*arguments).compile() for f in (formula, ours)]
        times = [[once(f, arguments) for f in compiled] for _ in range(rounds)]
        spans = [1e3 * statistics.median(column) for column in zip(*times, strict=True)]
        ratio = statistics.median(formula_s / our_s for formula_s, our_s in times)
        memory = [f.memory_analysis().temp_size_in_bytes / 1e6 for f in compiled]
        print(
            f"{size:9} {spans[0]:11.1f} {spans[1]:9.1f} {ratio:6.2f} {memory[0]:7.1f} "
            f"{memory[1]:8.1f}",
            flush=True,
        )


def rows(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, DIM), np.float32)


def formula(query, key, negatives):
    """Computes the cross-entropy of the first of f32[B, 1 + K] logits, as in the papers' code."""
    own = jnp.sum(query * key, axis=-1, keepdims=True)
    logits = jnp.concatenate([own, query @ negatives.T], axis=-1) / TEMPERATURE
    return jax.nn.logsumexp(logits, axis=-1) - logits[:, 0]


def ours(query, key, negatives):
    return info_nce(query, key, negatives, temperature=TEMPERATURE)


def with_gradient(function):
    return jax.value_and_grad(lambda *arguments: jnp.mean(function(*arguments)))


def once(function, arguments) -> float:
    jax.block_until_ready(function(*arguments))
    begin = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
