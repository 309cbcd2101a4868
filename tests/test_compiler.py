"""Checks that tests compile with the flags that users have."""

import os

import conftest
import jax
import pytest
from jaxlib import xla_client


def compiler_settings():
    """Returns the options that XLA read from XLA_FLAGS in this process."""
    return xla_client.CompileOptions().executable_build_options.debug_options


def test_tests_compile_with_the_flags_that_users_have():
    assert os.environ["XLA_FLAGS"] == conftest.DEVICES
    settings = compiler_settings()
    assert settings.xla_backend_optimization_level == 3
    assert not settings.xla_llvm_disable_expensive_passes
    assert len(jax.devices()) == 4


def test_no_setting_of_ours_changes_numbers_or_keeps_programs():
    assert not jax.config.values["jax_disable_most_optimizations"]
    assert jax.config.jax_default_matmul_precision is None
    assert not [name for name in os.environ if name.startswith("JAX_COMPILATION_CACHE")]


@pytest.mark.wiring
def test_wiring_compiles_quickly_where_asked_to(request):
    quick = request.config.getoption("--quick-compiler")
    level = compiler_settings().xla_backend_optimization_level
    assert level == (0 if quick else 3)
