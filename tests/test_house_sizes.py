"""The laws of size and names that a machine can check, over the sources as text."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.sources import ROOT, SOURCES, WRITTEN, imported, name_of, parse

REFUSED_NAMES = {"util", "utils", "helper", "helpers", "misc", "common"}

LONGEST_FILE, LONGEST_FUNCTION, MOST_ARGUMENTS, DEEPEST_NESTING = 400, 60, 7, 3
COMMANDS = "lqec_jax/cli/"  # an option of a command is an argument of its function
# And a kernel's sizes, which have no other place.
KERNELS = ("kernels/lqec_kernels/triton_source.py", "kernels/lqec_kernels/triton_codes.py")
EXCEPTIONS = {
    "lqec_jax/api.py:compress": "the interface names its options; all but two are named",
    "lqec_jax/api.py:finetune": "the interface names its options; all but two are named",
    "lqec_jax/analysis/comparison.py:compare": "the interface names its options, all but two",
    "lqec_jax/runs/job.py:prepare": "what compress was asked for, handed on by name",
    "lqec_jax/train/fit.py:fit": "six nouns make a training run; mesh and session are optional",
    "lqec_jax/train/steps.py:make_training": "three nouns make a training; all else is named",
    "lqec_jax/train/fit.py:_run_updates": "the loop's state, passed instead of kept in an object",
}


def functions_of(path: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{name_of(path)}:{node.name}", node


def lines_of(function: ast.FunctionDef) -> int:
    """Counts a function's lines without its docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = first.end_lineno - first.lineno + 1 if documented else 0
    return function.end_lineno - function.lineno + 1 - docstring


def arguments_of(function: ast.FunctionDef) -> int:
    """Counts arguments; a function with named ones only, a factory or a command, may have many."""
    positional = [*function.args.posonlyargs, *function.args.args]
    own = len(positional) - (bool(positional) and positional[0].arg in ("self", "cls"))
    return own + len(function.args.kwonlyargs) if own else 0


def nesting_of(node: ast.AST) -> int:
    """Returns how deep blocks lie in one another; a function inside begins anew, elif is flat."""
    blocks = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.Match)
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        deepest = max(deepest, nesting_of(child) + (isinstance(child, blocks) and not is_elif))
    return deepest


def faults_of(name: str, function: ast.FunctionDef) -> Iterator[str]:
    if (lines := lines_of(function)) > LONGEST_FUNCTION:
        yield f"{name} has {lines} lines"
    if (arguments := arguments_of(function)) > MOST_ARGUMENTS and not name.startswith(
        (COMMANDS, *KERNELS)
    ):
        yield f"{name} has {arguments} arguments"
    if (nesting := nesting_of(function)) > DEEPEST_NESTING:
        yield f"{name} nests {nesting} deep"


def test_files_are_small():
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FILE}


def test_functions_are_small():
    assert not [
        fault
        for path in SOURCES
        for name, function in functions_of(path)
        if name not in EXCEPTIONS
        for fault in faults_of(name, function)
    ]


def test_the_counters_count():
    source = '''
def f(self, a, *, b=1):
    """One
    two."""
    for x in a:
        if x:
            return 1
        elif b:
            with x:
                return 2
    return 3
'''
    function = ast.parse(source).body[0]
    assert (lines_of(function), arguments_of(function), nesting_of(function)) == (8, 2, 3)


def test_every_exception_is_still_one():
    faulty = {
        name
        for path in SOURCES
        for name, function in functions_of(path)
        if any(faults_of(name, function))
    }
    assert set(EXCEPTIONS) <= faulty, "these keep the law now: take them off the list"


def test_no_flag_is_positional():
    def is_flag(default: ast.expr) -> bool:
        return isinstance(default, ast.Constant) and isinstance(default.value, bool)

    # A True or False among the arguments of a call says nothing: name it.
    assert not [
        name
        for path in SOURCES
        for name, function in functions_of(path)
        if any(map(is_flag, function.args.defaults)) and not name.startswith(COMMANDS)
    ]


def test_no_file_is_a_drawer():
    for path in SOURCES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        words = {word for part in parts for word in part.split("_")}
        assert not words & REFUSED_NAMES, name_of(path)
    assert not [name_of(path) for path in WRITTEN if path.stem in REFUSED_NAMES]


def test_annotations_are_evaluated():
    assert not [
        name_of(path) for path in WRITTEN if "__future__.annotations" in set(imported(parse(path)))
    ]


def test_every_module_says_what_it_is_and_leaves_nothing_undone():
    for path in SOURCES:
        assert ast.get_docstring(parse(path)), name_of(path)
        assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text()), name_of(path)


def test_no_except_is_bare():
    # It would hide our own faults.
    handlers = (
        (name_of(path), node)
        for path in SOURCES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ExceptHandler)
    )
    assert not [f"{name}:{node.lineno}" for name, node in handlers if node.type is None]
