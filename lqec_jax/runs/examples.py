"""Fine-tuning of an artifact on examples: what is checked, the training, and what is reported.

The base stays packed. What is trained, and how, is the step `trainings.finetune`; this file
gives it rows of examples in place of calibration windows.
"""

import inspect
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lqec_jax.calibration.examples import Examples, read_examples, weigh
from lqec_jax.core import sites
from lqec_jax.core.arguments import check_all, check_int, check_number, check_tokens
from lqec_jax.core.hashing import hash_arrays
from lqec_jax.core.progress import Reporter
from lqec_jax.core.tree import equal_trees, is_compressed, unstack_blocks
from lqec_jax.core.types import ModelProblem, Params, Step, Windows, Work
from lqec_jax.errors import InputError, did_you_mean
from lqec_jax.evaluate.report import (
    check_report,
    describe_environment,
    make_finite,
    peak_rss_mb,
)
from lqec_jax.io.artifact.artifact import REPORT, name_arrays
from lqec_jax.io.carried import find_carried
from lqec_jax.models.model import Model
from lqec_jax.runs.checkpoints import StepSession
from lqec_jax.runs.folder import Run
from lqec_jax.runs.making import FINETUNE, count_threads
from lqec_jax.trainings.finetune import finetune
from lqec_kernels.formats import CompressedLinear

SETTINGS = frozenset(inspect.signature(finetune).parameters)
SEQLEN = 512
EPOCHS = 3
LOOKS = 20  # at the validation rows, of a training whose updates come from epochs


@dataclass(frozen=True)
class Rows:
    """Where examples come from, and how they are cut.

    Attributes:
      data, val: .jsonl files, see `calibration.examples`; without `val`, the last `val_ratio` of
        data's rows are for validation.
      seqlen: longest row in tokens; None is `SEQLEN`, or the model's longest context where that is
        less.
    """

    data: str | Path
    val: str | Path | None = None
    val_ratio: float = 0.1
    seqlen: int | None = None


