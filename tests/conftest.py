"""Four virtual devices for every test, strict ranks, and a compilation cache between runs."""

import os
import pathlib

import xla_flags

os.environ["XLA_FLAGS"] = xla_flags.quick(os.environ.get("XLA_FLAGS", ""))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiled programs of child processes are kept between runs of the suite.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/disco_jax/xla_tests")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import jax
import pytest

# Child processes keep and find programs; a worker, which compiles hundreds, once crashed while it
# wrote one.
jax.config.update("jax_enable_compilation_cache", False)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_threefry_partitionable", True)

PARITY = pathlib.Path(__file__).parent / "parity"
MOST_BYTES = 3 * 2**30  # that a worker may hold after a module's tests


@pytest.fixture(scope="module", autouse=True)
def memory():
    """Of hundreds of compiled programs a worker would hold many gigabytes at the end."""
    yield
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    if pages * os.sysconf("SC_PAGE_SIZE") > MOST_BYTES:
        jax.clear_caches()


@pytest.fixture(scope="session")
def parity():
    """The folder of recorded inputs and outputs."""
    return PARITY
