"""Pytest configuration: four virtual CPU devices, and an optional fast compiler mode.

Tests compile with the default compiler flags, as users do, except for the number of virtual
devices. `--quick-compiler` disables LLVM's optimisations, which compiles a step three times as
fast. It accepts only tests marked `wiring`: they compare no numbers with independent references, so
different rounding or fusion does not weaken them.
"""

import os
import pathlib

# Tests run on the CPU and hide TensorFlow's log.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import jax
import pytest

DEVICES = "--xla_force_host_platform_device_count=4"
# The older code generator compiles faster when optimisations are off.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"

# A worker compiles hundreds of programs and once crashed while writing one to the cache. Child
# processes use the cache as users do; see tests/test_console.py and tests/train/test_resume.py.
jax.config.update("jax_enable_compilation_cache", False)
# Rank promotion hides mistakes. The setting changes no numbers.
jax.config.update("jax_numpy_rank_promotion", "raise")

PARITY = pathlib.Path(__file__).parent / "parity"
MOST_BYTES = 3 * 2**30  # memory limit of a worker after a module's tests


def pytest_addoption(parser):
    parser.addoption(
        "--quick-compiler",
        action="store_true",
        help="compile without optimisation; only for tests marked `wiring`",
    )


def pytest_configure(config):
    """Sets the flags before any test creates a device."""
    quick = config.getoption("--quick-compiler")
    os.environ["XLA_FLAGS"] = f"{DEVICES} {QUICK}" if quick else DEVICES


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Rejects tests that are not marked `wiring` when --quick-compiler is set."""
    if config.getoption("--quick-compiler"):
        wrong = [item.nodeid for item in items if not item.get_closest_marker("wiring")]
        if wrong:
            raise pytest.UsageError(
                f"--quick-compiler takes only tests marked `wiring` (add -m wiring): {wrong[0]}"
            )


@pytest.fixture(scope="module", autouse=True)
def memory():
    """Frees compiled programs, which would otherwise accumulate to many gigabytes."""
    yield
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    if pages * os.sysconf("SC_PAGE_SIZE") > MOST_BYTES:
        jax.clear_caches()


@pytest.fixture(scope="session")
def parity():
    """The folder of recorded inputs and outputs."""
    return PARITY
