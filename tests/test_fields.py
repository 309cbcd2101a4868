"""Tests of field rules: a command with any value ends in a run or in one short message."""

import functools

import numpy as np
import pytest
from absl import flags as absl_flags
from ml_collections.config_flags import config_flags

import helpers
from disco_jax import errors, fields, flags, main
from disco_jax.configs import common
from disco_jax.models import encoder
from disco_jax.nested import flatten
from disco_jax.train import state
from disco_jax.workflows import pretrain

MOST_CHARACTERS = 700  # longest message about one mistake
# Values that a user may pass to a field of each type: other types, and extreme values.
VALUES = {
    bool: ["7", "perhaps", "", "None", "true", "false"],
    int: ["x", "", "1.5", "nan", "-2", "-1", "0", "1", "2147483647", str(2**63), "9" * 5000],
    float: ["x", "", "nan", "inf", "-inf", "-1", "0", "1e-300", "3e38", "1e39", "1e400"],
    str: ["", "x", "/", "x" * 300, "x" * 3000, "a/" * 200, "a\nb", "\x1b[31m"],
    tuple: [
        "()", "('a',)", "(1,)", "(-1,)", "1", "x", "{}", "{'a': 1}", "((1, 2),)", "(((0, 0),),)",
        "(1e999,)", "(None,)", f"({2**63},)", "(0.1, 0.2)", "(0.1, 0.2, 0.3)", "(" * 300,
        "x" * 3000,
    ],
}  # fmt: skip
PRETRAINING = flatten(common.pretrain())
# Recipes of evaluations. The recipe of the demo contains three pretraining configs.
OTHERS = [n for n in flags.recipes() if not any("objectives" in f for f in flatten(flags.load(n)))]
SWEEPS = list(flags.recipes("sweeps"))
COMMAND = (
    "--config=disco:student=tiny,teacher=tiny,data=digits,smoke=true",
    "--config.data.source=npz", "--config.data.dir=digits.npz", "--workdir=run",
)  # fmt: skip


# Functions whose outputs depend on their arguments alone.
SHARED = (encoder.Encoder, "create"), (state, "_output_shape"), (flags, "recipes")


class Reached(Exception):
    """Raised after all checks, before the run writes files and compiles."""

    exit_code = 0


def set_default(flag, config):
    absl_flags.Flag._set_default(flag, config)
    flag.default_as_str = ""


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    """A function that runs `disco-jax pretrain` up to its first write: (exit code, message).

    Its calls share what equal networks have in common, and skip the text of the config that absl
    writes for its own --help, which would take two thirds of the time.
    """
    for owner, name in SHARED:
        monkeypatch.setattr(owner, name, functools.cache(getattr(owner, name)))
    monkeypatch.setattr(config_flags._ConfigFlag, "_get_parsed_value_as_string", lambda *_: "")
    monkeypatch.setattr(config_flags._ConfigFlag, "_set_default", set_default)
    np.savez(tmp_path / "digits.npz", **helpers.digits())
    monkeypatch.chdir(tmp_path)

    def claim(*_):
        raise Reached("reached")

    monkeypatch.setattr(pretrain, "claim", claim)

    def run(*words):
        code = main.main(["pretrain", *COMMAND, *words])
        return code, capsys.readouterr().err

    with helpers.tiny_backbone():
        yield run


def test_the_command_without_changes_passes_its_checks(command):
    assert command() == (0, "disco-jax pretrain: reached\n")


@pytest.mark.parametrize("kind", VALUES, ids=lambda kind: kind.__name__)
def test_every_field_takes_a_value_or_refuses_it_in_one_short_message(command, kind):
    """Sets a value in all fields at once, then alone in each field that accepted it."""
    own = [name for name, value in PRETRAINING.items() if type(value) is kind]
    alone = []
    for value in VALUES[kind]:
        code, message = command(*(f"--config.{name}={value}" for name in own))
        assert code in (0, 2) and "Traceback" not in message, message
        assert max(map(len, message.splitlines())) < MOST_CHARACTERS
        alone += [(name, value) for name in own if f"config.{name}=" not in message]
    assert alone
    for name, value in alone:
        code, message = command(f"--config.{name}={value}")
        assert code in (0, 2) and "Traceback" not in message, (name, value, message)
        assert len(message) < MOST_CHARACTERS and len(message.splitlines()) <= 2, (name, message)


@pytest.mark.parametrize("recipe", [*OTHERS, *SWEEPS])
def test_fields_of_other_recipes_are_taken_or_refused_in_short_messages(recipe):
    config = flags.load(recipe)
    for kind, values in VALUES.items():
        own = [name for name, value in flatten(config).items() if type(value) is kind]
        for value in values if own else ():
            words = [f"--config={recipe}", *(f"--config.{name}={value}" for name in own)]
            try:
                flags.parse("x", words, help_line="", like=recipe, needs_workdir=False)
            except errors.UserError as error:
                assert max(map(len, str(error).splitlines())) < MOST_CHARACTERS


def test_every_rule_is_of_a_field_that_there_is():
    configs = [flags.load(name) for folder in flags.FOLDERS for name in flags.recipes(folder)]
    names = {f".{name}" for config in configs for name in flatten(config)}
    for rule in fields.RULES:
        assert any(name.endswith(f".{rule}") for name in names), rule


def test_recipes_hold_what_they_may():
    for folder in flags.FOLDERS:
        for name in flags.recipes(folder):
            fields.check(flags.load(name), problems := errors.Problems())
            problems.raise_any()


def test_what_reads_a_wrong_field_is_not_looked_at():
    problems, calls = errors.Problems(), []
    problems.add("no width", "student.width")
    for reads in (("student",), ("student.width",), ("student.width.x",), ("student.wid", "seed")):
        problems.attempt(calls.append, reads, reads=reads)
    assert calls == [("student.width.x",), ("student.wid", "seed")]

    def refuse():
        raise errors.UserError("no seed")

    assert problems.attempt(refuse) is None and problems.attempt(refuse) is None
    with pytest.raises(errors.UserError, match=r"^no width\n  no seed$"):
        problems.raise_any()


def test_long_values_and_tables_are_cut():
    assert errors.shown("a" * 50) == repr("a" * 50)
    assert len(errors.shown("a" * 5000)) < 130 and "5002 long" in errors.shown("a" * 5000)
    many = [f"name{i}" for i in range(500)]
    message = str(errors.unknown("config.x", "name7", many))
    assert "Did you mean 'name7'" in message and "500 in all, see `disco-jax list`" in message
    assert len(message) < 300
    assert "Allowed: a, b." in str(errors.unknown("config.x", "c", ["b", "a"]))