@dataclass(frozen=True)
class TuningJob:
    """A fine-tuning that is checked and not begun.

    Attributes:
      tokens, weights: as in `core.types.Windows`, training rows first.
      facts: what the report says of the data.
    """

    model: Model
    step: Step
    tokens: np.ndarray
    weights: np.ndarray
    train: int
    seed: int
    facts: Mapping[str, Any]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Returns everything that decides the result, but the devices."""
        return {
            "finetune": str(self.step),
            "seed": self.seed,
            "model": hash_arrays(sorted(name_arrays(self.model.params)[0].items())),
            "examples": hash_arrays([("tokens", self.tokens), ("weights", self.weights)]),
            "dtype": np.dtype(self.model.dtype).name,
        }

    @property
    def data_in_words(self) -> str:
        facts = self.facts
        words = f"{facts['train_rows']} rows to train on, {facts['val_rows']} to look at, "
        words += f"{facts['learned_tokens']} tokens to learn"
        if facts["cut_rows"]:
            words += f"; {facts['cut_rows']} rows were longer than {facts['seqlen']} and lost "
            words += "their end"
        if facts["dropped_rows"]:
            words += f"; {facts['dropped_rows']} rows had nothing to learn and are left out"
        if facts["own_ends_rows"]:
            words += (
                f"; {facts['own_ends_rows']} rows bring their own BOS or EOS, none gets a second"
            )
        return words


def prepare_tuning(
    model: Model, rows: Rows, *, epochs: float | None, seed: int, settings: Mapping[str, Any]
) -> TuningJob:
    """Checks everything that fine-tuning is given.

    Args:
      epochs: passes over the rows, in place of `settings['updates']`.
      settings: arguments of `trainings.finetune.finetune`, those that are given.
    Raises:
      InputError: the first thing that cannot be.
    """
    if not model.recipe:
        raise InputError(
            "finetune: the model is not compressed; compress it first, with adapters or without, "
            "and name the artifact"
        )
    if model.tokenizer is None:
        raise InputError("finetune: the model has no tokenizer; put its files beside the weights")
    check_report(model.report, f"{model.folder or 'the model'}, {REPORT}")
    find_carried(model.tokenizer, model.folder)  # refuses a link, before any training
    for name in settings:
        if name not in SETTINGS:
            near = did_you_mean(name, SETTINGS)
            raise InputError(f"finetune: there is no setting {name!r}{near}")
    check_int("finetune", "seed", seed, 0, 2**32 - 1)
    longest = model.config.max_length
    if rows.seqlen is None:
        rows = replace(rows, seqlen=min(SEQLEN, longest))
    check_int("finetune", "seqlen", rows.seqlen, 2, longest)
    examples, held = _read(model, rows)
    steps = _count_updates(len(examples.tokens), epochs, settings)
    step = finetune(**settings | steps)
    for segment in model.params["blocks"]:
        leaves = sites.get_all(segment, model.fns.sites)
        sizes = {path: (leaf.d_in, leaf.d_out) for path, leaf in leaves.items()}

        def preview(path: str, leaves: dict = leaves) -> Any:
            return jax.eval_shape(step.preview, leaves[path])

        check_all(preview, sizes, "every block's ")
    width = max(examples.tokens.shape[1], held.tokens.shape[1])
    tokens, learned = (
        np.concatenate([_widen(part, width - short) for part in parts])
        for short, parts in (
            (0, (examples.tokens, held.tokens)),
            (1, (weigh(examples.learned), weigh(held.learned))),
        )
    )
    check_tokens(tokens, model.config.vocab_size)
    facts = {
        "data": Path(rows.data).name,
        "train_rows": len(examples.tokens),
        "val_rows": len(held.tokens),
        "learned_tokens": int(examples.learned.sum()),
        "cut_rows": examples.cut,
        "dropped_rows": examples.dropped,
        "own_ends_rows": examples.own_ends + (held.own_ends if rows.val is not None else 0),
        "seqlen": rows.seqlen,
    }
    return TuningJob(model, step, tokens, learned, len(examples.tokens), seed, facts)


def run_tuning(job: TuningJob, run: Run, mesh: Any, reporter: Reporter) -> Model:
    """Trains what is left of a run and returns the model with its report."""
    reporter.say(job.data_in_words)
    session = StepSession(run.training(0), job.step, reporter, time.perf_counter())
    model = job.model
    solution = job.step.run(
        ModelProblem(
            fns=model.fns,
            params=model.params,
            windows=Windows(job.tokens, job.train, job.weights),
            work=Work(jax.random.key(job.seed), mesh, session),
        )
    )
    session.close()
    for note in solution.notes:
        reporter.say(f"finetune: {note}")
    fit = {
        "method": "finetune",
        "best_update": solution.best_update,
        "history": [point._asdict() for point in solution.history],
        "notes": [job.data_in_words, *solution.notes],
        # The recipe's text cannot say it: there a finetune trains on the calibration text.
        "data": {"file": job.facts["data"], "examples": job.fingerprint["examples"]},
    }
    recipe = f"{model.recipe} | {job.step}"
    report = _report(job, solution.params, fit, session.seconds()) | {"recipe": recipe}
    made = {"verb": FINETUNE, **job.fingerprint, "threads": count_threads()}
    return replace(model, params=solution.params, recipe=recipe, report=report, made=made)


def _read(model: Model, rows: Rows) -> tuple[Examples, Examples]:
    """Returns the rows to train on and those to look at."""
    examples = read_examples(rows.data, model.tokenizer, rows.seqlen)
    if rows.val is not None:
        return examples, read_examples(rows.val, model.tokenizer, rows.seqlen)
    # All or none is refused: the best seen on rows that it is not trained on is what is kept.
    ratio = check_number("finetune", "val_ratio", rows.val_ratio, 0.0, 1.0)
    if not 0 < ratio < 1:
        raise InputError(
            f"finetune: val_ratio={ratio!r}; a fraction between 0 and 1 was wanted, such as 0.1, "
            "or another file (--val)"
        )
    count = len(examples.tokens)
    held = min(max(1, round(rows.val_ratio * count)), count - 1)
    if held < 1:
        raise InputError(
            f"finetune: {rows.data} has one row with something to learn; two or more were wanted, "
            "one of them to look at, or another file for that (--val)"
        )
    first, last = slice(0, count - held), slice(count - held, count)
    return tuple(
        examples._replace(tokens=examples.tokens[part], learned=examples.learned[part])
        for part in (first, last)
    )


def _count_updates(rows: int, epochs: float | None, settings: Mapping[str, Any]) -> dict[str, int]:
    """Returns updates, and looks where they are not given, for so many passes over the rows."""
    if epochs is not None and settings.get("updates") is not None:
        raise InputError("finetune: epochs and updates both say how long; give one of them")
    if settings.get("updates") is not None or (epochs is None and settings.get("preset") == "slim"):
        return {}
    epochs = EPOCHS if epochs is None else epochs
    if check_number("finetune", "epochs", epochs, 0.0) == 0:
        raise InputError(
            "finetune: epochs=0 trains nothing; a number above 0 was wanted, a fraction of one too"
        )
    batch = settings.get("batch") or finetune(**settings).arguments["batch"]
    check_int("finetune", "batch", batch, 1)
    updates = max(1, math.ceil(epochs * rows / batch))
    looks = {"eval_every": max(1, updates // LOOKS)}
    return {"updates": updates} | (looks if settings.get("eval_every") is None else {})


def _widen(array: np.ndarray, width: int) -> np.ndarray:
    return np.pad(array, [(0, 0), (0, width - array.shape[1])])


def _report(job: TuningJob, params: Params, fit: dict, seconds: float) -> dict[str, Any]:
    """Returns the artifact's report, gone on: sizes as they are now, and one training more.

    A weight that was trained has no `relative_error` any more, the dense one is not here to compare
    with; what was measured last is its `relative_error_before`.
    """
    before, now = job.model.report, _name_weights(job.model, params)
    had = _name_weights(job.model, job.model.params)
    weights = {name: leaf.d_in * leaf.d_out for name, leaf in now.items()}
    linears = []
    for linear in before.get("linears", []):
        leaf = now.get(linear["path"])
        if leaf is None:
            continue
        same = not fit["best_update"] or equal_trees(leaf, had[linear["path"]])
        measured = {} if same else _forget_error(linear)
        linears.append({**linear, **measured, "bits_per_weight": leaf.bits_per_weight})
    bits = sum(leaf.stored_bits() for leaf in now.values()) / sum(weights.values())
    environment = describe_environment() | {"compute_dtype": np.dtype(job.model.dtype).name}
    changes = {
        "bits_per_weight": bits,
        "linears": linears,
        "fits": [*before.get("fits", []), fit],
        "finetune": dict(job.facts) | {"seed": job.seed},
        "peak_rss_mb": peak_rss_mb(),
        "seconds": before.get("seconds", 0.0) + seconds,
        "environment": environment,
    }
    return make_finite({**before, **changes})


def _name_weights(model: Model, params: Params) -> dict[str, CompressedLinear]:
    """Returns the compressed weights by the name that a report has for them."""
    named = {}
    for layer, block in enumerate(unstack_blocks(params["blocks"])):
        for path in model.fns.linears:
            leaf = sites.get(block, path)
            if is_compressed(leaf):
                named[f"blocks/{layer}/{path}"] = leaf
    return named


def _forget_error(linear: Mapping[str, Any]) -> dict[str, Any]:
    last = linear.get("relative_error")
    if last is None:
        last = linear.get("relative_error_before")
    return {"relative_error": None, "relative_error_before": last}
