"""Recipes side by side: one model, one text, one table, in one run that can be resumed.

    DIR/results.json    settings, and a row a recipe as soon as it is measured
    DIR/results.csv     the same rows
    DIR/report.html     the same as a page, with perplexity over bits per weight
    DIR/rows/NAME       the artifact of a row; NAME.partial while it is made

A row is `api.compress` into its folder, then perplexity on a text that no recipe has seen and the
distance to the teacher. Killed, a comparison loses what its unfinished row has not committed.
(Named apart from its verb, `lqec_jax.compare`, which importing a module `compare` would hide.)
"""

import ast
import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lqec_jax import api
from lqec_jax.calibration.data import load_tokens
from lqec_jax.core.arguments import check_int
from lqec_jax.core.hashing import hash_parts
from lqec_jax.core.progress import Reporter, Silent
from lqec_jax.core.sites import each
from lqec_jax.errors import InputError
from lqec_jax.evaluate.card import describe_base, say_failure
from lqec_jax.evaluate.page import TEACHER, render_comparison
from lqec_jax.evaluate.report import describe_environment, make_finite, reset_peak_rss
from lqec_jax.io.artifact.artifact import is_artifact
from lqec_jax.io.files import read_json, write_json, write_text
from lqec_jax.io.lock import one_writer
from lqec_jax.models.decoder import model_fns
from lqec_jax.models.model import Model
from lqec_jax.recipe import Recipe, parse_recipe
from lqec_jax.runs.folder import STATE, partial_folder
from lqec_jax.runs.job import Job, prepare
from lqec_jax.runs.linears import preview
from lqec_jax.runs.text import make_windows, name_protocol

RESULTS, TABLE, PAGE, ROWS = "results.json", "results.csv", "report.html", "rows"
COLUMNS = ("recipe", "seed", "bits_per_weight", "ppl", "low", "high", "nll", "kl", "top1", "tokens",
           "protocol", "seconds", "peak_rss_mb", "artifact", "resolved", "error")  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """What makes a row: a recipe as it was written, the same with its defaults, a seed."""

    text: str
    recipe: Recipe
    seed: int

    @property
    def name(self) -> str:
        """Returns a name for its folder, which depends on nothing but the recipe and the seed."""
        digest = hash_parts([f"{self.recipe} seed {self.seed}"])
        return "-".join([*(step.name for step in self.recipe.steps), digest[:8]])


