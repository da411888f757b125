"""The verbs as functions: load, compress, score, save; `quantize` for a single matrix."""

import hashlib
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.calibration.collect import collect
from lqec_jax.calibration.data import check_tokens, cut_windows, load_tokens, split_windows
from lqec_jax.core.progress import Reporter, Silent
from lqec_jax.core.tree import stack_blocks, unstack_blocks
from lqec_jax.core.types import LinearProblem, LinearStats
from lqec_jax.driver import Driver, Source, Text, apply_steps, preview
from lqec_jax.errors import InputError
from lqec_jax.evaluate import perplexity as scores
from lqec_jax.evaluate.report import build_report
from lqec_jax.io.artifact import is_artifact, load_artifact, save_artifact, write_artifact
from lqec_jax.io.hf import Checkpoint, check_tensors, read_block, read_outer
from lqec_jax.io.run import Run
from lqec_jax.io.tokenizer import Tokenizer, has_tokenizer
from lqec_jax.models import families
from lqec_jax.models.decoder import model_fns
from lqec_jax.models.model import Model
from lqec_jax.recipe import Recipe, parse_recipe
from lqec_kernels.formats import CompressedLinear, Dense

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def load(path: str | Path, dtype: str = "auto") -> Model:
    """Loads a Hugging Face folder, a hub id, or an artifact; compressed weights stay packed.

    Args:
      dtype: of activations: 'float32', 'bfloat16', or 'auto', float32 on a CPU and bfloat16
        elsewhere.
    Raises:
      InputError: what is there is missing, damaged, or not a model this library knows.
    """
    if is_artifact(path):
        return load_artifact(path, resolve_dtype(dtype))
    source, checkpoint = open_source(path)
    blocks = stack_blocks([source.block(layer) for layer in range(source.config.layers)])
    return Model(
        config=source.config,
        params=jax.tree.map(jnp.asarray, {**source.outer, "blocks": blocks}),
        raw_config=checkpoint.config,
        tokenizer=_tokenizer(checkpoint.folder),
        fingerprint=source.fingerprint,
        folder=checkpoint.folder,
        dtype=resolve_dtype(dtype),
    )


