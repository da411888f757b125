"""The values that everything else is made of. Read this file first.

A *step* changes one term of a compressed weight (or, for model steps, of all of them together). A
recipe is a chain of steps. A model is a handful of pure functions. Nothing here knows a method, a
file or a family.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from lqec_jax.core.sites import Site
from lqec_jax.core.tree import Params
from lqec_kernels.formats import CompressedLinear

Scope = Literal["linear", "block", "model"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinearStats:
    """What calibration saw of a linear; a field is None unless a step asked for it. All float32.

    Attributes:
      rms: sqrt(E[x²]) per input channel over all calibration tokens, [d_in].
      absmean: E|x| per input channel, [d_in].
      gram: E[x xᵀ], [d_in, d_in].
      fisher: the mean over windows of (∂ loss / ∂ w)², loss being a window's summed next-token
        loss in the teacher, [d_in, d_out]. The only one that is not of the inputs.
    """

    rms: jax.Array | None = None
    absmean: jax.Array | None = None
    gram: jax.Array | None = None
    fisher: jax.Array | None = None

    @classmethod
    def shapes(cls, needs: frozenset[str], d_in: int, d_out: int) -> "LinearStats":
        """Returns the statistics of one linear as shapes."""
        known = {"rms": (d_in,), "absmean": (d_in,), "gram": (d_in, d_in), "fisher": (d_in, d_out)}
        return cls(**{name: jax.ShapeDtypeStruct(known[name], jnp.float32) for name in needs})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinearProblem:
    """One weight to compress: w float32 [d_in, d_out], its input statistics, a random key."""

    w: jax.Array
    stats: LinearStats
    key: jax.Array


class _Printed:
    """A step prints as the call that makes it, every argument said."""

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.name}({inside})"


@dataclass(frozen=True, eq=False, repr=False)
class LinearStep(_Printed):
    """A method that changes one weight at a time, with its arguments.

    Attributes:
      name: the method's name in the table.
      run: a pure jit-able (LinearProblem, CompressedLinear) -> CompressedLinear, or -> (that,
        facts) where `notes` is given; see `run_linear`.
      arguments: all arguments after defaults, printable; part of a run's fingerprint.
      needs: names of `LinearStats` fields that must be collected for it.
      notes: (facts as numpy arrays) -> lines for the report; facts are what `run` has to say of one
        weight besides the result.
      objective: what the step lowers, as (LinearProblem, CompressedLinear) -> scalar.
      objective_name: the same in words.
    """

    scope: ClassVar[Scope] = "linear"
    leave_out: ClassVar[frozenset[str]] = frozenset()

    name: str
    run: Callable
    arguments: Mapping[str, Any]
    needs: frozenset[str] = frozenset()
    notes: Callable | None = None
    objective: Callable | None = None
    objective_name: str = ""


@dataclass(frozen=True)
class Schedule:
    """How long a training runs, and how often it looks at the validation windows.

    Attributes:
      updates: at most so many; None is `epochs` passes over the training windows.
      batch: windows an update sees, walked in `accumulate` equal parts; None is all of them.
      accumulate: None is chosen for the machine, see `train.update.count_parts`.
      eval_every: updates between two looks; None is one a pass.
      patience: looks without a new best after which it stops; 0 never stops early.
    """

    updates: int | None = None
    batch: int | None = 8
    accumulate: int | None = 1
    eval_every: int | None = 25
    patience: int = 5
    epochs: int | None = None

    def resolve(self, windows: int) -> "Schedule":
        """Returns the schedule over so many training windows, in updates."""
        if self.epochs is None:
            return self
        batch = min(self.batch, windows)
        each = windows // batch
        return replace(self, updates=self.epochs * each, batch=batch, eval_every=each, epochs=None)


@dataclass(frozen=True, eq=False, repr=False)
class TrainingStep(_Printed):
    """A method that trains, a block or the whole model at once, with its arguments.

    Attributes:
      name, arguments, objective_name: as of a `LinearStep`.
      scope: what its loss sees. 'linear' trains a block's weights one after another.
      run: (BlockProblem or ModelProblem) -> Solution.
      schedule: how long.
      preview: what becomes of one weight, (CompressedLinear) -> CompressedLinear; called on shapes
        alone, so that a refusal and the final size are known before the first flop.
      count: how many numbers it moves in one weight, (CompressedLinear of shapes) -> int. A step of
        blocks is shown the dense weight, one of the model what the recipe makes of it.
      leave_out: paths of linears that stay as they are.
      scratch_bytes: (vocabulary size) -> what it keeps on disk of every calibration token, in
        bytes.
    """

    name: str
    scope: Literal["block", "model"]
    run: Callable
    arguments: Mapping[str, Any]
    schedule: Schedule
    preview: Callable
    count: Callable
    leave_out: frozenset[str] = frozenset()
    scratch_bytes: Callable = lambda vocab: 0
    objective_name: str = ""

    needs: ClassVar[frozenset[str]] = frozenset()


Step = LinearStep | TrainingStep


@dataclass(frozen=True)
class ModelFns:
    """A decoder as pure functions; anyone's model that offers them can be compressed.

    `params` is a dict with 'blocks': a tuple of segments, each one block's tree stacked on a
    leading layer axis (blocks of unequal structure make segments of their own).

    Attributes:
      embed: (params, tokens int [b, t]) -> h [b, t, d].
      block: (block params, h) -> (h, inputs); `inputs` maps each linear's path to what it reads.
      hidden: (params, tokens) -> (pre_norm, post_norm), both [b, t, d].
      head: (params, post_norm [..., d], start=0, size=None) -> float32 logits of the vocabulary
        columns start .. start + size (all of them by default).
      sites: a block's linears in data-flow order, those that share an input together; their order
        numbers them. `core.sites.in_groups` makes them of paths alone.
      norm: (params, pre_norm) -> post_norm.
      vocab_size: width of the head.
    """

    embed: Callable
    block: Callable
    hidden: Callable
    head: Callable
    sites: tuple[Site, ...]
    norm: Callable | None = None
    vocab_size: int | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """Returns the paths of a block's linears, e.g. 'attn/q'."""
        return tuple(site.path for site in self.sites)

    @property
    def linear_groups(self) -> tuple[tuple[str, ...], ...]:
        """Returns the same paths, those that share an input together."""
        groups = groupby(self.sites, key=lambda site: site.group)
        return tuple(tuple(site.path for site in group) for _, group in groups)

    @property
    def row_parallel(self) -> frozenset[str]:
        """Returns the paths of the linears whose input, not output, is split over devices."""
        return frozenset(site.path for site in self.sites if site.split == "in")


