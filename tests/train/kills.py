"""Kills a run during a save or an evaluation, for `test_resume.py`."""

import os
import signal
import sys

import helpers
from disco_jax import main as command


def main():
    """Runs the command line of a run that trains `TinyBackbone`; see `amid` for the first words."""
    amid(sys.argv[1], int(sys.argv[2]))
    del sys.argv[1:3]
    with helpers.tiny_backbone():
        command.console()


def amid(what, at):
    """Kills this process halfway through its "save" or "evaluation" number `at`; "": never."""
    from disco_jax.evaluate import knn

    calls = []

    def count(*_):
        calls.append(what)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    if what == "evaluation":
        first(knn, "neighbours", count)
    if what != "save":
        return

    def on_rename(old, *_):
        # A checkpoint and its parts are written under temporary names. The parts are renamed
        # first, so the checkpoint is incomplete when the metadata is renamed.
        if "/meta." in str(old):
            count()

    first(os, "rename", on_rename)
    first(os, "replace", on_rename)


def first(module, name, call):
    """Replaces a function of a module by one that first calls `call` with the same arguments."""
    original = getattr(module, name)

    def both(*args, **kwargs):
        call(*args)
        return original(*args, **kwargs)

    setattr(module, name, both)
