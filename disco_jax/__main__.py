"""Entry point of `python -m disco_jax TASK`, the same as `disco-jax TASK`."""

from disco_jax.main import console

if __name__ == "__main__":
    console()