class Evaluation(NamedTuple):
    """One point of a training curve. Losses are means over windows."""

    update: int
    train_loss: float | None
    val_loss: float


@dataclass(frozen=True)
class Work:
    """Where a training runs.

    Attributes:
      key: random key.
      mesh: devices to run on, or None for one.
      session: keeps and restores its state and is told how far it is; see `train.fit.Session`.
      scratch: a file in which it may keep one array, of what it needs of the teacher; None where
        that may be held in memory.
    """

    key: jax.Array
    mesh: Any = None
    session: Any = None
    scratch: Any = None


@dataclass(frozen=True)
class Windows:
    """A text cut to be trained on.

    Attributes:
      tokens: int32 [n, t], training windows first.
      train: how many those are; the others are looked at.
      weights: float32 [n, t - 1], what predicting tokens 1 .. t-1 counts, 0 for what is not
        learned; a window's loss is their weighted sum. None is the mean.
    """

    tokens: Any
    train: int
    weights: Any = None

    @property
    def val(self) -> int:
        return len(self.tokens) - self.train


@dataclass(frozen=True)
class BlockProblem:
    """What a training of blocks sees: one block, and what enters it in both streams.

    Attributes:
      fns: the model's functions.
      block: the student's block as the steps before left it, linears as CompressedLinear.
      dense: the teacher's block, its kernels dense.
      teacher, student: what enters the block in each stream, [n, t, d], on disk or in memory; the
        training windows come first.
      train: how many of the windows are for training, the others for validation.
      work: where it runs.
    """

    fns: ModelFns
    block: Params
    dense: Params
    teacher: Any
    student: Any
    train: int
    work: Work


@dataclass(frozen=True)
class ModelProblem:
    """What a training of the whole model sees: the student, the teacher's answers, the text.

    Attributes:
      fns: the model's functions, which also fix the compute dtype.
      params: the student.
      windows: the text.
      work: where it runs.
      teacher: pre-norm hidden states of the teacher for all windows, [n, t, d], on disk or in
        memory; None where there is no teacher.
      outer: the teacher's embedding, norm and head, where an earlier step has given the student
        others; None where both have the same.
    """

    fns: ModelFns
    params: Params
    windows: Windows
    work: Work
    teacher: Any = None
    outer: Params | None = None


@dataclass(frozen=True)
class Solution:
    """What a training returns: the new block or model, its curve, and what is worth saying."""

    params: Params
    history: tuple[Evaluation, ...]
    best_update: int
    notes: tuple[str, ...] = field(default=())


def run_linear(step: LinearStep, problem: LinearProblem, leaf: CompressedLinear) -> tuple:
    """Runs a linear step; returns (leaf, facts), facts being () where a step has none."""
    out = step.run(problem, leaf)
    return (out, ()) if step.notes is None else out


def weight_error(problem: LinearProblem, leaf: CompressedLinear) -> jax.Array:
    """Returns ||w - ŵ||² / ||w||², the relative error of a weight; 0 for a zero one."""
    error = jnp.sum(jnp.square(problem.w - leaf.dense()))
    return error / jnp.maximum(jnp.sum(jnp.square(problem.w)), jnp.finfo(jnp.float32).tiny)


def channel_error(problem: LinearProblem, leaf: CompressedLinear) -> jax.Array:
    """Returns Σ E[x_i²] (w - ŵ)² / Σ E[x_i²] w², a relative output error blind to correlations."""
    rms = problem.stats.rms[:, None]
    error = jnp.sum(jnp.square(rms * (problem.w - leaf.dense())))
    return error / jnp.maximum(jnp.sum(jnp.square(rms * problem.w)), jnp.finfo(jnp.float32).tiny)


def output_error(problem: LinearProblem, leaf: CompressedLinear) -> jax.Array:
    """Returns tr(Δᵀ G Δ) / tr(wᵀ G w), Δ = w - ŵ, G = E[x xᵀ]: the relative output error."""

    def energy(w: jax.Array) -> jax.Array:
        return jnp.sum(w * jnp.matmul(problem.stats.gram, w, precision="highest"))

    tiny = jnp.finfo(jnp.float32).tiny
    # Round-off of a gram that is not quite positive may take either below zero.
    return jnp.maximum(energy(problem.w - leaf.dense()), 0.0) / jnp.maximum(energy(problem.w), tiny)
