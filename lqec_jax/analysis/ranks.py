"""What a rank buys, by the scope of the discrepancy that adapters are made for: RILQ's analysis.

    weight   svd(rank)                 ||w - ŵ - a b||², no data
    linear   rilq(rank, 'linear')      Σ ||x (w - ŵ - a b)||² of every linear
    block    rilq(rank, 'block')       ||F(h) - F̂(ĥ)||² of every block
    model    rilq(rank, 'model')       ||H - H_q||² once, at the end; no next-token loss here

    DIR/analysis.json    spectra of the weight errors, and a row a scope and rank
    DIR/analysis.html    the same as plots
    DIR/runs             the comparison that made the rows, see `comparison`

The wider the scope, the less the rank matters, and the further the states in between drift from the
teacher's while those at the end come nearer (Lee et al., arXiv:2412.01129, figures 3 and 4).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lqec_jax import api
from lqec_jax.analysis import comparison
from lqec_jax.analysis.spectra import measure_spectra
from lqec_jax.core.arguments import check_choice, check_int
from lqec_jax.core.progress import Reporter, Silent
from lqec_jax.errors import InputError
from lqec_jax.evaluate.card import say_failure
from lqec_jax.evaluate.discrepancy import discrepancy
from lqec_jax.evaluate.rank_page import render_ranks
from lqec_jax.io.files import read_json, write_json, write_text
from lqec_jax.io.lock import one_writer
from lqec_jax.models.model import Model
from lqec_jax.recipe import parse_recipe
from lqec_jax.runs.job import prepare

RESULTS, PAGE, RUNS = "analysis.json", "analysis.html", "runs"
SCOPES = ("weight", "linear", "block", "model")


@one_writer
def analyze_ranks(
    *,
    model: str | Path,
    base: str,
    calib: Any,
    text: Any,
    out: str | Path,
    ranks: Sequence[int] = (2, 4, 8, 16, 32),
    scopes: Sequence[str] = SCOPES,
    updates: int | None = None,
    seed: int = 0,
    resume: bool = False,
    reporter: Reporter | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Measures the errors of a quantized model and what adapters of every rank and scope repair.

    Args:
      base: a recipe that quantizes and corrects nothing, such as 'rtn(bits=2, group_size=32)'.
      calib, text, resume, settings: as `comparison.compare`: seqlen, windows, val_ratio,
        text_windows, protocol, dtype.
      updates: of every training; rilq's own number unless given. No training stops early.
    Returns:
      What analysis.json holds: `model, base, protocol, spectra, rows`; a row has `scope, rank,
      bits_per_weight, ppl, kl, relative_error` (mean of weights), and on the training windows and
      on the held-out ones `train_mse, held_out_mse` (post-norm) and `by_block`.
    Raises:
      InputError: as `comparison.compare`; `base` already has a correction.
    """
    plan = list_runs(base, ranks, scopes, updates)
    folder, reporter = Path(out), reporter or Silent()
    results = comparison.compare(
        model, [recipe for *_, recipe in plan], calib=calib, text=text, out=folder / RUNS,
        seeds=[seed], resume=resume, reporter=reporter, **settings,
    )  # fmt: skip
    measure = _Measure(model, base, calib, text, settings, reporter)
    path = folder / RESULTS
    known = _read_known(path)
    analysis = {name: results[name] for name in ("model", "protocol", "settings", "environment")}
    analysis["base"] = base
    made = {(row["resolved"], row["seed"]): row for row in results["rows"]}
    rows = [(scope, rank, made[str(parse_recipe(recipe)), seed]) for scope, rank, recipe in plan]
    if known["base"] == base:
        analysis["spectra"] = known["spectra"]
    else:  # those of another base in the same folder say nothing of this one
        analysis["spectra"] = measure.spectra(folder / RUNS, rows[0][2])
    found = {row["artifact"]: row for row in known["rows"]}
    analysis["rows"] = [
        found.get(row["artifact"]) or measure.row(scope, rank, folder / RUNS, row)
        for scope, rank, row in rows
        if row["artifact"]  # what became non-finite has none; the comparison says which
    ]
    analysis["teacher"] = results["rows"][0]
    write_json(path, analysis)
    page = None
    with say_failure(PAGE, reporter.say):
        page = render_ranks(analysis)
    if page is not None:
        write_text(folder / PAGE, page)
    return analysis


