"""Tests of typed settings: sections generated from dataclasses, and parsed back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
from ml_collections import ConfigDict

from disco_jax import typed
from disco_jax.configs import common
from disco_jax.errors import UserError
from disco_jax.methods import registry
from disco_jax.train.run_settings import RunSettings


@dataclasses.dataclass(frozen=True)
class Base:
    """A base.

    Attributes:
      width: of both, described on
        two lines: the second
      hint: described by the base
    """

    width: int = 4
    hint: str = ""


@dataclasses.dataclass(frozen=True)
class Part(Base):
    """A part.

    Attributes:
      hint: described by the part
    """

    pairs: tuple[tuple[int, int], ...] = ((0, 1),)
    extra: bool = typed.optional(False)


@dataclasses.dataclass(frozen=True)
class Whole:
    """Settings with a nested part and sections without a dataclass."""

    name: str
    part: Part
    terms: Mapping[str, Mapping[str, Any]]


SECTION = {"name": "a", "part": {"width": 4, "hint": "", "pairs": ((0, 1),)}, "terms": {}}


def test_a_section_has_the_fields_and_defaults_of_its_class():
    assert typed.section(Whole, name="a", terms={}) == SECTION
    assert typed.sections(Whole) == {"part": Part}


def test_a_config_is_parsed_at_all_depths_with_tuples_for_lists():
    terms = {"one": {"views": [0, [1]]}}
    config = ConfigDict({**SECTION, "part": {**SECTION["part"], "pairs": [[2, 3]]}, "terms": terms})
    parsed = typed.parse(Whole, config)
    assert parsed == Whole("a", Part(pairs=((2, 3),)), {"one": {"views": (0, (1,))}})
    assert type(parsed.terms["one"]) is dict


def test_unknown_and_missing_fields_are_named_together():
    section = {"part": {"widht": 3, "hint": "", "pairs": ()}, "terms": {}}
    with pytest.raises(UserError) as error:
        typed.parse(Whole, section)
    message = str(error.value)
    assert "config.part='widht' is not known. Did you mean 'width'?" in message
    assert "config.part.width is missing" in message and "config.name is missing" in message
    with pytest.raises(UserError, match=r"config\.part=3 must be a section"):
        typed.parse(Whole, {**SECTION, "part": 3})


def test_an_optional_field_may_be_missing_and_be_set():
    assert not typed.parse(Whole, SECTION).part.extra
    assert typed.parse(Part, {**SECTION["part"], "extra": True}).extra


def test_sections_of_evaluations_take_defaults_but_no_unknown_fields():
    assert typed.parse(Part, {"width": 3}, defaults=True) == Part(width=3)
    with pytest.raises(UserError, match="'widht' is not known"):
        typed.parse(Part, {"widht": 3}, defaults=True)


def test_stored_configs_take_defaults_and_lose_removed_fields():
    """Whole sections that an earlier version lacked are added too."""
    parsed = typed.parse(Whole, {"name": "a", "terms": {}, "removed": 1}, stored=True)
    assert parsed == Whole("a", Part(), {})
    with pytest.raises(UserError, match=r"config\.name is missing"):
        typed.parse(Whole, {"terms": {}}, stored=True)


def test_descriptions_come_from_the_docstrings_of_all_bases():
    assert typed.notes(Part) == {
        "width": "of both, described on two lines: the second",
        "hint": "described by the part",
    }


def test_every_field_of_a_run_is_described():
    described = typed.notes(RunSettings)
    assert set(described) == {field.name for field in dataclasses.fields(RunSettings)}
    for name, cls in typed.sections(RunSettings).items():
        assert set(typed.notes(cls)) == {field.name for field in dataclasses.fields(cls)}, name


def test_a_parsed_config_has_the_values_of_the_config():
    config = common.pretrain("mine")
    parsed = dataclasses.asdict(typed.parse(RunSettings, config))
    parsed["optimizer"].pop("nesterov")  # only evaluations have it
    assert parsed == config.to_dict()
    assert parsed["objectives"] == registry.sections()
