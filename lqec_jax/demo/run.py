"""The main job on the embedded model: what 2 bits destroy, and how much of it comes back.

Everything is computed anew, by the verbs that a user calls; nothing needs a network.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lqec_jax.api import compress, load, perplexity
from lqec_jax.core.progress import Reporter, Silent
from lqec_jax.demo import model_path
from lqec_jax.demo.plot import draw_demo
from lqec_jax.errors import InputError
from lqec_jax.evaluate.card import say_failure
from lqec_jax.evaluate.generate import generate
from lqec_jax.evaluate.report import describe_environment, make_finite, peak_rss_mb
from lqec_jax.io.artifact.artifact import check_free
from lqec_jax.io.files import staged_folder, write_json
from lqec_jax.io.lock import one_writer
from lqec_jax.models.model import Model
from lqec_jax.runs.text import read_windows

RESULT, PLOT, ARTIFACT = "demo.json", "demo.png", "rilq"
SEQLEN = 256
PROMPT = "Return a list of the"


@dataclass(frozen=True)
class Settings:
    """What the demo compresses by.

    Attributes:
      bits, group_size: of the rounding that all rows share.
      rank: of the corrections; the same for SVD and RILQ, so that both take the same bits.
      updates: RILQ's.
      windows: RILQ's calibration windows, a fifth of them for validation.
      held_out: how many windows of the held-out text are scored; all of them unless said.
      new_tokens: length of the sample texts.
    """

    bits: int = 2
    group_size: int = 64
    rank: int = 8
    updates: int = 300
    windows: int = 480
    held_out: int | None = None
    new_tokens: int = 96

    @property
    def recipes(self) -> dict[str, str]:
        rtn = f"rtn(bits={self.bits}, group_size={self.group_size})"
        return {
            "rtn": rtn,
            "svd": f"{rtn} | svd(rank={self.rank})",
            "rilq": f"{rtn} | rilq(rank={self.rank}, updates={self.updates}, eval_every=50)",
        }


@one_writer
def run_demo(
    out: str | Path = "lqec-demo",
    *,
    seed: int = 0,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Compresses the embedded model in three ways and compares them with it.

    Args:
      out: a folder to make, for `demo.json`, `demo.png` and the best row as an artifact, `rilq`.
      seed: of RILQ's start and order of windows, and of the sampled texts.
    Returns:
      What demo.json holds: `rows` of {name, recipe, ppl, low, high, nll, bits_per_weight,
      gap_closed, seconds, text}, the teacher's first. `gap_closed` is which part of what rounding
      added to the loss a row takes back: 1 is the teacher's loss, 0 the rounded model's.
    Raises:
      InputError: `out` exists and is not to be replaced, or is no folder of a demo.
    """
    out, settings, reporter = Path(out), settings or Settings(), reporter or Silent()
    check_out(out, overwrite)
    with staged_folder(out, replace=overwrite) as temporary:
        result = _measure(temporary / ARTIFACT, settings, seed, reporter)
        write_json(temporary / RESULT, result)
        with say_failure(PLOT, reporter.say):
            draw_demo(temporary / PLOT, result)
    return result


def check_out(out: Path, overwrite: bool) -> None:
    """Refuses a folder that may not be made or replaced.

    Raises:
      InputError: it exists and `overwrite` is not set, or it is no folder of a demo.
    """
    if not lexists(out):
        return check_free(out, overwrite=False)
    if not (out / RESULT).is_file():
        raise InputError(f"{out} exists and is no folder of a demo; choose another name for --out")
    if not overwrite:
        raise InputError(f"{out} exists; choose another name, or add --overwrite to replace it")


def _measure(artifact: Path, settings: Settings, seed: int, reporter: Reporter) -> dict[str, Any]:
    folder, started = model_path(), time.perf_counter()
    text = folder / "heldout.jsonl"
    windows, protocol = read_windows(load(folder), text, SEQLEN, settings.held_out)

    def run(recipe: str) -> Model:
        trains = "rilq" in recipe
        return compress(
            folder,
            recipe,
            folder / "calib.jsonl",
            seqlen=SEQLEN,
            # Rounding and SVD look at no text; two windows are the fewest that can be given.
            windows=settings.windows if trains else 2,
            seed=seed,
            out=artifact if trains else None,
            reporter=reporter if trains else Silent(),  # seconds, and another text's numbers
        )

    def measure(name: str, recipe: str, make: Callable[[], Model]) -> tuple[dict, Model]:
        began = time.perf_counter()
        model = make()
        seconds = time.perf_counter() - began
        score = perplexity(model, windows, SEQLEN, protocol=protocol)
        text = generate(model, PROMPT, max_new_tokens=settings.new_tokens, temperature=0.7,
                        top_p=0.9, seed=seed)  # fmt: skip
        bits = model.report.get("bits_per_weight") or _bits_of(model)
        row = {"name": name, "recipe": recipe, "bits_per_weight": bits, "seconds": seconds}
        return {**row, **vars(score), "text": text}, model

    rows = [measure("teacher", "", lambda: load(folder))[0]]
    for name, recipe in settings.recipes.items():
        row, model = measure(name, recipe, lambda recipe=recipe: run(recipe))
        rows.append(row)
    _add_gaps(rows)
    return make_finite(
        {
            "seed": seed,
            "prompt": PROMPT,
            "rows": rows,
            "fits": model.report["fits"],
            "seconds": time.perf_counter() - started,
            "peak_rss_mb": peak_rss_mb(),
            "environment": describe_environment(),
        }
    )


def _add_gaps(rows: Sequence[dict[str, Any]]) -> None:
    teacher, rounded = rows[0]["nll"], rows[1]["nll"]
    for row in rows:
        row["gap_closed"] = (rounded - row["nll"]) / (rounded - teacher)


def _bits_of(model: Model) -> int:
    """Returns how many bits a weight of a dense model is stored in."""
    kernel = jax.tree.leaves(model.params["blocks"])[0]
    return 8 * np.dtype(kernel.dtype).itemsize
