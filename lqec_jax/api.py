"""The verbs as functions: load, compress, score, save; `quantize` for a single matrix."""

import dataclasses
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.calibration.collect import collect
from lqec_jax.calibration.data import check_tokens
from lqec_jax.core.progress import Reporter, Silent
from lqec_jax.core.tree import is_compressed, stack_blocks
from lqec_jax.core.types import LinearProblem, LinearStats
from lqec_jax.errors import InputError
from lqec_jax.evaluate import perplexity as scores
from lqec_jax.evaluate.card import describe_base
from lqec_jax.evaluate.report import build_report
from lqec_jax.io.artifact.artifact import is_artifact, load_artifact, save_artifact, write_artifact
from lqec_jax.io.exports.export import Exported, export_model, read_record
from lqec_jax.io.sources.flax import is_flax_checkpoint, load_flax_checkpoint
from lqec_jax.io.verify.verify import Verified, verify_export
from lqec_jax.models.model import Model
from lqec_jax.recipe import Recipe, check_chain, parse_recipe
from lqec_jax.runs.driver import Driver
from lqec_jax.runs.examples import Rows, prepare_tuning, run_tuning
from lqec_jax.runs.folder import Run, check_run
from lqec_jax.runs.job import find_tokenizer, make_windows, open_source, prepare, resolve_dtype
from lqec_jax.runs.linears import apply_steps
from lqec_kernels import DenseCopy, ready
from lqec_kernels.capability import PREPARED
from lqec_kernels.formats import CompressedLinear, Dense


def load(path: str | Path, dtype: str = "auto") -> Model:
    """Loads a Hugging Face folder, a hub id, or an artifact; compressed weights stay packed.

    A folder with flax_model.msgpack for weights, as transformers 4 wrote them, is one too.

    Args:
      dtype: of activations: 'float32', 'bfloat16', or 'auto', float32 on a CPU and bfloat16
        elsewhere.
    Raises:
      InputError: what is there is missing, damaged, or not a model this library knows.
    """
    if is_artifact(path):
        return load_artifact(path, resolve_dtype(dtype))
    if is_flax_checkpoint(path):
        return load_flax_checkpoint(path, resolve_dtype(dtype))
    source, checkpoint = open_source(path)
    blocks = stack_blocks([source.block(layer) for layer in range(source.config.layers)])
    return Model(
        config=source.config,
        params=jax.tree.map(jnp.asarray, {**source.outer, "blocks": blocks}),
        raw_config=checkpoint.config,
        tokenizer=find_tokenizer(checkpoint.folder),
        fingerprint=source.fingerprint,
        folder=checkpoint.folder,
        dtype=resolve_dtype(dtype),
    )


def repack(model: Model) -> Model:
    """Puts weights, once, in the form in which this machine multiplies by them fastest.

    The layout that kernels read on a GPU or TPU; on a CPU dense copies of small weights, larger
    ones stay packed. See `lqec_kernels.ready`; what it chose is logged. The result is for products,
    not for disk: save the model that it was made of.

    Example:
      >>> model = repack(load("small"))
    """
    return dataclasses.replace(model, params=ready(model.params, dtype=model.dtype))


