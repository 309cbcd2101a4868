"""Docstrings and local names are those of plain technical English.

A docstring opens with a verb ("Returns ..."), that of a class, a module or a property with a noun;
local variables are named after what they hold.
"""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = "disco_jax", "configs", "launch", "benchmarks", "docs", "tests"
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
# Words that open a clause without a subject, or a sentence that needs another one before it.
OPENINGS = {
    "What", "Of", "Whether", "How", "Which", "Where", "Who", "Whose", "When", "Why", "That",
    "If", "As", "But", "For", "To", "In", "By", "With", "From", "On",
}  # fmt: skip
# Names that fit any variable.
FILLERS = {
    "asked", "done", "found", "given", "gone", "got", "hers", "kept", "known", "left", "made",
    "meant", "mine", "ours", "put", "said", "seen", "stuff", "taken", "theirs", "thing", "things",
    "told", "wanted", "yours",
}  # fmt: skip
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
PROPERTIES = {"property", "cached_property", "fixture", "composite"}  # documented by nouns


def nodes(path):
    return ast.walk(ast.parse(path.read_text()))


def docstrings(path):
    """Yields (node, first word of its docstring) for every module, class and function."""
    for node in nodes(path):
        documented = isinstance(node, ast.Module | ast.ClassDef | FUNCTIONS)
        if documented and (text := ast.get_docstring(node)):
            yield node, text.split()[0].strip("`,.:;'\"")


def local_names(function):
    """Returns the parameters of a function and the names it assigns, without nested functions."""
    arguments = function.args
    names = {
        argument.arg
        for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    }
    pending = list(function.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ClassDef | FUNCTIONS):
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        pending.extend(ast.iter_child_nodes(node))
    return names


def is_property(function):
    """Returns whether a decorator makes the function a property, a fixture or a strategy."""
    for decorator in function.decorator_list:
        target = decorator.func if isinstance(decorator, ast.Call) else decorator
        name = target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")
        if name in PROPERTIES:
            return True
    return False


def percent(part, whole):
    return 100 * len(part) / len(whole)


@pytest.fixture(scope="module")
def all_docstrings():
    return [
        (f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {word}", node, word)
        for path in FILES
        for node, word in docstrings(path)
    ]


def test_docstrings_open_with_a_verb_or_a_noun(all_docstrings):
    wrong = [place for place, _, word in all_docstrings if word in OPENINGS]
    assert percent(wrong, all_docstrings) < 0.5, "\n".join(wrong)


def test_docstrings_of_functions_open_with_a_verb_in_the_third_person(all_docstrings):
    functions = [
        (place, word)
        for place, node, word in all_docstrings
        if isinstance(node, FUNCTIONS)
        and not is_property(node)
        and not node.name.startswith("test_")
        and place.startswith("disco_jax")
    ]
    wrong = [place for place, word in functions if not word.endswith("s")]
    assert percent(wrong, functions) < 2, "\n".join(wrong)


def test_local_variables_are_named_after_what_they_hold():
    names, fillers = [], []
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, FUNCTIONS):
                names.extend(local := local_names(node))
                fillers.extend(
                    f"{path.relative_to(ROOT)}:{node.lineno}: {name}" for name in local & FILLERS
                )
    assert percent(fillers, names) < 0.5, "\n".join(fillers)
