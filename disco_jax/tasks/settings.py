"""Every setting with its default and what it means, read from the configs themselves."""

import ast
import inspect
import pathlib
import re
from typing import Any

from disco_jax import flags
from disco_jax.configs import common
from disco_jax.data import presets
from disco_jax.nested import flatten

_HEAD = """# Settings

Made by `disco-jax list --settings` from the configs; a test holds it equal to them. Any field is
changed with `--config.FIELD=VALUE`, e.g. `--config.learning_rate.per_256=0.06`. Recipes change the
defaults: `disco-jax list` shows them, and each run prints or keeps (`config.json`) what it had.
"""
_EVALUATIONS = (
    "knn", "linear", "semi", "transfer", "finetune", "fewshot", "plane", "tsne", "cost", "bags",
)  # fmt: skip


def markdown() -> str:
    """The page: a table of the pretraining fields, one of what evaluations share, one for each."""
    notes = comments()
    pretraining, shared = flatten(common.pretrain()), flatten(common.classification("NAME"))
    told = {**_of_classes(), **notes["pretrain"]}
    parts = [_HEAD, _table("Pretraining and distillation", pretraining, told)]
    rates = {k: text for k, text in told.items() if k.startswith(("learning_rate.", "optimizer."))}
    labelled = {**rates, **notes["evaluation"], **notes["classification"]}
    parts.append(
        _table("Trainings with labels: linear, semi, transfer, finetune, plane", shared, labelled)
    )
    for name in _EVALUATIONS:
        own = flatten(flags.load(name))
        fields = {key: value for key, value in own.items() if shared.get(key, _NONE) != value}
        title = f"`configs/{name}.py`" + (", beyond those" if len(fields) < len(own) else "")
        parts.append(_table(title, fields, {**labelled, **_of_file(flags.recipes()[name])}))
    return "\n".join(parts)


_NONE = object()


def comments() -> dict[str, dict[str, str]]:
    """Function of `configs/common.py` -> field -> the comments at it."""
    lines, tree = _read(pathlib.Path(common.__file__))
    stacked = _of_presets()
    out = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found = _Comments(lines).of(node)
            out[node.name] = {**stacked, **found} if node.name == "pretrain" else found
    return out


def _of_classes() -> dict[str, str]:
    """Of objectives and views, from the docstrings of the classes that read them."""
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
    """The part "Attributes" of a docstring."""
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
    return {key: _plain(text) for key, text in out.items()}


def _plain(text: str) -> str:
    """Without the numbers of `docs/disagreements.md`, which a table of settings does not need."""
    return re.sub(r"(?:, | \()disagreements? [A-Z]\d+\)", lambda m: ")" * (m[0][0] == ","), text)


def _of_file(path: pathlib.Path) -> dict[str, str]:
    lines, tree = _read(path)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {key: text for one in functions for key, text in _Comments(lines).of(one).items()}


def _of_presets() -> dict[str, str]:
    """Of the fields that `data/presets.py` gives `augment` and `local`."""
    lines, tree = _read(pathlib.Path(presets.__file__))
    reader = _Comments(lines)
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            reader.fields("augment", node.value)
    return reader.found


def _read(path: pathlib.Path) -> tuple[list[str], ast.Module]:
    text = path.read_text()
    return text.splitlines(), ast.parse(text)


class _Comments:
    """Walks the assignments `config.FIELD = ...` of a function, dicts in them too."""

    def __init__(self, lines: list[str]):
        self._lines = lines
        self.found: dict[str, str] = {}
        self._locals: dict[str, ast.expr] = {}

    def of(self, function: ast.FunctionDef) -> dict[str, str]:
        for node in ast.walk(function):
            if not isinstance(node, ast.Assign):
                continue
            target = node.targets[0]
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "config":
                self._note(target.attr, node, node.value)
            elif isinstance(target, ast.Name):
                self._locals[target.id] = node.value
        return self.found

    def fields(self, name: str, call: ast.Call) -> None:
        """Of the keywords of a `dict(...)`, and of the dicts that it starts from."""
        for given in call.args:
            known = self._locals.get(given.id) if isinstance(given, ast.Name) else None
            if isinstance(known, ast.Call):
                self.fields(name, known)
        for keyword in call.keywords:
            # A comment is of the first field of its line.
            before = self._lines[keyword.lineno - 1][: keyword.col_offset]
            if keyword.arg and not before.strip():
                self._note(f"{name}.{keyword.arg}", keyword, keyword.value)

    def _note(self, name: str, node: Any, value: ast.AST) -> None:
        above = node.lineno - 2
        text: list[str] = []
        while above >= 0 and (one := self._lines[above].strip()).startswith("#"):
            text.insert(0, one)
            above -= 1
        nested = None
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "dict":
            nested = value
        ends = self._lines[(node.lineno if nested else node.end_lineno) - 1]
        if match := re.search(r"  # (.*)$", ends):
            text.append(match[1])
        if text:
            joined = " ".join(line.lstrip("# ") for line in text)
            self.found[name] = _plain(joined)
        if nested:
            self.fields(name, nested)


def _table(title: str, fields: dict[str, Any], notes: dict[str, str]) -> str:
    """Markdown; a note on a group of fields stands above them in a line of its own."""
    lines = [f"## {title}\n", "| field | default | |", "|---|---|---|"]
    told = set()
    for key, value in fields.items():
        group = key.rpartition(".")[0]
        if group and group not in told:
            told.add(group)
            if note := notes.get(group):
                lines.append(f"| **`{group}.`** | | {_cell(note)} |")
        lines.append(f"| `{key}` | `{_cell(repr(value))}` | {_cell(notes.get(key, ''))} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
