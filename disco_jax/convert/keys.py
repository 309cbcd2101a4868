"""Selects and judges the keys of a state dict."""

import fnmatch
import re
from collections.abc import Sequence

import numpy as np

from disco_jax.convert.family import State

# Modules beside a network, or in it, that only training needs: copies, predictors, online
# classifiers, memories, losses (Barlow Twins' starts with a BatchNorm).
_TRAINING_MODULES = re.compile(
    r"bn|(\w+_)?(momentum|ema|target|teacher|student|online|predictor|prediction_head|encoder_[qk]"
    r"|criterion|loss\w*|queue\w*|memory\w*|metrics?|data_preprocessor|normalizer)(_\w+)?"
)


def entries_under(state: State, prefix: str) -> dict[str, np.ndarray]:
    """Returns the entries under `prefix`, which is removed, without BatchNorm's step counters."""
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and not key.endswith("num_batches_tracked")
    }


def serves_training(name: str) -> bool:
    """Returns whether a module beside a network is known to serve only its training."""
    return _TRAINING_MODULES.fullmatch(name) is not None


def is_allowed(key: str, allow: Sequence[str]) -> bool:
    """Returns whether a key matches one of several patterns."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in allow)
