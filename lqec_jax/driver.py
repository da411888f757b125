"""The streaming driver: a recipe applied to a model, one block's dense weights at a time.

Two streams of hidden states run side by side through the blocks: the teacher's, through dense
weights, and the student's, through what has been compressed so far. Statistics are the student's.
When the last block is done the teacher's stream is the cached target of the model steps, so the
dense teacher runs once and is never held whole.

Peak host memory: one dense block in float32, the packed student, one batch of windows; the streams
are files. A finished block is committed with both streams, see `io.run`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.calibration.collect import collect
from lqec_jax.core.progress import Reporter, Silent
from lqec_jax.core.tree import get_at, set_at, stack_blocks, unstack_blocks
from lqec_jax.core.types import (
    LinearProblem,
    LinearStats,
    ModelFns,
    ModelProblem,
    Params,
    Step,
)
from lqec_jax.evaluate.perplexity import Perplexity, perplexity, score_hidden
from lqec_jax.io.checkpoints import Checkpoints
from lqec_jax.io.run import Run
from lqec_jax.linear_steps import apply_steps, describe
from lqec_jax.models.config import ModelConfig
from lqec_jax.models.decoder import model_fns
from lqec_jax.recipe import Recipe
from lqec_kernels.formats import CompressedLinear, Dense

# Windows that walk through a block together, in tokens.
STREAM_TOKENS = 4096
# Activations of a training update above which blocks are recomputed in the backward pass, in bytes.
REMAT_BYTES = 2**30


@dataclass(frozen=True)
class Source:
    """Where dense weights come from, one block at a time.

    Attributes:
      config: the model.
      outer: embedding, norm and head.
      block: layer number -> one block's tree, kernels [d_in, d_out].
      fingerprint: sha256 of the checkpoint.
    """

    config: ModelConfig
    outer: Params
    block: Callable[[int], Params]
    fingerprint: str


@dataclass(frozen=True)
class Text:
    """The windows of a run, int32 [n, T] each.

    Stages are measured on `held_out`, or on the validation windows where it is empty.
    """

    train: np.ndarray
    val: np.ndarray
    held_out: np.ndarray
    protocol: str

    @property
    def windows(self) -> np.ndarray:
        return np.concatenate([self.train, self.val, self.held_out])

    @property
    def score(self) -> np.ndarray:
        """Returns the windows that stages are measured on: always the last of `windows`."""
        return self.held_out if len(self.held_out) else self.val


@dataclass
class Driver:
    """One run: a recipe on a source over a text."""

    source: Source
    recipe: Recipe
    text: Text
    run: Run
    seed: int = 0
    dtype: Any = jnp.float32
    mesh: Any = None
    reporter: Reporter = field(default_factory=Silent)

    def __post_init__(self) -> None:
        config = self.source.config
        self.fns = model_fns(config, self.dtype, remat=_needs_remat(config, self.text))
        self.outer = jax.tree.map(jnp.asarray, self.source.outer)
        self.key = jax.random.key(self.seed)
        # Without statistics the student is only ever read where it is scored.
        windows = self.text.windows
        self.walked = {
            "teacher": windows,
            "student": windows if self.recipe.needs else self.text.score,
        }

    @property
    def phases(self) -> tuple[tuple[Step, ...], ...]:
        """Returns the recipe's phases, a streamed one first: it makes the teacher's answers."""
        phases = self.recipe.phases
        return phases if phases[0][0].scope != "model" else ((), *phases)

    def compress(self) -> Params:
        """Runs what is left of the run and returns the student."""
        for number in range(self.run.state["phase"], len(self.phases)):
            steps = self.phases[number]
            if steps and steps[0].scope == "model":
                self._run_model_step(number, steps[0])
            else:
                self._stream(number, steps)
            self.run.commit(phase=number + 1, blocks=0)
        return self._student(len(self.phases) - 1)

    # ---- streamed phases

    def _stream(self, phase: int, steps: Sequence[Step]) -> None:
        started = time.perf_counter()
        layers, done = self.source.config.layers, self.run.state["blocks"]
        self.reporter.begin(_name(steps) or "teacher", layers, done)
        streams = ("teacher", "student") if phase == 0 else ("student",)
        if done == 0:
            self._open_streams(streams)
        for layer in range(done, layers):
            block, linears = self._compress_block(phase, layer, steps)
            for name in streams:
                self._advance(name, layer, block if name == "student" else self._dense_block(layer))
            self.run.save_block(phase, layer, block)
            seconds = self.run.state.get("phase_seconds", 0.0) + time.perf_counter() - started
            started = time.perf_counter()
            all_linears = {**self.run.state.get("linears", {}), **linears}
            self.run.commit(blocks=layer + 1, linears=all_linears, phase_seconds=seconds)
            self.reporter.advance(layer + 1)
        self._score_streams(phase, steps)

    def _compress_block(self, phase: int, layer: int, steps: Sequence[Step]):
        """Returns one compressed block and what is to be reported of its linears."""
        dense = self._dense_block(layer)
        block = _wrap(self.fns, dense) if phase == 0 else self.run.load_block(phase - 1, layer)
        needs = frozenset().union(*(step.needs for step in steps))
        report = {}
        for group in self.fns.linear_groups:
            # Collected again for every group: its inputs come through what was just compressed.
            stats = self._collect(layer, block, group[0], needs)
            for path in group:
                name = f"blocks/{layer}/{path}"
                number = layer * len(self.fns.linears) + self.fns.linears.index(path)
                key = jax.random.fold_in(self.key, number)
                w = get_at(dense, f"{path}/kernel").astype(jnp.float32)
                problem = LinearProblem(w, stats, key)
                leaf = get_at(block, f"{path}/kernel")
                leaf, entry = apply_steps(name, steps, problem, leaf)
                earlier = self.run.state.get("linears", {}).get(name, {}).get("steps", [])
                report[name] = {**entry, "steps": earlier + entry["steps"]}
                block = set_at(block, f"{path}/kernel", leaf)
        return block, report

    def _dense_block(self, layer: int) -> Params:
        return jax.tree.map(jnp.asarray, self.source.block(layer))

    def _collect(self, layer: int, block: Params, path: str, needs: frozenset[str]) -> LinearStats:
        if not needs:
            return LinearStats()
        read = _inputs(self.fns, path)
        h = self._slot("student", layer)[: len(self.text.train)]
        return collect((read(block, rows) for rows in self._batches(h)), needs)

    # ---- streams

    def _open_streams(self, names: Sequence[str]) -> None:
        embed = jax.jit(self.fns.embed)
        for name in names:
            out, windows = self._slot(name, 0), self.walked[name]
            for rows in self._rows(len(windows)):
                out[rows] = embed(self.outer, windows[rows])
            out.flush()

    def _advance(self, name: str, layer: int, block: Params) -> None:
        """Walks all windows through one block, from one slot of a stream into the other."""
        apply, out = _apply_block(self.fns), self._slot(name, layer + 1)
        h = self._slot(name, layer)
        for rows in self._rows(len(h)):
            out[rows] = apply(block, np.asarray(h[rows]))
        out.flush()

    def _slot(self, name: str, layer: int) -> np.memmap:
        """Returns a stream as it stands before block `layer`."""
        n, t = self.walked[name].shape
        shape = (n, t, self.source.config.d_model)
        return self.run.stream(name, layer % 2, shape, self.dtype)

    def _rows(self, count: int):
        size = max(1, STREAM_TOKENS // self.text.windows.shape[1])
        return [slice(first, min(first + size, count)) for first in range(0, count, size)]

    def _batches(self, h):
        return (np.asarray(h[rows]) for rows in self._rows(len(h)))

    def _score_streams(self, phase: int, steps: Sequence[Step]) -> None:
        seconds = self.run.state.get("phase_seconds", 0.0)
        layers = self.source.config.layers
        if phase == 0:
            self._add_stage(phase, "teacher", self._score(self._slot("teacher", layers)), 0.0)
        if steps:
            self._add_stage(
                phase, _name(steps), self._score(self._slot("student", layers)), seconds
            )
        self.run.commit(phase_seconds=0.0)

    def _score(self, pre_norm) -> Perplexity:
        windows = self.text.score
        last = pre_norm[len(pre_norm) - len(windows) :]
        return score_hidden(self.fns, self.outer, last, windows, self.text.protocol)

    def _add_stage(self, phase: int, name: str, score: Perplexity, seconds: float) -> None:
        self.reporter.say(f"{name}: perplexity {score.ppl:.4f} ({score.protocol})")
        self._replace("stages", {"phase": phase, "name": name, "seconds": seconds, **vars(score)})

    def _replace(self, what: str, entry: dict) -> None:
        """Records an entry; a phase that runs again after a kill replaces its own."""
        same = (entry["phase"], entry.get("name"))
        kept = [e for e in self.run.state.get(what, []) if (e["phase"], e.get("name")) != same]
        self.run.commit(**{what: [*kept, entry]})

    # ---- model steps

    def _run_model_step(self, phase: int, step: Step) -> None:
        session = _Session(self.run.training(phase), step, self.reporter, time.perf_counter())
        teacher = self._slot("teacher", self.source.config.layers)[
            : len(self.text.train) + len(self.text.val)
        ]
        problem = ModelProblem(
            fns=self.fns,
            params=self._student(phase - 1),
            teacher=teacher,
            train=self.text.train,
            val=self.text.val,
            key=jax.random.fold_in(self.key, 2**20 + phase),
            mesh=self.mesh,
            session=session,
        )
        solution = step.run(problem)
        session.close()
        self._keep(phase, solution.params)
        fit = {
            "phase": phase,
            "method": step.name,
            "best_update": solution.best_update,
            "history": [point._asdict() for point in solution.history],
            "notes": list(solution.notes),
        }
        for note in solution.notes:
            self.reporter.say(f"{step.name}: {note}")
        self._replace("fits", fit)
        score = perplexity(self.fns, self._student(phase), self.text.score, self.text.protocol)
        self._add_stage(phase, step.name, score, session.seconds())

    def _student(self, phase: int) -> Params:
        layers = self.source.config.layers
        blocks = [self.run.load_block(phase, layer) for layer in range(layers)]
        return {**self.outer, "blocks": stack_blocks(blocks)}

    def _keep(self, phase: int, params: Params) -> None:
        """Writes every block of a trained student, and measures its weights anew."""
        linears = dict(self.run.state.get("linears", {}))
        for layer, block in enumerate(unstack_blocks(jax.device_get(params["blocks"]))):
            self.run.save_block(phase, layer, block)
            dense = self._dense_block(layer)
            for path in self.fns.linears:
                leaf = get_at(block, f"{path}/kernel")
                w = get_at(dense, f"{path}/kernel").astype(jnp.float32)
                name = f"blocks/{layer}/{path}"
                linears[name] = {**linears[name], **describe(name, w, leaf)}
        self.run.commit(linears=linears)


class _Session:
    """A model step's checkpoints and progress; counts the seconds of earlier runs too."""

    def __init__(self, checkpoints: Checkpoints, step: Step, reporter: Reporter, started: float):
        self._checkpoints, self._step, self._reporter = checkpoints, step, reporter
        self._started, self._before, self._begun = started, 0.0, False

    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._started

    def restore(self, like: Any) -> tuple[Any, dict] | None:
        saved = self._checkpoints.restore(like)
        if saved is None:
            return None
        arrays, facts = saved
        self._before = facts.pop("seconds")
        return arrays, facts

    def save(self, update: int, arrays: Any, facts: dict) -> None:
        self._checkpoints.save(update, arrays, {**facts, "seconds": self.seconds()})

    def progress(self, done: int, total: int, message: str) -> None:
        if not self._begun:
            self._reporter.begin(self._step.name, total, done - 1)
            self._begun = True
        self._reporter.advance(done, message)

    def close(self) -> None:
        self._checkpoints.close()


@lru_cache(maxsize=8)
def _apply_block(fns: ModelFns) -> Callable:
    return jax.jit(lambda block, h: fns.block(block, h)[0])


@lru_cache(maxsize=64)
def _inputs(fns: ModelFns, path: str) -> Callable:
    """Returns a compiled (block, h) -> what one linear reads, computing no more of the block."""
    return jax.jit(lambda block, h: fns.block(block, h)[1][path])


def _wrap(fns: ModelFns, dense: Params) -> Params:
    """Makes every linear of a dense block a CompressedLinear with nothing compressed yet."""
    for path in fns.linears:
        dense = set_at(
            dense, f"{path}/kernel", CompressedLinear(Dense(get_at(dense, f"{path}/kernel")))
        )
    return dense


def _name(steps: Sequence[Step]) -> str:
    return " | ".join(step.name for step in steps)


def _needs_remat(config: ModelConfig, text: Text, batch: int = 8) -> bool:
    """Says whether a training update of `batch` windows would hold too many activations."""
    widths = 8 * config.d_model + 4 * config.heads * config.head_dim + 4 * config.d_ff
    return 4 * batch * text.windows.shape[1] * config.layers * widths > REMAT_BYTES
