"""What a run is given, opened and checked before anything is computed or written."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.calibration.collect import STATISTICS, describe_tokens
from lqec_jax.core.arguments import check_int
from lqec_jax.core.hashing import hash_parts
from lqec_jax.errors import InputError
from lqec_jax.io.carried import find_carried
from lqec_jax.io.sources.source import Source, make_source, open_folder, read_source
from lqec_jax.models.decoder import model_fns
from lqec_jax.models.model import Model
from lqec_jax.recipe import Recipe, check_chain, parse_recipe
from lqec_jax.runs.linears import preview
from lqec_jax.runs.text import Text, read_text
from lqec_kernels.formats import CompressedLinear

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclass(frozen=True)
class Job:
    """A compression that is checked in full and not begun.

    Attributes:
      dtype: of activations.
      leaves: what becomes of a block's linears, path -> CompressedLinear of shapes.
      asked: how many calibration windows were asked for; the text may hold fewer.
    """

    source: Source
    recipe: Recipe
    text: Text
    seed: int
    dtype: Any
    leaves: Mapping[str, CompressedLinear]
    asked: int

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Returns everything that decides the result, but the devices."""
        return {
            "recipe": str(self.recipe),
            "seed": self.seed,
            "model": self.source.fingerprint,
            "calibration": _digest(self.text.train, self.text.val),
            "eval": _digest(self.text.held_out),
            "dtype": np.dtype(self.dtype).name,
        }

    @property
    def text_in_words(self) -> str:
        train, val, length = len(self.text.train), len(self.text.val), self.text.seqlen
        short = f"; the text holds no more of the {self.asked} asked for"
        words = (
            f"calibration: {train} windows of {length} tokens, {val} more for validation"
            f"{short if train + val < self.asked else ''}"
        )
        return "; ".join([words, *self.text.notes])


def prepare(
    model: Model | str | Path,
    recipe: str | Recipe,
    calib: Any = None,
    *,
    seqlen: int = 512,
    windows: int = 320,
    val_ratio: float = 0.2,
    seed: int = 0,
    eval: Any = None,
    dtype: str = "auto",
) -> Job:
    """Checks everything that `compress` is given, without writing or computing anything.

    Raises:
      InputError: as `compress`.
    Cost: reads every weight once, and the text.
    """
    recipe = parse_recipe(recipe)
    check_int("compress", "seed", seed, 0, 2**32 - 1)
    check_int("compress", "windows", windows, 1)
    in_memory = isinstance(model, Model)
    compute = model.dtype if in_memory else resolve_dtype(dtype)
    source = make_source(model) if in_memory else read_source(open_folder(model))
    find_carried(source.tokenizer, source.folder)  # refuses a link before any work, not after it
    text = read_text(source.config, source.tokenizer, calib, eval,
                     seqlen=seqlen, windows=windows, val_ratio=val_ratio)  # fmt: skip
    leaves = preview(model_fns(source.config), _linear_shapes(source.config), recipe)
    said = (*text.notes, *check_chain(recipe), *_few_tokens(text, recipe, leaves))
    text = replace(text, notes=said)
    return Job(source, recipe, text, seed, compute, leaves, windows)


def _few_tokens(text: Text, recipe: Recipe, leaves: Mapping[str, CompressedLinear]) -> list[str]:
    if not recipe.needs & STATISTICS.keys():
        return []
    return describe_tokens(text.train.size, max(leaf.d_in for leaf in leaves.values()))


def resolve_dtype(dtype: str) -> Any:
    """Returns a compute dtype by name; 'auto' is float32 on a CPU and bfloat16 elsewhere."""
    if dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype!r}; one of auto, {', '.join(DTYPES)} was wanted")
    return DTYPES[dtype]


def _linear_shapes(config: Any) -> dict[str, tuple[int, int]]:
    return {site.path: site.shape for site in model_fns(config).sites}


def _digest(*arrays: np.ndarray) -> str:
    """Hashes windows, each array's shape before its ids."""
    return hash_parts(
        part for array in arrays for part in (f"{array.shape}", np.asarray(array, np.int32))
    )
