"""The values that everything else is made of. Read this file first.

A *step* changes one term of a compressed weight (or, for model steps, of all of them together). A
recipe is a chain of steps. A model is a handful of pure functions. Nothing here knows a method, a
file or a family.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, NamedTuple

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


@dataclass(frozen=True, eq=False, repr=False)
class Step:
    """One method with its arguments.

    Attributes:
      name: the method's name in the table.
      scope: what it sees: one linear, one block, or the whole model.
      run: for `linear`, a pure jit-able (LinearProblem, CompressedLinear) -> CompressedLinear, or
        -> (CompressedLinear, facts) where `notes` is given; see `run_linear`. For `block`,
        (BlockProblem) -> BlockSolution; for `model`, (ModelProblem) -> ModelSolution.
      needs: names of `LinearStats` fields that must be collected for it.
      arguments: all arguments after defaults, printable; part of a run's fingerprint.
      notes: for `linear`, (facts as numpy arrays) -> lines for the report; facts are what `run`
        has to say of one weight besides the result.
      preview: for `block` and `model`, what becomes of one weight, (CompressedLinear) ->
        CompressedLinear; called on shapes alone, so that a refusal and the final size are known
        before the first flop.
      trained: for `block` and `model`, how many numbers the step trains for one weight,
        (CompressedLinear of shapes) -> int; None is all adapters. A block step is shown the dense
        weight, a model step what the recipe makes of it.
      leave_out: for `model`, paths of linears that the step leaves as they are.
      scratch_bytes: for `model`, (vocabulary size) -> what it keeps on disk of every calibration
        token, in bytes; None is nothing.
      objective: what the step lowers, as (LinearProblem, CompressedLinear) -> scalar; linear only.
      objective_name: the same in words.
    """

    name: str
    scope: Scope
    run: Callable
    arguments: Mapping[str, Any]
    needs: frozenset[str] = frozenset()
    notes: Callable | None = None
    preview: Callable | None = None
    trained: Callable | None = None
    leave_out: frozenset[str] = frozenset()
    scratch_bytes: Callable | None = None
    objective: Callable | None = None
    objective_name: str = ""

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.name}({inside})"


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
class BlockProblem:
    """What a block step sees: one block, and what enters it in both streams.

    Attributes:
      fns: the model's functions.
      block: the student's block as the steps before left it, linears as CompressedLinear.
      dense: the teacher's block, its kernels dense.
      teacher, student: what enters the block in each stream, [n, t, d], on disk or in memory; the
        training windows come first.
      train: how many of the windows are for training, the others for validation.
      key: random key.
      progress: (done, total, message) -> None.
      scratch: a file in which the step may keep one array as large as a stream; None where that
        may be held in memory.
    """

    fns: ModelFns
    block: Params
    dense: Params
    teacher: Any
    student: Any
    train: int
    key: jax.Array
    progress: Callable[[int, int, str], None] = lambda done, total, message: None
    scratch: Any = None


@dataclass(frozen=True)
class BlockSolution:
    """What a block step returns: the new block, its curve, and what is worth saying."""

    block: Params
    history: tuple[Evaluation, ...]
    best_update: int
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class ModelProblem:
    """What a model step sees: the student, the teacher's answers, the calibration text.

    Attributes:
      fns: the model's functions, which also fix the compute dtype.
      params: the student.
      teacher: pre-norm hidden states of the teacher for all windows, [n, t, d], on disk or in
        memory.
      train, val: int32 windows [n, t]; `teacher` holds train's rows first, then val's.
      key: random key.
      mesh: devices to run on, or None for one.
      session: keeps and restores training state; see `train.fit.Session`.
      scratch: a file in which the step may keep one array of what it needs of the teacher; None
        where that may be held in memory.
      outer: the teacher's embedding, norm and head, where an earlier step has given the student
        others; None where both have the same.
    """

    fns: ModelFns
    params: Params
    teacher: Any
    train: Any
    val: Any
    key: jax.Array
    mesh: Any = None
    session: Any = None
    scratch: Any = None
    outer: Params | None = None


@dataclass(frozen=True)
class ModelSolution:
    """What a model step returns: the new student, its curve, and what is worth saying."""

    params: Params
    history: tuple[Evaluation, ...]
    best_update: int
    notes: tuple[str, ...] = field(default=())


def run_linear(step: Step, problem: LinearProblem, leaf: CompressedLinear) -> tuple:
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
