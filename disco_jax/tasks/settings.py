"""Page of every config field with its default and meaning, read from the configs themselves."""

import ast
import functools
import inspect
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from disco_jax import flags
from disco_jax.configs import common, probes
from disco_jax.data import stacks
from disco_jax.nested import flatten

_HEAD = """# Settings

`disco-jax list --settings` generates this page from the configs, and a test compares the two.
`--config.FIELD=VALUE` changes a field, e.g. `--config.learning_rate.per_256=0.06`. Recipes change
defaults: `disco-jax list` shows the recipes, and each run writes its config to `config.json`.
"""
_EVALUATIONS = (
    "knn", "linear", "semi", "transfer", "finetune", "fewshot", "plane", "tsne", "cost", "bags",
)  # fmt: skip
_MISSING = object()  # equals no default


def markdown() -> str:
    """Returns the page: a table for pretraining, one for all evaluations, one for each of them."""
    notes = comments()
    pretraining, shared = flatten(common.pretrain()), flatten(probes.classification("NAME"))
    described = {**_of_classes(), **notes["pretrain"]}
    parts = [_HEAD, _table("Pretraining and distillation", pretraining, described)]
    training = ("learning_rate.", "optimizer.")
    labelled = {name: text for name, text in described.items() if name.startswith(training)}
    labelled |= {**notes["evaluation"], **notes["classification"]}
    title = "Trainings with labels: linear, semi, transfer, finetune, plane"
    parts.append(_table(title, shared, labelled))
    for name in _EVALUATIONS:
        config = flatten(flags.load(name))
        fields = {k: value for k, value in config.items() if shared.get(k, _MISSING) != value}
        title = f"`configs/{name}.py`"
        if len(fields) < len(config):
            title += ", fields that differ"
        parts.append(_table(title, fields, {**labelled, **_of_recipe(flags.recipes()[name])}))
    return "\n".join(parts)


def comments() -> dict[str, dict[str, str]]:
    """Returns the comments at the fields that `configs/common.py` and `probes.py` set.

    Returns:
      Function -> field -> comment, for each function that assigns fields. "pretrain" has those of
      all functions of `common.py`, with the fields of the augmentation presets.
    """
    out = _by_function(_Source.read(probes.__file__))
    pretrain = _by_function(_Source.read(common.__file__))
    out["pretrain"] = _of_presets()
    for notes in pretrain.values():
        out["pretrain"] |= notes
    return out


def _by_function(source: "_Source") -> dict[str, dict[str, str]]:
    """Returns function -> field -> comment of one file."""
    return {name: dict(source.notes(node)) for name, node in source.functions.items()}


def _of_recipe(path: pathlib.Path) -> dict[str, str]:
    """Returns field -> comment of all functions of a recipe."""
    out: dict[str, str] = {}
    for notes in _by_function(_Source.read(path)).values():
        out |= notes
    return out


def _of_presets() -> dict[str, str]:
    """Returns field of `augment` -> comment in `data/stacks.py`."""
    source = _Source.read(stacks.__file__)
    out: dict[str, str] = {}
    for node in source.tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            out |= source.keywords("augment", node.value, {})
    return out


def _of_classes() -> dict[str, str]:
    """Returns field -> description from the docstrings of objectives and views."""
    from disco_jax import methods
    from disco_jax.data import views

    out = {}
    for name, cls in methods.OBJECTIVES.items():
        out[f"objectives.{name}"] = (cls.__doc__ or "").partition("\n")[0]
        out |= _attributes(f"objectives.{name}", cls)
    for part in (views.Crop, views.Photometric):
        out |= _attributes("augment", part)
    return out


def _attributes(prefix: str, cls: type) -> dict[str, str]:
    """Returns field -> description from the section "Attributes" of a class docstring."""
    lines = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2].splitlines()
    out, key = {}, ""
    for line in lines:
        if match := re.match(r"  (\w+): (.*)", line):
            key = f"{prefix}.{match[1]}"
            out[key] = match[2]
        elif line.startswith("    ") and key:
            out[key] += f" {line.strip()}"
        else:
            break
    return {key: _without_ids(text) for key, text in out.items()}


def _without_ids(text: str) -> str:
    """Removes references to rows of `docs/disagreements.md`."""
    return re.sub(r"(?:, | \()disagreements? [A-Z]\d+\)", lambda m: ")" * (m[0][0] == ","), text)


