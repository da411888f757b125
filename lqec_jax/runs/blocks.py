"""A phase's chain of linear and block steps on one block.

Consecutive linear steps run together, one group of linears after the other, each with statistics
collected through what was compressed before it; a block step runs once on the whole block.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lqec_jax.calibration.collect import collect
from lqec_jax.core import sites
from lqec_jax.core.types import (
    BlockProblem,
    LinearProblem,
    LinearStats,
    ModelFns,
    Params,
    Solution,
    Step,
    Work,
)
from lqec_jax.errors import InputError, NotFinite
from lqec_jax.runs.linears import TOO_LARGE, apply_steps, describe
from lqec_jax.runs.streams import Streams
from lqec_jax.train.fit import NoSession
from lqec_kernels.formats import CompressedLinear, Dense


class Chained(NamedTuple):
    """What a chain made of one block.

    Attributes:
      linears: a weight's name -> its report; `steps` are those of this chain alone.
      fits: what block steps report of their training, in order.
    """

    block: Params
    linears: dict[str, dict]
    fits: list[dict]


@dataclass(frozen=True)
class BlockChain:
    """Runs steps on blocks of one streamed phase.

    Attributes:
      train, val: how many windows there are; the streams hold train's rows first, then val's.
      key: the run's; a weight's and a block's own are folded from it.
      fisher: layer -> path -> the weight's `LinearStats.fisher`; read where a step asks for it.
      progress: (done, total, message) -> None, of a block step.
    """

    streams: Streams
    phase: int
    train: int
    val: int
    key: jax.Array
    fisher: Callable[[int], Mapping[str, Any]]
    progress: Callable[[int, int, str], None]

    @property
    def tokens(self) -> int:
        """Returns of how many tokens statistics are."""
        return self.train * self.streams.walked["student"].shape[1]

    def run(self, layer: int, dense: Params, block: Params, steps: Sequence[Step]) -> Chained:
        """Runs the steps on one block, given dense and as the phase before left it.

        Raises:
          InputError: a step refuses a weight; the weight is named.
          NotFinite: a step made something that is not finite.
        """
        # A weight that no step changes is reported too.
        linears = {} if steps else _without_steps(self._describe(layer, dense, block))
        fits = []
        for scope, several in groupby(steps, key=lambda step: step.scope):
            if scope == "linear":
                block, reports = self._run_linear_steps(layer, dense, block, tuple(several))
                linears = _add_reports(linears, reports)
                continue
            for step in several:
                block, fit = self._run_block_step(layer, dense, block, step)
                fits.append(fit)
                reports = _without_steps(self._describe(layer, dense, block))
                linears = _add_reports(linears, reports)
        return Chained(block, linears, fits)

    def _run_linear_steps(self, layer: int, dense: Params, block: Params, steps: tuple[Step, ...]):
        needs = frozenset().union(*(step.needs for step in steps))
        fisher = self.fisher(layer) if "fisher" in needs else {}
        reports = {}
        for group in self.streams.fns.linear_groups:
            # Collected again for every group: its inputs come through what was just compressed.
            stats = self._collect(layer, block, group[0], needs - {"fisher"})
            for path in group:
                name = f"blocks/{layer}/{path}"
                number = layer * len(self.streams.fns.linears) + self.streams.fns.linears.index(
                    path
                )
                key = jax.random.fold_in(self.key, number)
                own = replace(stats, fisher=fisher[path]) if fisher else stats
                problem = LinearProblem(_weight(dense, path), own, key)
                leaf = sites.get(block, path)
                leaf, reports[name] = apply_steps(name, steps, problem, leaf, self.tokens)
                block = sites.put(block, path, leaf)
        return block, reports

    def _collect(self, layer: int, block: Params, path: str, needs: frozenset[str]) -> LinearStats:
        if not needs:
            return LinearStats()
        spill = self.streams.run.folder / "gram.bin"
        return collect(self.streams.inputs(layer, block, path, self.train), needs, spill)

    def _run_block_step(self, layer: int, dense: Params, block: Params, step: Step):
        count = self.train + self.val
        teacher, student = (self.streams.slot(name, layer) for name in ("teacher", "student"))
        problem = BlockProblem(
            fns=self.streams.fns,
            block=block,
            dense=dense,
            teacher=teacher[:count],
            student=student[:count],
            train=self.train,
            work=Work(
                key=jax.random.fold_in(jax.random.fold_in(self.key, 2**21 + self.phase), layer),
                session=BlockSession(self.progress),
                scratch=self.streams.run.folder / "scratch.bin",
            ),
        )
        try:
            solution = step.run(problem)
        except InputError as error:
            raise InputError(f"{error} (at blocks/{layer})") from error
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in _floats(solution.params)):
            raise NotFinite(f"{step.name} made blocks/{layer} non-finite ({step}); {TOO_LARGE}")
        return solution.params, {
            "phase": self.phase,
            "layer": layer,
            **describe_fit(step, solution),
        }

    def _describe(self, layer: int, dense: Params, block: Params) -> dict[str, dict]:
        names = {path: f"blocks/{layer}/{path}" for path in self.streams.fns.linears}
        return {
            name: describe(name, _weight(dense, path), sites.get(block, path))
            for path, name in names.items()
        }


class BlockSession(NoSession):
    """Hands on how far a block's training is; a block that was interrupted begins anew."""

    def __init__(self, tell: Callable[[int, int, str], None]):
        self._tell = tell

    def progress(self, done: int, total: int, message: str) -> None:
        self._tell(done, total, message or "update")


def _without_steps(reports: dict[str, dict]) -> dict[str, dict]:
    return {name: {**report, "steps": []} for name, report in reports.items()}


def _add_reports(before: dict[str, dict], after: dict[str, dict]) -> dict[str, dict]:
    """Returns what is said after more steps, with the entries of all steps so far."""
    earlier = {name: report["steps"] for name, report in before.items()}
    return {n: {**r, "steps": earlier.get(n, []) + r["steps"]} for n, r in after.items()}


def describe_fit(step: Step, solution: Solution) -> dict[str, Any]:
    """Returns what is reported of a training, a block's or the whole model's."""
    return {
        "method": step.name,
        "best_update": solution.best_update,
        "history": [point._asdict() for point in solution.history],
        "notes": list(solution.notes),
    }


def wrap_linears(fns: ModelFns, dense: Params) -> Params:
    """Makes every linear of a dense block a CompressedLinear with nothing compressed yet."""
    return sites.map_block(dense, fns.sites, lambda w: CompressedLinear(Dense(w)))


def _weight(dense: Params, path: str) -> jax.Array:
    return sites.get(dense, path).astype(jnp.float32)


def _floats(block: Params) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(block) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