def logits(model: Model, tokens: Any) -> jax.Array:
    """Returns next-token logits: int [b, t] -> float32 [b, t, vocab].

    Raises:
      InputError: tokens are not [b, t], or an id is outside the vocabulary.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
        raise InputError(
            f"logits: tokens are {tokens.dtype} {list(tokens.shape)}; integers [batch, time] were "
            "wanted"
        )
    check_tokens(tokens, model.config.vocab_size)
    return _logits(model.fns)(model.params, tokens)


def perplexity(
    model: Model,
    tokens: Any,
    seqlen: int = 2048,
    *,
    protocol: str = "tokens",
    reporter: Reporter | None = None,
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
    return scores.perplexity(model.fns, model.params, windows, protocol, reporter)


def divergence(
    student: Model,
    teacher: Model,
    tokens: Any,
    seqlen: int = 2048,
    *,
    protocol: str = "tokens",
    reporter: Reporter | None = None,
) -> scores.Divergence:
    """Returns mean KL(teacher || student) per token and how often their first choices agree."""
    if student.config.vocab_size != teacher.config.vocab_size:
        raise InputError(
            f"divergence: the student has {student.config.vocab_size} tokens, the teacher "
            f"{teacher.config.vocab_size}; compare models of one vocabulary"
        )
    windows = make_windows(student.config, tokens, seqlen)
    return scores.divergence(
        (teacher.fns, teacher.params), (student.fns, student.params), windows, protocol, reporter
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
    check_chain(recipe)
    stats = collect([_check_inputs(x, w)], recipe.needs) if recipe.needs else LinearStats()
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
    reporter = reporter or Silent()
    out = None if out is None else Path(out)
    if out is not None:
        check_run(out, resume=resume, overwrite=overwrite)  # before minutes of reading
    job = prepare(model, recipe, calib, seqlen=seqlen, windows=windows, val_ratio=val_ratio,
                  seed=seed, eval=eval, dtype=dtype)  # fmt: skip
    mesh_name = "one device" if mesh is None else str(dict(mesh.shape))
    run = Run.begin(out, job.fingerprint | {"mesh": mesh_name}, resume=resume, overwrite=overwrite)
    try:
        reporter.say(job.text_in_words)
        driver = Driver(job.source, job.recipe, job.text, run, seed, job.dtype, mesh, reporter)
        params = driver.compress()
        report = build_report(run.state, recipe=str(job.recipe), seed=seed,
                              dtype=np.dtype(job.dtype).name,
                              base=describe_base(job.folder))  # fmt: skip
        report |= {"notes": list(job.text.notes)} if job.text.notes else {}
        small = Model(job.source.config, params, job.raw_config, job.tokenizer, str(job.recipe),
                      report, job.source.fingerprint, job.folder, job.dtype)  # fmt: skip
        if out is not None:
            small = _finish(run, small)
    finally:
        if out is None:
            run.discard()
    return small


def finetune(
    model: Model | str | Path,
    data: str | Path,
    *,
    val: str | Path | None = None,
    val_ratio: float = 0.1,
    seqlen: int | None = None,
    epochs: float | None = None,
    seed: int = 0,
    dtype: str = "auto",
    mesh: Any = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Model:
    """Trains a compressed model on examples; the base stays packed.

    Args:
      model: an artifact's folder, or a compressed Model.
      data, val: .jsonl of texts, or of prompts and completions, see `calibration.examples`; without
        `val`, the last `val_ratio` of data's rows are looked at.
      seqlen: longest row in tokens, 512 unless given, or the model's longest context.
      epochs: passes over the rows, 3 unless `updates` are given.
      settings: those of the step: rank, train, lr, batch, updates, ..; see
        `trainings.finetune.finetune`.
      mesh, out, resume, overwrite: as for `compress`.
    Returns:
      The model; `.report` says what was trained.
    Raises:
      InputError: before any training, for whatever of the above cannot be used.
    Example:
      >>> tuned = finetune("small", "task.jsonl", epochs=2, out="small-task")
    """
    reporter = reporter or Silent()
    out = None if out is None else Path(out)
    if out is not None:
        check_run(out, resume=resume, overwrite=overwrite)
    model = model if isinstance(model, Model) else load(model, dtype)
    given = {name: value for name, value in settings.items() if value is not None}
    rows = Rows(data, val, val_ratio, seqlen)
    job = prepare_tuning(model, rows, epochs=epochs, seed=seed, settings=given)
    mesh_name = "one device" if mesh is None else str(dict(mesh.shape))
    run = Run.begin(out, job.fingerprint | {"mesh": mesh_name}, resume=resume, overwrite=overwrite)
    try:
        tuned = run_tuning(job, run, mesh, reporter)
        if out is not None:
            tuned = _finish(run, tuned)
    finally:
        if out is None:
            run.discard()
    return tuned


def save(model: Model, out: str | Path, *, overwrite: bool = False) -> Path:
    """Writes a model as an artifact folder; refuses to replace one unless told to."""
    _check_stored("save", model)
    return save_artifact(model, out, overwrite=overwrite)


def export(
    model: Model | str | Path, out: str | Path, format: str = "hf", **options: Any
) -> Exported:
    """Writes a model as a folder that other tools read.

    Args:
      format: 'hf' (dense, corrections folded in), 'peft' (the adapters), 'gptq',
        'compressed-tensors', 'flax'.
      options: `dtype`, `base_only`, and for some formats `gptq_version`, `base`, `dense`; see
        `io.exports.export.ExportOptions`.
    Returns:
      .folder .format .stored_bytes .notes
    Raises:
      InputError: `out` exists; something that the format cannot say.
    Example:
      >>> export(small, "small-base", "hf", base_only=True)
      >>> export(small, "small-adapter", "peft", base="small-base")
    """
    model = model if isinstance(model, Model) else load(model)
    _check_stored("export", model)
    return export_model(model, out, format, **options)


def verify(out: str | Path, against: Model | str | Path | None = None) -> Verified:
    """Reads an export back, by code that shares nothing with what wrote it, and compares.

    Args:
      against: the model it was written from; the folder that the export names unless given.
    Returns:
      .weight_difference .logit_difference and where they are.
    Raises:
      CheckFailed: files, weights or logits differ.
      InputError: `out` is no export, or names no model and none is given.
    """
    named = read_record(Path(out)).get("model")
    if against is None and named is None:
        raise InputError(f"verify: {out} was exported from memory; give the model (--against)")
    against = named if against is None else against
    return verify_export(out, against if isinstance(against, Model) else load(against))


def _check_stored(verb: str, model: Model) -> None:
    leaves = jax.tree.leaves(model.params, is_leaf=is_compressed)
    if any(
        is_compressed(leaf) and isinstance(leaf.base, (*PREPARED, DenseCopy)) for leaf in leaves
    ):
        raise InputError(
            f"{verb}: the weights are repacked for products, which no file holds; give the model "
            "that `repack` was given"
        )


def _finish(run: Run, model: Model) -> Model:
    """Writes the artifact beside the run, gives it its name, and reads it back."""
    artifact = Path(tempfile.mkdtemp(prefix="artifact-", dir=run.folder))
    artifact.chmod(0o755)
    write_artifact(model, artifact)
    run.finish(artifact)
    return load_artifact(run.out, model.dtype)


def _check_inputs(x: Any, w: jax.Array) -> jax.Array:
    """Returns what a matrix reads, or says why it cannot be that."""
    x = jnp.asarray(x)
    if x.ndim != 2 or x.shape[1] != w.shape[0] or not len(x):
        raise InputError(
            f"quantize: x has shape {list(x.shape)}; [tokens, {w.shape[0]}] was wanted for w "
            f"{list(w.shape)}"
        )
    if not bool(jnp.isfinite(x).all()):
        raise InputError("quantize: x holds NaN or Inf; give finite inputs")
    return x


@lru_cache(maxsize=8)
def _logits(fns: Any):
    return jax.jit(lambda params, tokens: fns.head(params, fns.hidden(params, tokens)[1]))