class _Source:
    """Parsed config module, from which the comments at fields are read.

    Fields are the names in assignments `config.FIELD = ...` and the keywords of `dict(...)`, also
    if a function of this or of a neighbouring module returns the dict.
    """

    def __init__(self, path: pathlib.Path):
        text = path.read_text()
        self._path, self._lines = path, text.splitlines()
        self.tree = ast.parse(text)
        nodes = (node for node in self.tree.body if isinstance(node, ast.FunctionDef))
        self.functions = {node.name: node for node in nodes}

    @staticmethod
    @functools.cache
    def read(path: str | pathlib.Path) -> "_Source":
        """Returns the parsed file."""
        return _Source(pathlib.Path(path))

    def notes(self, function: ast.FunctionDef) -> Iterator[tuple[str, str]]:
        """Yields (field, comment) for the assignments in a function."""
        variables: dict[str, ast.expr] = {}
        for node in ast.walk(function):
            if not isinstance(node, ast.Assign):
                continue
            target = node.targets[0]
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "config":
                yield from self._field(target.attr, node, node.value, variables).items()
            elif isinstance(target, ast.Name):
                variables[target.id] = node.value

    def keywords(
        self, prefix: str, call: ast.Call, variables: dict[str, ast.expr]
    ) -> dict[str, str]:
        """Returns field -> comment for `dict(BASE, name=value)`, with the fields of BASE.

        Args:
          prefix: the section that the dict becomes.
          call: the call of `dict`.
          variables: local name -> value, to look up BASE.
        """
        out = {}
        for base in call.args:
            value = variables.get(base.id) if isinstance(base, ast.Name) else base
            if dictionary := self._dict(value):
                out |= dictionary[0].keywords(prefix, dictionary[1], variables)
        for keyword in call.keywords:
            # The comment of a line describes the first field of that line.
            before = self._lines[keyword.lineno - 1][: keyword.col_offset]
            if keyword.arg and not before.strip():
                out |= self._field(f"{prefix}.{keyword.arg}", keyword, keyword.value, variables)
        return out

    def _field(
        self, name: str, node: Any, value: ast.AST, variables: dict[str, ast.expr]
    ) -> dict[str, str]:
        """Returns field -> comment for one field and the fields of its value."""
        dictionary = self._dict(value)
        last = node.lineno if dictionary else node.end_lineno
        parts = self._above(node.lineno)
        if match := re.search(r"  # (.*)$", self._lines[last - 1]):
            parts.append(match[1])
        out = {name: _without_ids(" ".join(parts))} if parts else {}
        if dictionary:
            out |= dictionary[0].keywords(name, dictionary[1], variables)
        return out

    def _above(self, line: int) -> list[str]:
        """Returns the comment lines directly above a line, which counts from 1."""
        parts: list[str] = []
        above = line - 2
        while above >= 0 and (text := self._lines[above].strip()).startswith("#"):
            parts.insert(0, text.lstrip("# "))
            above -= 1
        return parts

    def _dict(self, value: ast.AST | None) -> "tuple[_Source, ast.Call] | None":
        """Returns the `dict(...)` that a value is, or that the function it calls returns.

        Returns:
          The module that has the dict and its call node, or None for any other value.
        """
        if not isinstance(value, ast.Call):
            return None
        owner, _, name = ast.unparse(value.func).rpartition(".")
        if name == "dict":
            return self, value
        path = self._path.with_name(f"{owner}.py") if owner else self._path
        source = _Source.read(path) if path.is_file() else None
        function = source and source.functions.get(name)
        if source and function and isinstance(function.body[-1], ast.Return):
            return source._dict(function.body[-1].value)
        return None


def _table(title: str, fields: dict[str, Any], notes: dict[str, str]) -> str:
    """Returns a Markdown table; the note of a group of fields has a row above the group."""
    lines = [f"## {title}\n", "| field | default | |", "|---|---|---|"]
    groups = set()
    for key, value in fields.items():
        group = key.rpartition(".")[0]
        if group and group not in groups:
            groups.add(group)
            if note := notes.get(group):
                lines.append(f"| **`{group}.`** | | {_cell(note)} |")
        lines.append(f"| `{key}` | `{_cell(repr(value))}` | {_cell(notes.get(key, ''))} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Escapes the column separator."""
    return text.replace("|", "\\|")
