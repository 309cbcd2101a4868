"""Compiles as users do, on four virtual devices; tests of wiring may compile quickly.

A user sets no compiler flags, so neither do tests, except for the number of virtual devices.
`--quick-compiler` switches LLVM's optimisations off, which compiles a step three times as fast,
and accepts only tests marked `wiring`: those compare no number with an independent one, so a
program that rounds or fuses differently proves the same.
"""

import os
import pathlib

# Tests need neither a GPU nor TensorFlow's log.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import jax
import pytest

DEVICES = "--xla_force_host_platform_device_count=4"
# The older code generator is the faster of the two where nothing is optimised.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"

# A worker compiles hundreds of programs and once crashed while it kept one. Processes of their own
# keep theirs as users' do; tests/test_console.py and tests/train/test_resume.py look at them.
jax.config.update("jax_enable_compilation_cache", False)
# Rank promotion hides mistakes; no user's number depends on this setting.
jax.config.update("jax_numpy_rank_promotion", "raise")

PARITY = pathlib.Path(__file__).parent / "parity"
MOST_BYTES = 3 * 2**30  # that a worker may hold after a module's tests


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
    """Refuses to compare numbers of programs that no user runs."""
    if config.getoption("--quick-compiler"):
        wrong = [item.nodeid for item in items if not item.get_closest_marker("wiring")]
        if wrong:
            raise pytest.UsageError(
                f"--quick-compiler takes only tests marked `wiring` (add -m wiring): {wrong[0]}"
            )


@pytest.fixture(scope="module", autouse=True)
def memory():
    """Frees compiled programs, of which hundreds would hold many gigabytes in the end."""
    yield
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    if pages * os.sysconf("SC_PAGE_SIZE") > MOST_BYTES:
        jax.clear_caches()


@pytest.fixture(scope="session")
def parity():
    """The folder of recorded inputs and outputs."""
    return PARITY