@one_writer
def compare(
    model: str | Path,
    recipes: Sequence[str | Recipe],
    *,
    calib: Any,
    text: Any,
    out: str | Path,
    bits: Sequence[int] = (),
    ranks: Sequence[int | float] = (),
    seeds: Sequence[int] = (0,),
    seqlen: int = 512,
    windows: int = 320,
    val_ratio: float = 0.2,
    text_windows: int | None = None,
    protocol: str = "documents",
    dtype: str = "auto",
    resume: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Makes a model by every recipe and measures them alike.

    Args:
      model: a folder or hub id.
      recipes: see `recipe`.
      calib, seqlen, windows, val_ratio, dtype: as `api.compress`.
      text: what every row is scored on, a path or token ids; its first `text_windows` windows of
        `seqlen`, made by `protocol`.
      out: the folder to write; one that holds a comparison is never begun again.
      bits, ranks: a row for each of them, in place of every `bits=` or `rank=` that a recipe
        writes; a recipe that writes none has one row.
      seeds: a row for each of them.
      resume: go on with the comparison in `out`, whose rows are kept; recipes may be added.
    Returns:
      What results.json holds: `model, protocol, settings, environment, rows`, the teacher's row
      first. `peak_rss_mb` is the most this process held on the host while it made the row, with
      what it holds anyhow; None where the kernel can only measure whole processes. Compiled
      programs are dropped before every row, so that a row does not pay for those before it.
    Raises:
      InputError: before any work: a recipe that a weight refuses, `out` is taken, the comparison
        there is of another model or text.
    """
    if not isinstance(model, str | Path):
        raise InputError("compare: a model's folder or hub id was wanted; every row reads it anew")
    entries = list_entries(recipes, bits, ranks, seeds)
    folder = Path(out)
    saved = _open(folder, resume=resume)
    make = {"seqlen": seqlen, "windows": windows, "val_ratio": val_ratio, "dtype": dtype}
    job = prepare(model, entries[0].recipe, calib, seed=entries[0].seed, **make)
    notes = list(job.text.notes)
    held_out = read_held_out(job, text, seqlen, text_windows, protocol, notes.append)
    _check_entries(job, entries)
    reporter = reporter or Silent()
    board = _Board.begin(
        folder, saved, job, held_out, f"{name_protocol(text, protocol)}/{seqlen}", reporter
    )
    scorer = Scorer(model, held_out, name_protocol(text, protocol), dtype)
    for line in notes:
        reporter.say(line)
    if not board.has(TEACHER, None):
        board.add(_measure_teacher(scorer, reporter))
    for number, entry in enumerate(entries, start=1):
        if board.has(str(entry.recipe), entry.seed):
            continue
        reporter.say(f"{number} of {len(entries)}: {entry.text}, seed {entry.seed}")
        make_row = partial(api.compress, model, entry.recipe, calib, seed=entry.seed, **make)
        board.add(_measure(entry, folder, make_row, scorer, reporter))
    return board.results


# ---- what there is to do


def list_entries(
    recipes: Sequence[str | Recipe],
    bits: Sequence[int] = (),
    ranks: Sequence[int | float] = (),
    seeds: Sequence[int] = (0,),
) -> list[Entry]:
    """Returns the rows to be made, in order, none twice.

    Raises:
      InputError: no recipe; one that cannot be read; a grid over an argument that no recipe writes,
        or that one writes twice with different values.
    Example:
      >>> [entry.text for entry in list_entries(["rtn(bits=2)"], bits=[3, 4])]
      ['rtn(bits=3)', 'rtn(bits=4)']
    """
    if isinstance(recipes, str) or not recipes:
        raise InputError("compare: a list of recipes was wanted, of at least one")
    if not seeds:
        raise InputError("compare: no seed; give at least one")
    for seed in seeds:
        check_int("compare", "seed", seed, 0, 2**32 - 1)
    texts = [str(recipe) for recipe in recipes]
    for text in texts:
        parse_recipe(text)
    texts = [ast.unparse(ast.parse(text.strip(), mode="eval")) for text in texts]
    for argument, values in (("bits", bits), ("rank", ranks)):
        if values and not any(_find_arguments(_parse(text), argument) for text in texts):
            raise InputError(
                f"compare: no recipe writes {argument}=; write it in one for a grid to take its "
                "place"
            )
        texts = [new for text in texts for new in _substitute(text, argument, values)]
    entries = [Entry(text, parse_recipe(text), seed) for text in texts for seed in seeds]
    return list({(str(entry.recipe), entry.seed): entry for entry in entries}.values())


def _parse(text: str) -> ast.Expression:
    return ast.parse(text, mode="eval")


def _find_arguments(tree: ast.AST, argument: str) -> list[ast.keyword]:
    keywords = (node for node in ast.walk(tree) if isinstance(node, ast.keyword))
    return [keyword for keyword in keywords if keyword.arg == argument]


def _substitute(text: str, argument: str, values: Sequence[Any]) -> Iterator[str]:
    """Yields a recipe with each value in place of an argument it writes, or as it is."""
    tree = _parse(text)
    found = _find_arguments(tree, argument)
    written = dict.fromkeys(ast.unparse(keyword.value) for keyword in found)
    if not values or not found:
        yield text
        return
    if len(written) > 1:
        raise InputError(
            f"compare: {text} writes {argument}= as {' and as '.join(written)}; a grid cannot say "
            "which is meant, write the recipes out"
        )
    for value in values:
        for keyword in found:
            keyword.value = ast.Constant(value)
        yield ast.unparse(tree)


def _check_entries(job: Job, entries: Sequence[Entry]) -> None:
    """Refuses, before the first row, a recipe that some weight of the model does not allow."""
    shapes = {path: (leaf.d_in, leaf.d_out) for path, leaf in job.leaves.items()}
    for recipe in {str(entry.recipe): entry.recipe for entry in entries}.values():
        preview(model_fns(job.source.config), shapes, recipe)


def read_held_out(
    job: Job, text: Any, seqlen: int, windows: int | None, protocol: str, note: Any = None
) -> np.ndarray:
    """Returns what rows are scored on, int32 [n, seqlen]."""
    if windows is not None:
        check_int("compare", "text_windows", windows, 1)
    if isinstance(text, str | Path):
        limit = None if windows is None else windows * seqlen
        options = {"seqlen": seqlen, "limit": limit, "note": note}
        text = load_tokens(text, job.source.tokenizer, protocol, **options)
    return make_windows(job.source.config, text, seqlen, windows)


# ---- a row


@dataclass(frozen=True)
class Scorer:
    """Measures every model of a comparison on the same windows and against the same teacher."""

    path: str | Path
    windows: np.ndarray
    protocol: str
    dtype: str

    def load_teacher(self) -> Model:
        return api.load(self.path, self.dtype)

    def score(self, model: Model, reporter: Reporter) -> dict[str, Any]:
        """Returns perplexity and the distance to the teacher, which is held no longer than this."""
        options = {"protocol": self.protocol, "reporter": reporter}
        seqlen = self.windows.shape[1]
        score = api.perplexity(model, self.windows, seqlen, **options)
        distance = api.divergence(model, self.load_teacher(), self.windows, seqlen, **options)
        return vars(score) | {"kl": distance.kl, "top1": distance.top1}


def _measure_teacher(scorer: Scorer, reporter: Reporter) -> dict[str, Any]:
    teacher = scorer.load_teacher()
    kernels = [kernel for _, kernel in each(teacher.params, teacher.fns.sites)]
    stored = sum(8 * kernel.nbytes for kernel in kernels) / sum(kernel.size for kernel in kernels)
    return _make_row(recipe=TEACHER, bits_per_weight=stored, **scorer.score(teacher, reporter))


def _measure(
    entry: Entry, folder: Path, make: Callable[..., Model], scorer: Scorer, reporter: Reporter
) -> dict[str, Any]:
    """Makes a row, or goes on with it, or takes the artifact that a killed run had finished."""
    target = folder / ROWS / entry.name
    row = {"recipe": entry.text, "resolved": str(entry.recipe), "seed": entry.seed}
    jax.clear_caches()  # a row's memory shall not hold the programs of all rows before it
    measurable = reset_peak_rss()
    try:
        if is_artifact(target):
            small = api.load(target, scorer.dtype)
        else:
            begun = (partial_folder(target) / STATE).is_file()
            small = make(out=target, resume=begun, reporter=reporter)
    except FloatingPointError as error:  # of this recipe on this model: a result like another
        reporter.say(f"no row: {error}")
        return _make_row(**row, error=str(error))
    report = small.report
    return _make_row(
        **row,
        bits_per_weight=report["bits_per_weight"],
        seconds=report["seconds"],
        peak_rss_mb=report["peak_rss_mb"] if measurable else None,
        artifact=f"{ROWS}/{entry.name}",
        **scorer.score(small, reporter),
    )


def _make_row(**values: Any) -> dict[str, Any]:
    """Returns a row with all columns, None where there is nothing to say."""
    known = {name: values.get(name) for name in COLUMNS}
    return make_finite(known)


# ---- the folder


def _open(folder: Path, *, resume: bool) -> dict[str, Any] | None:
    """Returns the comparison to go on with, None for a new one; writes nothing.

    Raises:
      InputError: the folder is taken; there is nothing to resume.
    """
    begun = (folder / RESULTS).is_file()
    if resume and not begun:
        raise InputError(f"there is no comparison at {folder}; leave out --resume")
    if resume:
        return _read_results(folder)
    if begun:
        raise InputError(
            f"{folder} holds a comparison; add --resume to go on with it, or choose another name"
        )
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists and is no comparison; choose another name")
    return None


def _read_results(folder: Path) -> dict[str, Any]:
    """Reads the rows to go on with, as strictly as they are written."""
    results = read_json(folder / RESULTS)
    rows = results.get("rows")
    whole = isinstance(results.get("settings"), dict) and isinstance(rows, list)
    if not whole or not all(
        isinstance(row, dict) and {"resolved", "seed"} <= set(row) <= set(COLUMNS) for row in rows
    ):
        raise InputError(
            f"{folder / RESULTS} is damaged: settings, and rows of {', '.join(COLUMNS)} were "
            "wanted; restore it, or choose another name to begin again"
        )
    return results


class _Board:
    """The rows of a comparison, written anew with each of them."""

    def __init__(self, folder: Path, results: dict[str, Any], reporter: Reporter):
        self.folder, self.results, self.reporter = folder, results, reporter

    @classmethod
    def begin(
        cls, folder: Path, saved, job: Job, held_out: np.ndarray, protocol: str, reporter: Reporter
    ) -> "_Board":
        named = {name: job.fingerprint[name] for name in ("model", "calibration", "dtype")}
        text = hash_parts([np.asarray(held_out, np.int32)])
        settings = named | {"text": text, "protocol": protocol}
        if saved is None:
            fresh = {
                "model": describe_base(job.source.folder)["name"],
                "protocol": protocol,
                "settings": settings,
                "environment": describe_environment(),
                "rows": [],
            }
            board = cls(folder, fresh, reporter)
            (folder / ROWS).mkdir(parents=True, exist_ok=True)
            board.write()
            return board
        before = saved.get("settings", {})
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            raise InputError(
                f"{folder} was begun with another {', another '.join(changed)}; give the same, or "
                "choose another name"
            )
        board = cls(folder, saved, reporter)
        board.write()  # a kill may have come between the three files
        return board

    def has(self, recipe: str, seed: int | None) -> bool:
        rows: Sequence[Mapping[str, Any]] = self.results["rows"]
        return any((row["resolved"] or TEACHER, row["seed"]) == (recipe, seed) for row in rows)

    def add(self, row: dict[str, Any]) -> None:
        self.results = {**self.results, "rows": [*self.results["rows"], row]}
        self.write()

    def write(self) -> None:
        """Writes the three files; results.json first, from which the others are made."""
        write_json(self.folder / RESULTS, self.results)
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.results["rows"])
        write_text(self.folder / TABLE, table.getvalue())
        page = None
        with say_failure(PAGE, self.reporter.say):
            page = render_comparison(self.results)
        if page is not None:
            write_text(self.folder / PAGE, page)
