"""What a run is given, opened and checked before anything is computed or written."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.calibration.collect import STATISTICS, describe_tokens
from lqec_jax.calibration.data import check_tokens, cut_windows, load_tokens, split_windows
from lqec_jax.core.arguments import check_int
from lqec_jax.core.tree import unstack_blocks
from lqec_jax.errors import InputError
from lqec_jax.io.artifact.artifact import is_artifact
from lqec_jax.io.carried import find_carried
from lqec_jax.io.sources.flax import is_flax_checkpoint, load_flax_checkpoint
from lqec_jax.io.sources.hf import Checkpoint, check_tensors, check_values, read_block, read_outer
from lqec_jax.io.sources.tokenizer import Tokenizer, has_tokenizer
from lqec_jax.models import families
from lqec_jax.models.decoder import model_fns
from lqec_jax.models.model import Model
from lqec_jax.recipe import Recipe, check_chain, parse_recipe
from lqec_jax.runs.driver import Source, Text
from lqec_jax.runs.linears import preview
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
    raw_config: Mapping[str, Any]
    tokenizer: Any
    folder: Path | None

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
        train, val, length = len(self.text.train), len(self.text.val), self.text.train.shape[1]
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
    compute = model.dtype if isinstance(model, Model) else resolve_dtype(dtype)
    source, raw_config, tokenizer, folder = _open(model)
    find_carried(tokenizer, folder)  # refuses a link now, and not when the artifact is written
    text = read_text(source.config, tokenizer, calib, eval, seqlen, windows, val_ratio)
    leaves = preview(model_fns(source.config), _linear_shapes(source.config), recipe)
    said = (*text.notes, *check_chain(recipe), *_few_tokens(text, recipe, leaves))
    text = replace(text, notes=said)
    return Job(source, recipe, text, seed, compute, leaves, windows, raw_config,
               tokenizer, folder)  # fmt: skip


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


def open_source(path: str | Path) -> tuple[Source, Checkpoint]:
    """Opens a dense checkpoint: everything about it is checked, no block is read."""
    if is_artifact(path):
        raise InputError(f"{path} is compressed already; name the dense folder it was made from")
    checkpoint = Checkpoint.open(path)
    config = families.read_config(checkpoint.config)
    family = families.family(checkpoint.config["model_type"])
    check_tensors(checkpoint, family, config)
    stored = checkpoint.dtype(family.outer_tensors(config)["embed/embedding"].name)
    source = Source(
        config=config,
        outer=read_outer(checkpoint, family, config, stored),
        block=lambda layer: read_block(checkpoint, family, config, layer, stored),
        fingerprint=checkpoint.fingerprint(),
    )
    return source, checkpoint


def read_windows(
    model: Model,
    text: str | Path,
    seqlen: int,
    windows: int | None = None,
    protocol: str = "documents",
    note: Callable[[str], None] | None = None,
) -> tuple[np.ndarray, str]:
    """Reads a text to score a model on.

    Args:
      windows: the first so many; all of them unless given.
      protocol: how documents become windows, see `calibration.data`.
      note: is told what is to be said of the text, in one line.
    Returns:
      Windows int32 [n, seqlen], and the protocol, 'tokens' where the text is token ids already.
    """
    _check_seqlen(model.config, seqlen)
    if windows is not None:
        check_int("eval", "windows", windows, 1)
    limit = None if windows is None else windows * seqlen
    tokens = load_tokens(text, model.tokenizer, protocol, seqlen=seqlen, limit=limit, note=note)
    return make_windows(model.config, tokens, seqlen, windows), _protocol(text, protocol)


def make_windows(config: Any, tokens: Any, seqlen: int, windows: int | None = None) -> np.ndarray:
    """Cuts tokens for a model, after checking that it can read them."""
    tokens = np.asarray(tokens)
    _check_seqlen(config, seqlen)
    if tokens.dtype.kind not in "iu" or not (
        tokens.ndim == 1 or (tokens.ndim == 2 and tokens.shape[1] == seqlen)
    ):
        raise InputError(
            f"tokens are {tokens.dtype} {list(tokens.shape)}; integers [n] or [n, {seqlen}] were "
            "wanted"
        )
    tokens = tokens.reshape(-1)  # [n]
    check_tokens(tokens, config.vocab_size)
    return cut_windows(tokens, seqlen, windows)


def _check_seqlen(config: Any, seqlen: Any) -> None:
    whole = isinstance(seqlen, int) and not isinstance(seqlen, bool)
    if not whole or not 2 <= seqlen <= config.max_length:
        raise InputError(
            f"seqlen={seqlen!r}; an integer from 2 to {config.max_length} was wanted, the model's "
            "longest context"
        )


def read_text(
    config, tokenizer, calib, held_out, seqlen: int, windows: int, val_ratio: float
) -> Text:
    """Turns the texts of a run into its windows."""
    if calib is None:
        raise InputError("compress: no calibration text; give calib= a path or token ids")
    _check_seqlen(config, seqlen)
    notes: list[str] = []
    tokens = _tokens(calib, tokenizer, seqlen, windows * seqlen, notes)
    train, val = split_windows(make_windows(config, tokens, seqlen, windows), val_ratio)
    if held_out is None:
        return Text(train, val, val[:0], "calib-val", tuple(notes))
    tokens = _tokens(held_out, tokenizer, seqlen, None, notes)
    scored = make_windows(config, tokens, seqlen)
    return Text(train, val, scored, _protocol(held_out, "documents"), tuple(notes))


def _protocol(text: Any, protocol: str) -> str:
    """Names what turned a text into tokens; ids that come as they are followed none."""
    is_text = isinstance(text, str | Path) and Path(text).suffix != ".npy"
    return protocol if is_text else "tokens"


def _tokens(
    text: Any, tokenizer: Any, seqlen: int, limit: int | None, notes: list[str]
) -> np.ndarray:
    if isinstance(text, str | Path):
        options = {"seqlen": seqlen, "limit": limit, "note": notes.append}
        return load_tokens(text, tokenizer, "documents", **options)
    return np.asarray(text)


def _open(model: Model | str | Path) -> tuple[Source, Any, Any, Path | None]:
    if not isinstance(model, Model) and is_flax_checkpoint(model):
        model = load_flax_checkpoint(model)
    if not isinstance(model, Model):
        source, checkpoint = open_source(model)
        check_values(checkpoint)
        return source, checkpoint.config, find_tokenizer(checkpoint.folder), checkpoint.folder
    if model.recipe:
        raise InputError("compress: the model is compressed already; give the dense one")
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(model.params)):
        raise InputError("compress: the model's weights hold NaN or Inf; give finite ones")
    blocks = unstack_blocks(model.params["blocks"])
    outer = {name: value for name, value in model.params.items() if name != "blocks"}
    source = Source(model.config, outer, lambda layer: blocks[layer], model.fingerprint)
    return source, model.raw_config, model.tokenizer, model.folder


def find_tokenizer(folder: Path) -> Tokenizer | None:
    return Tokenizer.load(folder) if has_tokenizer(folder) else None


def _linear_shapes(config: Any) -> dict[str, tuple[int, int]]:
    return {site.path: site.shape for site in model_fns(config).sites}


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}".encode() + np.ascontiguousarray(array, np.int32).tobytes())
    return digest.hexdigest()