def logits(model: Model, tokens: Any) -> jax.Array:
    """Returns next-token logits: int [b, t] -> float32 [b, t, vocab].

    Raises:
      InputError: tokens are not [b, t], or an id is outside the vocabulary.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2:
        raise InputError(
            f"logits: tokens have shape {list(tokens.shape)}; [batch, time] was wanted"
        )
    check_tokens(tokens.reshape(-1), model.config.vocab_size)
    return _logits(model.fns)(model.params, tokens)


def perplexity(
    model: Model, tokens: Any, seqlen: int = 2048, *, protocol: str = "tokens"
) -> scores.Perplexity:
    """Scores a model on a stream of tokens.

    The stream is cut into consecutive windows, the remainder dropped; each window is fed alone and
    its tokens 1 .. seqlen-1 are predicted.

    Args:
      tokens: int [n] or windows [n, seqlen].
      protocol: how the tokens were made; goes into the result's protocol with the length.
    Returns:
      .ppl .nll .low .high .tokens .windows .protocol
    Raises:
      InputError: fewer tokens than one window, an id outside the vocabulary.
    """
    windows = make_windows(model.config, tokens, seqlen)
    return scores.perplexity(model.fns, model.params, windows, protocol)


def divergence(
    student: Model, teacher: Model, tokens: Any, seqlen: int = 2048, *, protocol: str = "tokens"
) -> scores.Divergence:
    """Returns mean KL(teacher || student) per token and how often their first choices agree."""
    if student.config.vocab_size != teacher.config.vocab_size:
        raise InputError(
            f"divergence: the student has {student.config.vocab_size} tokens, the teacher "
            f"{teacher.config.vocab_size}; compare models of one vocabulary"
        )
    windows = make_windows(student.config, tokens, seqlen)
    return scores.divergence(
        (teacher.fns, teacher.params), (student.fns, student.params), windows, protocol
    )


def quantize(w: Any, recipe: str | Recipe, *, x: Any = None, seed: int = 0) -> CompressedLinear:
    """Compresses one matrix.

    Args:
      w: [d_in, d_out], any floating dtype.
      recipe: linear steps only.
      x: what the matrix will read, [tokens, d_in]; needed by steps that use statistics.
    Returns:
      A leaf with .dense(), .bits_per_weight, .base, .corrections.
    Raises:
      InputError: a recipe with a model step; a step that needs inputs, and there are none.
    Example:
      >>> leaf = quantize(w, "rtn(bits=3, group_size=64) | svd(rank=16)")
    """
    recipe = parse_recipe(recipe)
    whole = [step.name for step in recipe.steps if step.scope != "linear"]
    if whole:
        raise InputError(f"quantize: {whole[0]} needs a whole model; use compress")
    if recipe.needs and x is None:
        raise InputError(
            f"quantize: {recipe} reads the inputs' {', '.join(sorted(recipe.needs))}; give x="
        )
    w = jnp.asarray(w, jnp.float32)
    if w.ndim != 2:
        raise InputError(f"quantize: w has shape {list(w.shape)}; [d_in, d_out] was wanted")
    if not bool(jnp.isfinite(w).all()):
        raise InputError("quantize: w holds NaN or Inf; give finite weights")
    stats = collect([jnp.asarray(x)], recipe.needs) if recipe.needs else LinearStats()
    problem = LinearProblem(w, stats, jax.random.key(seed))
    return apply_steps("w", recipe.steps, problem, CompressedLinear(Dense(w)))[0]


def compress(
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
    mesh: Any = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Model:
    """Compresses a model by a recipe.

    Args:
      model: a folder or hub id, streamed block by block; or a dense Model in memory.
      recipe: see `recipe`.
      calib: calibration text: a path or `hf:` source, or token ids [n] or [n, seqlen].
      seqlen, windows: the first `windows` windows of `seqlen` tokens are used.
      val_ratio: of them, the last so many are for validation.
      eval: another text to measure the stages on; the validation windows unless given.
      mesh: for model steps, see `train.sharding.make_mesh`.
      out: writes the artifact there; the run can be resumed from `out`.partial.
    Returns:
      The compressed model; `.report` says what was measured.
    Raises:
      InputError: before any work, for whatever of the above cannot be used.
    """
    recipe = parse_recipe(recipe)
    source, raw_config, tokenizer, folder = _open(model)
    text = read_text(source.config, tokenizer, calib, eval, seqlen, windows, val_ratio)
    compute = resolve_dtype(dtype) if not isinstance(model, Model) else model.dtype
    preview(model_fns(source.config), _linear_shapes(source.config), recipe)
    fingerprint = {
        "recipe": str(recipe),
        "seed": seed,
        "model": source.fingerprint,
        "calibration": _digest(text.train, text.val),
        "eval": _digest(text.held_out),
        "dtype": np.dtype(compute).name,
        "mesh": "one device" if mesh is None else str(dict(mesh.shape)),
    }
    out = None if out is None else Path(out)
    run = Run.begin(out, fingerprint, resume=resume, overwrite=overwrite)
    driver = Driver(source, recipe, text, run, seed, compute, mesh, reporter or Silent())
    try:
        params = driver.compress()
        report = build_report(
            run.state, recipe=str(recipe), seed=seed, dtype=np.dtype(compute).name
        )
        small = Model(source.config, params, raw_config, tokenizer, str(recipe), report,
                      source.fingerprint, folder, compute)  # fmt: skip
        if out is not None:
            small = _finish(run, small)
    finally:
        if out is None:
            run.discard()
    return small


def save(model: Model, out: str | Path, *, overwrite: bool = False) -> Path:
    """Writes a model as an artifact folder; refuses to replace one unless told to."""
    return save_artifact(model, out, overwrite=overwrite)


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


def make_windows(config: Any, tokens: Any, seqlen: int, windows: int | None = None) -> np.ndarray:
    """Cuts tokens for a model, after checking that it can read them."""
    tokens = np.asarray(tokens)
    if seqlen < 2 or seqlen > config.max_length:
        raise InputError(
            f"seqlen={seqlen}; 2 to {config.max_length} was wanted, the model's longest context"
        )
    tokens = tokens.reshape(-1)
    check_tokens(tokens, config.vocab_size)
    return cut_windows(tokens, seqlen, windows)


def read_text(
    config, tokenizer, calib, held_out, seqlen: int, windows: int, val_ratio: float
) -> Text:
    """Turns the texts of a run into its windows."""
    if calib is None:
        raise InputError("compress: no calibration text; give calib= a path or token ids")
    tokens = _tokens(calib, tokenizer, seqlen, windows * seqlen)
    train, val = split_windows(make_windows(config, tokens, seqlen, windows), val_ratio)
    if held_out is None:
        return Text(train, val, val[:0], "calib-val")
    tokens = _tokens(held_out, tokenizer, seqlen, None)
    protocol = "documents" if isinstance(held_out, str | Path) else "tokens"
    return Text(train, val, make_windows(config, tokens, seqlen), protocol)


def _tokens(text: Any, tokenizer: Any, seqlen: int, limit: int | None) -> np.ndarray:
    if isinstance(text, str | Path):
        return load_tokens(text, tokenizer, "documents", seqlen=seqlen, limit=limit)
    return np.asarray(text)


def _open(model: Model | str | Path) -> tuple[Source, Any, Any, Path | None]:
    if not isinstance(model, Model):
        source, checkpoint = open_source(model)
        return source, checkpoint.config, _tokenizer(checkpoint.folder), checkpoint.folder
    if model.recipe:
        raise InputError("compress: the model is compressed already; give the dense one")
    blocks = unstack_blocks(model.params["blocks"])
    outer = {name: value for name, value in model.params.items() if name != "blocks"}
    source = Source(model.config, outer, lambda layer: blocks[layer], model.fingerprint)
    return source, model.raw_config, model.tokenizer, model.folder


def _tokenizer(folder: Path) -> Tokenizer | None:
    return Tokenizer.load(folder) if has_tokenizer(folder) else None


def _linear_shapes(config: Any) -> dict[str, tuple[int, int]]:
    shapes = families.family(config.family).block_shapes(config)
    return {p: shapes[f"{p}/kernel"] for p in model_fns(config).linears}


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}".encode() + np.ascontiguousarray(array, np.int32).tobytes())
    return digest.hexdigest()


def _finish(run: Run, model: Model) -> Model:
    """Writes the artifact beside the run, gives it its name, and reads it back."""
    artifact = Path(tempfile.mkdtemp(prefix="artifact-", dir=run.folder))
    artifact.chmod(0o755)
    write_artifact(model, artifact)
    run.finish(artifact)
    return load_artifact(run.out, model.dtype)


@lru_cache(maxsize=8)
def _logits(fns: Any):
    return jax.jit(lambda params, tokens: fns.head(params, fns.hidden(params, tokens)[1]))
