"""Seeds of the random numbers that the input pipeline draws."""

import numpy as np


def seed_words(*numbers: int, words: int = 2) -> np.ndarray:
    """Hashes integers to seed words u64[words]; the result is the same on every platform."""
    entropy = [int(number) % 2**64 for number in numbers]
    return np.random.SeedSequence(entropy).generate_state(words, np.uint64)
