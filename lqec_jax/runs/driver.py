"""The streaming driver: a recipe applied to a model, one block's dense weights at a time.

Two streams of hidden states run side by side through the blocks: the teacher's, through dense
weights, and the student's, through what has been compressed so far. Statistics are the student's.
When the last block is done the teacher's stream is the cached target of the model steps, so the
dense teacher runs once and is never held whole.

Peak host memory: one dense block in float32, the packed student, one batch of windows; the streams
are files. A finished block is committed with both streams, see `runs.folder`; the last model step's
result is not, it becomes the artifact.

A dense block is read once for its compression, the teacher's walk and its report; once more for
every later phase that compares with it, unless the model is small, see `io.sources.source`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.calibration.fisher import diagonal_fisher
from lqec_jax.core import sites
from lqec_jax.core.progress import Reporter, Silent
from lqec_jax.core.types import ModelProblem, Params, Step, Windows, Work
from lqec_jax.evaluate.perplexity import Perplexity, perplexity, score_hidden
from lqec_jax.io.sources.source import Source, keep_blocks
from lqec_jax.models.decoder import model_fns, needs_remat
from lqec_jax.recipe import Recipe
from lqec_jax.runs.blocks import BlockChain, Chained, describe_fit, wrap_linears
from lqec_jax.runs.checkpoints import StepSession
from lqec_jax.runs.folder import FISHER, Run
from lqec_jax.runs.linears import describe
from lqec_jax.runs.record import refuse
from lqec_jax.runs.state import STATE
from lqec_jax.runs.streams import Streams
from lqec_jax.runs.student import Student
from lqec_jax.runs.text import Text


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
        if self.recipe.reads_dense_again:
            self.source = keep_blocks(self.source)
        remat = needs_remat(config, self.text.seqlen, self.recipe.largest_batch)
        self.fns = model_fns(config, self.dtype, remat=remat)
        self.outer = jax.tree.map(jnp.asarray, self.source.outer)
        self.key = jax.random.key(self.seed)
        # Without statistics the student is only ever read where it is scored.
        windows = self.text.windows
        walked = {
            "teacher": windows,
            "student": windows if self.recipe.reads_student else self.text.score,
        }
        self.streams = Streams(self.run, self.fns, walked, config.d_model, self.dtype)
        self.student = Student(self.run, self.outer, config.layers)

    @property
    def phases(self) -> tuple[tuple[Step, ...], ...]:
        """Returns the recipe's phases, a streamed one first: it makes the teacher's answers."""
        phases = self.recipe.phases
        return phases if phases[0][0].scope != "model" else ((), *phases)

    def compress(self) -> Params:
        """Runs what is left of the run and returns the student.

        The last phase is finished when the artifact is whole; until then a resumed run repeats what
        followed its last block, or its last checkpoint.
        """
        last = len(self.phases) - 1
        self._check_progress()
        for number in range(self.run.state["phase"], len(self.phases)):
            steps = self.phases[number]
            if steps and steps[0].scope == "model":
                self._run_model_step(number, steps[0], write=number < last)
            else:
                self._stream(number, steps)
            if number < last:
                self.run.commit(phase=number + 1, blocks=0, phase_seconds=0.0)
        return self.student.whole(last)

    def _check_progress(self) -> None:
        """Refuses a run that says to be further than its recipe goes; reserves a new one's disk."""
        phase, blocks = self.run.state["phase"], self.run.state["blocks"]
        # One more than there are: an earlier version kept the last phase as it keeps the others.
        if phase > len(self.phases) or blocks > self.source.config.layers:
            raise refuse(
                self.run.folder,
                f"{STATE} says phase {phase} and {blocks} blocks; there are {len(self.phases)} "
                f"phases of {self.source.config.layers} blocks",
            )
        if not (phase or blocks):
            self.streams.reserve()

    # ---- streamed phases

    def _stream(self, phase: int, steps: Sequence[Step]) -> None:
        started = time.perf_counter()
        layers, done = self.source.config.layers, self.run.state["blocks"]
        if any("fisher" in step.needs for step in steps):
            self._find_fisher()
        self.reporter.begin(_name(steps) or "teacher", layers, done)
        # A later phase walks the teacher again only for steps that compare with it.
        compared = phase == 0 or any(step.scope == "block" for step in steps)
        names = ("teacher", "student") if compared else ("student",)
        if done == 0:
            self._forget(names)
            for name in names:
                own = self.outer if name == "teacher" else self.student.outer(phase - 1)
                self.streams.open(own, (name,))
        for layer in range(done, layers):
            dense = self._dense_block(layer)
            chained = self._compress_block(phase, layer, dense, steps)
            for name in names:
                self.streams.advance(name, layer, chained.block if name == "student" else dense)
            self.student.put_block(phase, layer, chained.block)
            seconds = self.run.state.get("phase_seconds", 0.0) + time.perf_counter() - started
            started = time.perf_counter()
            streams = self.run.state.get("streams", {}) | self.streams.written
            kept = {"streams": streams} if self.run.resumable else {}
            self.run.commit(
                blocks=layer + 1, phase_seconds=seconds, **kept, **self._reported(chained)
            )
            self.reporter.advance(layer + 1)
        self._score_streams(phase, steps)

    def _forget(self, names: Sequence[str]) -> None:
        """Takes streams off the record that are about to be filled anew."""
        known = self.run.state.get("streams", {})
        if not known.keys().isdisjoint(names):
            self.run.commit(streams={n: record for n, record in known.items() if n not in names})

    def _compress_block(
        self, phase: int, layer: int, dense: Params, steps: Sequence[Step]
    ) -> Chained:
        block = self.student.block(phase - 1, layer) if phase else wrap_linears(self.fns, dense)
        chain = BlockChain(
            streams=self.streams,
            fisher=self._load_fisher,
            phase=phase,
            train=len(self.text.train),
            val=len(self.text.val),
            key=self.key,
            progress=partial(self._show_block, layer),
        )
        return chain.run(layer, dense, block, steps)

    def _show_block(self, layer: int, done: int, total: int, message: str) -> None:
        self.reporter.advance(layer, f"blocks/{layer}: {message} {done}/{total}")

    def _reported(self, chained: Chained) -> dict[str, Any]:
        """Returns what the run keeps of a block, beside what earlier phases said of it."""
        linears = dict(self.run.state.get("linears", {}))
        for name, report in chained.linears.items():
            earlier = linears.get(name, {}).get("steps", [])
            linears[name] = {**report, "steps": earlier + report["steps"]}
        fits = [*self.run.state.get("fits", []), *chained.fits]
        return {"linears": linears, "fits": fits}

    def _dense_block(self, layer: int) -> Params:
        return jax.tree.map(jnp.asarray, self.source.block(layer))

    # ---- the teacher's gradients

    def _find_fisher(self) -> None:
        """Writes every block's diagonal Fisher beside the run's blocks, once a run."""
        if self.run.state.get("fisher"):
            return
        folder, layers = self.run.folder / FISHER, self.source.config.layers
        folder.mkdir(exist_ok=True)
        self.reporter.begin("fisher", layers)
        sweep = diagonal_fisher(
            self.fns, self.outer, self._dense_block, layers, self.text.train, folder
        )
        for done, (layer, squares) in enumerate(sweep, start=1):
            self.run.save_arrays(f"{FISHER}/block-{layer}.safetensors", squares)
            self.reporter.advance(done)
        self.run.commit(fisher=True)

    def _load_fisher(self, layer: int) -> dict[str, jax.Array]:
        arrays = self.run.load_arrays(f"{FISHER}/block-{layer}.safetensors")
        return {name: jnp.asarray(array) for name, array in arrays.items()}

    def _score_streams(self, phase: int, steps: Sequence[Step]) -> None:
        seconds = self.run.state.get("phase_seconds", 0.0)
        layers = self.source.config.layers
        if phase == 0:
            teacher = self._score(self.outer, self.streams.slot("teacher", layers))
            self._add_stage(phase, "teacher", teacher, 0.0)
        if steps:
            outer = self.student.outer(phase - 1)
            student = self._score(outer, self.streams.slot("student", layers))
            self._add_stage(phase, _name(steps), student, seconds)

    def _score(self, outer: Params, pre_norm) -> Perplexity:
        windows = self.text.score
        last = pre_norm[len(pre_norm) - len(windows) :]
        return score_hidden(self.fns, outer, last, windows, self.text.protocol)

    def _add_stage(self, phase: int, name: str, score: Perplexity, seconds: float) -> None:
        self.reporter.say(f"{name}: perplexity {score.ppl:.4f} ({score.protocol})")
        self._replace("stages", {"phase": phase, "name": name, "seconds": seconds, **vars(score)})

    def _replace(self, what: str, entry: dict) -> None:
        """Records an entry; a phase that runs again after a kill replaces its own."""
        same = (entry["phase"], entry.get("name"))
        kept = [e for e in self.run.state.get(what, []) if (e["phase"], e.get("name")) != same]
        self.run.commit(**{what: [*kept, entry]})

    # ---- model steps

    def _run_model_step(self, phase: int, step: Step, *, write: bool) -> None:
        session = StepSession(self.run.training(phase), step, self.reporter, time.perf_counter())
        teacher = self.streams.slot("teacher", self.source.config.layers)[
            : len(self.text.train) + len(self.text.val)
        ]
        problem = ModelProblem(
            fns=self.fns,
            params=self.student.whole(phase - 1),
            windows=Windows(np.concatenate([self.text.train, self.text.val]), len(self.text.train)),
            work=Work(
                key=jax.random.fold_in(self.key, 2**20 + phase),
                mesh=self.mesh,
                session=session,
                scratch=self.run.folder / "scratch.bin",
            ),
            teacher=teacher,
            outer=None if self.student.trained_outer(phase - 1) is None else self.outer,
        )
        solution = step.run(problem)
        session.close()
        self._keep(phase, solution.params, write=write)
        fit = {"phase": phase, **describe_fit(step, solution)}
        for note in solution.notes:
            self.reporter.say(f"{step.name}: {note}")
        self._replace("fits", fit)
        student = self.student.whole(phase)
        score = perplexity(self.fns, student, self.text.score, self.text.protocol)
        self._add_stage(phase, step.name, score, session.seconds())

    def _keep(self, phase: int, params: Params, *, write: bool) -> None:
        """Keeps a trained student, and measures its weights anew."""
        linears = dict(self.run.state.get("linears", {}))
        for layer, block in enumerate(self.student.put(phase, params, write=write)):
            dense = self._dense_block(layer)
            for path in self.fns.linears:
                leaf = sites.get(block, path)
                w = sites.get(dense, path).astype(jnp.float32)
                name = f"blocks/{layer}/{path}"
                linears[name] = {**linears[name], **describe(name, w, leaf)}
        self.run.commit(linears=linears)


def _name(steps: Sequence[Step]) -> str:
    return " | ".join(step.name for step in steps)
