"""The compiler's settings for tests, which compile much and compute little."""

import os
import subprocess
import sys

BASE = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
# An older code generator: slower where LLVM optimises, a third quicker where it does not.
OLDER = "--xla_cpu_use_fusion_emitters=false"


def quick(given):
    """`given` with four virtual devices, and without what takes the compiler long.

    Args:
      given: XLA_FLAGS; workers have them from the process that started them.
    """
    if BASE in given:
        return given
    return " ".join([given, BASE] + [OLDER] * known(OLDER))


def known(flag):
    """Whether XLA has a flag: it ends every process that is given another."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return not subprocess.run(command, env=environment, capture_output=True).returncode