def _read_known(path: Path) -> dict[str, Any]:
    """Returns what was measured before, where there is something."""
    known = read_json(path) if path.is_file() else {"base": None, "rows": []}
    rows = known.get("rows")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("artifact"), str) for row in rows
    ):
        raise InputError(f"{path} is damaged: rows; remove it, and it is measured again")
    return {"base": None, **known} if "spectra" in known else {"base": None, "rows": []}


def list_runs(
    base: str, ranks: Sequence[int], scopes: Sequence[str], updates: int | None
) -> list[tuple[str, int | None, str]]:
    """Returns (scope, rank, recipe) of every row, the bare base first as ('', None, base).

    Raises:
      InputError: `base` corrects something; an unknown scope; a rank that is no rank.
    """
    steps = parse_recipe(base).steps
    if any(step.scope == "model" for step in steps):
        raise InputError(
            f"analyze rank: base={base!r} trains the whole model; a quantizer alone was wanted"
        )
    if updates is not None:
        check_int("analyze rank", "updates", updates, 1)
    runs: list[tuple[str, int | None, str]] = [("", None, base)]
    for scope in scopes:
        check_choice("analyze rank", "scope", scope, SCOPES)
        for rank in ranks:
            check_int("analyze rank", "rank", rank, 1)
            runs.append((scope, rank, f"{base} | {_write_correction(scope, rank, updates)}"))
    return runs


def _write_correction(scope: str, rank: int, updates: int | None) -> str:
    if scope == "weight":
        return f"svd(rank={rank})"
    given = {"rank": rank, "scope": repr(scope), "patience": 0}
    if scope == "model":
        given["token_weight"] = 0.0
    if updates is not None:
        given["updates"] = updates
    return f"rilq({', '.join(f'{name}={value}' for name, value in given.items())})"


class _Measure:
    """Reads what the comparison made; the teacher and both texts are read once."""

    def __init__(self, model, base, calib, text, settings: dict, reporter: Reporter):
        names = ("seqlen", "windows", "val_ratio", "dtype")
        make = {name: settings[name] for name in names if name in settings}
        self.job = prepare(model, parse_recipe(base), calib, **make)
        seqlen = self.job.text.train.shape[1]
        self.held_out = comparison.read_held_out(
            self.job, text, seqlen, settings.get("text_windows"),
            settings.get("protocol", "documents"),
        )  # fmt: skip
        self.dtype = settings.get("dtype", "auto")
        self.teacher = api.load(model, self.dtype)
        self.reporter = reporter

    def spectra(self, runs: Path, bare: dict) -> list[dict]:
        return measure_spectra(self.job.source, self._load(runs, bare), self.reporter)

    def row(self, scope: str, rank: int | None, runs: Path, row: dict) -> dict[str, Any]:
        student = self._load(runs, row)
        errors = [linear["relative_error"] for linear in student.report["linears"]]
        kept = (
            "artifact",
            "recipe",
            "bits_per_weight",
            "ppl",
            "low",
            "high",
            "nll",
            "kl",
            "seconds",
        )
        train, held_out = (self._compare(student, w) for w in (self.job.text.train, self.held_out))
        return {
            "scope": scope,
            "rank": rank,
            **{name: row[name] for name in kept},
            "relative_error": float(np.mean(errors)),
            "train_mse": train.post_norm,
            "held_out_mse": held_out.post_norm,
            "train_by_block": list(train.by_block),
            "held_out_by_block": list(held_out.by_block),
        }

    def _load(self, runs: Path, row: dict) -> Model:
        return api.load(runs / row["artifact"], self.dtype)

    def _compare(self, student: Model, windows: np.ndarray):
        models = ((self.teacher.fns, self.teacher.params), (student.fns, student.params))
        return discrepancy(*models, windows, self.reporter)
