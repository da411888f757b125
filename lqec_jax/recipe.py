"""Recipes: `"rtn(bits=2, group_size=32) | rilq(rank=16)"`.

    recipe := call { "|" call }        call := method "(" [ name "=" value { "," ... } ] ")"
    value  := a Python literal, or a call (a method that takes another)

The text is parsed, never evaluated. A recipe is cut into phases: consecutive linear and block steps
make one streamed pass over the blocks; every model step is a phase of its own.
"""

import ast
import inspect
from dataclasses import dataclass

from lqec_jax.core.types import Step
from lqec_jax.errors import InputError, did_you_mean
from lqec_jax.methods import find_factory

LONGEST = 4096  # characters


@dataclass(frozen=True)
class Recipe:
    """A chain of steps; `str(recipe)` is the text with every default written out."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return " | ".join(str(step) for step in self.steps)

    @property
    def phases(self) -> tuple[tuple[Step, ...], ...]:
        phases: list[tuple[Step, ...]] = []
        for step in self.steps:
            streamed = step.scope != "model"
            if streamed and phases and phases[-1][-1].scope != "model":
                phases[-1] += (step,)
            else:
                phases.append((step,))
        return tuple(phases)

    @property
    def needs(self) -> frozenset[str]:
        """Returns the names of all input statistics that some step asks for."""
        return frozenset().union(*(step.needs for step in self.steps))

    @property
    def largest_batch(self) -> int:
        """Returns how many windows the largest update of a model step sees, 0 without one."""
        trained = (step for step in self.steps if step.scope == "model")
        return max((step.schedule.batch or 0 for step in trained), default=0)

    @property
    def reads_dense_again(self) -> bool:
        """Says whether dense weights are read for more than compressing them block by block."""
        return any(step.scope == "model" for step in self.steps) or "fisher" in self.needs

    @property
    def reads_student(self) -> bool:
        """Says whether some step reads what the student computes inside."""
        return bool(self.needs) or any(step.scope == "block" for step in self.steps)


def parse_recipe(text: str | Recipe) -> Recipe:
    """Reads a recipe.

    Raises:
      InputError: the text is no recipe, names an unknown method or argument, or gives an argument a
        value that its method refuses.
    Example:
      >>> [len(phase) for phase in parse_recipe("rtn(bits=2) | svd(rank=4) | rilq()").phases]
      [2, 1]
    """
    if isinstance(text, Recipe):
        return text
    if not isinstance(text, str) or not text.strip():
        raise InputError('recipe: empty; write for example "rtn(bits=2, group_size=32) | rilq()"')
    if len(text) > LONGEST:
        raise InputError(f"recipe: {len(text)} characters; at most {LONGEST} are read")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return Recipe(tuple(_build(node, text) for node in _chain(tree)))
    except SyntaxError as error:
        place = f" at column {error.offset}" if error.offset else ""
        raise InputError(
            f"recipe: {_quote(text)} cannot be read{place}; write method(name=value) | method(...)"
        ) from None
    except (RecursionError, MemoryError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"recipe: {_quote(text)} cannot be read: {_one_line(error)}") from None


def _chain(node: ast.expr) -> list[ast.expr]:
    calls = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        calls.append(node.right)
        node = node.left
    return [node, *reversed(calls)]


def _build(node: ast.expr, text: str) -> Step:
    if isinstance(node, ast.Name):
        node = ast.Call(node, [], [])  # `svd` is `svd()`
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise InputError(
            f"recipe: {_quote(ast.unparse(node))} is not a method; write method(name=value)"
        )
    name = node.func.id
    factory = find_factory(name)
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise InputError(f"recipe: {name} takes named arguments only; write {name}(name=value)")
    known = inspect.signature(factory).parameters
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg not in known:
            hint = did_you_mean(keyword.arg, known)
            raise InputError(f"recipe: {name} has no argument {keyword.arg!r}{hint}")
        if keyword.arg in arguments:
            raise InputError(f"recipe: {name} was given {keyword.arg!r} twice; keep one")
        arguments[keyword.arg] = _value(keyword.value, text)
    return factory(**arguments)


def _value(node: ast.expr, text: str):
    if isinstance(node, ast.Call):
        return _build(node, text)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        raise InputError(
            f"recipe: {_quote(ast.unparse(node))} is neither a literal nor a method call"
        ) from None


def _quote(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
