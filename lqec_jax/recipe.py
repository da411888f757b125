"""Recipes: `"rtn(bits=2, group_size=32) | rilq(rank=16)"`.

    recipe := call { "|" call }        call := method "(" [ name "=" value { "," ... } ] ")"
    value  := a Python literal, or a call (a method that takes another)

The text is parsed, never evaluated. A recipe is cut into phases: consecutive linear and block steps
make one streamed pass over the blocks; every model step is a phase of its own. What a chain of
steps cannot be good for is refused where it is to be run (`check_chain`), not where it is read: an
artifact that was made by one still loads.
"""

import ast
import inspect
from dataclasses import dataclass, field

from lqec_jax.core.types import Step
from lqec_jax.errors import InputError, did_you_mean
from lqec_jax.methods import METHODS, find_factory

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


def check_chain(recipe: Recipe) -> tuple[str, ...]:
    """Looks for steps that change nothing, or undo what was asked for.

    Returns:
      What is to be said of the others before work: chains that are seldom meant.
    Raises:
      InputError: a correction of a weight that nothing has changed, which is zero; a weight rounded
        twice, which has the error of both; a rotation, or a rounding of inputs, of what has one.
    """
    seen = _Seen()
    for step in recipe.steps:
        seen.add(step)
    return tuple(seen.notes)


@dataclass
class _Seen:
    """What the steps so far have made of a weight: names of steps, '' where there is none.

    Attributes:
      changed: the first that leaves something to make up for.
      rounded: the last that made a base of few bits.
      turned: what has been rotated: 'input', 'output'.
    """

    changed: str = ""
    rounded: str = ""
    grid: str = ""
    turned: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)

    def add(self, step: Step) -> None:
        row = METHODS.get(step.name)
        room = "" if row is None else row.factory.split(".")[1]
        # A step that is no row of the table may do anything.
        look = getattr(self, f"_add_{room}", None)
        if look is None:
            self.changed = self.changed or step.name
        else:
            look(step)

    def _round(self, step: Step) -> None:
        if self.rounded:
            raise InputError(
                f"recipe: {step.name} would round what {self.rounded} has rounded, and keep the "
                "error of both; leave one of them out"
            )
        self.rounded, self.changed = step.name, self.changed or step.name

    def _add_quantizers(self, step: Step) -> None:
        if step.arguments.get("init") != "base":  # bcq's, which writes the same weight otherwise
            self._round(step)

    def _add_sparsifiers(self, step: Step) -> None:
        if step.arguments.get("bits") is not None:
            self._round(step)
        self.changed = self.changed or step.name

    def _add_compensation(self, step: Step) -> None:
        if step.name in ("quantize_adapter", "merge"):  # they look for an adapter themselves
            return
        if step.arguments.get("quantizer") is not None:
            if self.rounded:
                self.notes.append(
                    f"recipe: {step.name} makes a base of its own in the place of {self.rounded}'s"
                )
            self.rounded, self.changed = step.name, self.changed or step.name
        elif not self.changed:
            raise InputError(
                f"recipe: no step before {step.name} changes a weight, so its correction would be "
                f"zero and take room; put it after one that does, as in rtn(bits=2) | {step.name}()"
            )

    def _add_transforms(self, step: Step) -> None:
        if step.name == "quantize_input":
            if self.grid:
                raise InputError(
                    "recipe: the inputs are rounded twice, and the last quantize_input would be "
                    "all that is left; leave one of them out"
                )
            self.grid = step.name
            return
        sides = {side for side in ("input", "output") if step.arguments.get(side)}
        if sides and sides <= self.turned:
            raise InputError(
                f"recipe: a second {step.name} of the {' and '.join(sorted(sides))} changes "
                "nothing, as it is rotated already; leave one of them out"
            )
        self.turned |= sides

    def _add_trainings(self, step: Step) -> None:
        if "bits" in step.arguments:  # one that makes a base
            if self.rounded:
                self.notes.append(
                    f"recipe: {step.name} begins at what {self.rounded} has rounded, and rounds "
                    "that again"
                )
            self.rounded = step.name
        elif not self.changed and "text" not in METHODS[step.name].statistics:
            self.notes.append(
                f"recipe: no step before {step.name} changes a weight, so there is no error to "
                "train away; its adapters learn the text alone"
            )
        self.changed = self.changed or step.name
