"""The verbs as functions: load, compress, score, save; `quantize` for a single matrix."""

import dataclasses
import errno
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lqec_kernels
from lqec_jax.calibration.collect import collect
from lqec_jax.core.arguments import check_tokens
from lqec_jax.core.progress import Reporter, Silent
from lqec_jax.core.tree import equal_trees, stack_blocks
from lqec_jax.core.types import LinearProblem, LinearStats
from lqec_jax.errors import InputError
from lqec_jax.evaluate import perplexity as scores
from lqec_jax.evaluate.card import check_drawn, describe_base, render_pages
from lqec_jax.evaluate.report import build_report
from lqec_jax.io.artifact import artifact
from lqec_jax.io.artifact.digests import check_name
from lqec_jax.io.artifact.leaves import check_stored
from lqec_jax.io.exports.export import Exported, export_model
from lqec_jax.io.exports.record import RECORD, read_record
from lqec_jax.io.lock import one_writer
from lqec_jax.io.sources.flax import load_flax_checkpoint
from lqec_jax.io.sources.source import open_folder, read_source
from lqec_jax.io.sources.tokenizer import find_tokenizer
from lqec_jax.io.verify.artifact import CheckedArtifact, verify_artifact
from lqec_jax.io.verify.verify import Verified, verify_export
from lqec_jax.models.model import Model
from lqec_jax.recipe import Recipe, check_chain, parse_recipe
from lqec_jax.runs.driver import Driver
from lqec_jax.runs.examples import Rows, prepare_tuning, run_tuning
from lqec_jax.runs.folder import Run, check_run
from lqec_jax.runs.job import prepare, resolve_dtype
from lqec_jax.runs.linears import apply_steps, check_inputs
from lqec_jax.runs.making import describe_making
from lqec_jax.runs.text import make_windows
from lqec_kernels.formats import CompressedLinear, Dense


def load(path: str | Path, dtype: str = "auto", check: str = "auto") -> Model:
    """Loads a Hugging Face folder, a hub id, or an artifact; compressed weights stay packed.

    A folder with flax_model.msgpack for weights, as transformers 4 wrote them, is one too.

    Args:
      dtype: of activations: 'float32', 'bfloat16', or 'auto', float32 on a CPU and bfloat16
        elsewhere.
      check: of an artifact's digests: 'full', 'fast' (all but the numbers in the weights), 'none',
        or 'auto', full for 2 GiB and less and fast for more. Names, shapes and whether numbers are
        finite are always looked at.
    Raises:
      InputError: what is there is missing, damaged, not as it was written (by name), or not a model
        this library knows.
    """
    found, compute = open_folder(path), resolve_dtype(dtype)
    if found.kind == "artifact":
        return artifact.load_artifact(found.folder, compute, check)
    check_name(check)
    if found.kind == "flax":
        return load_flax_checkpoint(found.folder, compute)
    source = read_source(found)
    blocks = stack_blocks([source.block(layer) for layer in range(source.config.layers)])
    return Model(
        config=source.config,
        params=jax.tree.map(jnp.asarray, {**source.outer, "blocks": blocks}),
        raw_config=source.raw_config,
        tokenizer=source.tokenizer,
        fingerprint=source.fingerprint,
        folder=source.folder,
        dtype=compute,
    )


def repack(model: Model) -> Model:
    """Puts weights, once, in the form in which this machine multiplies by them fastest.

    The layout that kernels read on a GPU or TPU; on a CPU dense copies of small weights, larger
    ones stay packed. See `lqec_kernels.repack`; what it chose is logged. The result is for
    products, not for disk: save the model that it was made of.

    Example:
      >>> model = repack(load("small"))
    """
    return dataclasses.replace(model, params=lqec_kernels.repack(model.params, dtype=model.dtype))


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
    stats = collect([check_inputs(x, w)], recipe.needs) if recipe.needs else LinearStats()
    problem = LinearProblem(w, stats, jax.random.key(seed))
    return apply_steps("w", recipe.steps, problem, CompressedLinear(Dense(w)))[0]


@one_writer
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
    for line in (job.text_in_words, *run.notes):
        reporter.say(line)
    if run.artifact is not None:
        return _name(run, artifact.load_artifact(run.artifact, job.dtype))
    try:
        driver = Driver(job.source, job.recipe, job.text, run, seed, job.dtype, mesh, reporter)
        params = driver.compress()
        report = build_report(run.state, recipe=str(job.recipe), seed=seed,
                              dtype=np.dtype(job.dtype).name,
                              base=describe_base(job.source.folder))  # fmt: skip
        report |= {"notes": list(job.text.notes)} if job.text.notes else {}
        source, made = job.source, describe_making(job, calib=calib, held_out=eval,
                                                   val_ratio=val_ratio, mesh=mesh)  # fmt: skip
        small = Model(source.config, params, source.raw_config, source.tokenizer, str(job.recipe),
                      report, source.fingerprint, source.folder, job.dtype, made)  # fmt: skip
        if out is not None:
            small = _finish(run, small, reporter)
    finally:
        if out is None:
            run.discard()
    return small


@one_writer
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
    check: str = "auto",
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
      check: of the artifact's digests, as for `load`.
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
    if not isinstance(model, Model):
        model = load(model, dtype, check)
        check_drawn(model.report, model.folder)
    given = {name: value for name, value in settings.items() if value is not None}
    rows = Rows(data, val, val_ratio, seqlen)
    job = prepare_tuning(model, rows, epochs=epochs, seed=seed, settings=given)
    mesh_name = "one device" if mesh is None else str(dict(mesh.shape))
    run = Run.begin(out, job.fingerprint | {"mesh": mesh_name}, resume=resume, overwrite=overwrite)
    for line in run.notes:
        reporter.say(line)
    if run.artifact is not None:
        return _name(run, artifact.load_artifact(run.artifact, job.model.dtype))
    try:
        tuned = run_tuning(job, run, mesh, reporter)
        if out is not None:
            tuned = _finish(run, tuned, reporter)
    finally:
        if out is None:
            run.discard()
    return tuned


@one_writer
def save(model: Model, out: str | Path, *, overwrite: bool = False) -> Path:
    """Writes a model as an artifact folder; refuses to replace one unless told to."""
    check_stored("save", model.params)
    return artifact.save_artifact(model, out, render_pages(model.report), overwrite=overwrite)


@one_writer
def export(
    model: Model | str | Path, out: str | Path, format: str = "hf", *, check: str = "auto",
    **options: Any,
) -> Exported:  # fmt: skip
    """Writes a model as a folder that other tools read.

    Args:
      format: 'hf' (dense, corrections folded in), 'peft' (the adapters), 'gptq',
        'compressed-tensors', 'flax'.
      check: of an artifact's digests, as for `load`.
      options: `dtype` of floating tensors, 'auto' as stored; `base_only` leaves out adapters. For
        'peft' `base`, the exported folder it belongs to; for 'gptq' `gptq_version`, 1 or 2; for
        'flax' `dense`, which unpacks the weights, see `load_flax`.
    Returns:
      .folder .format .stored_bytes .notes
    Raises:
      InputError: `out` exists; something that the format cannot say.
    Example:
      >>> export(small, "small-base", "hf", base_only=True)
      >>> export(small, "small-adapter", "peft", base="small-base")
    """
    model = model if isinstance(model, Model) else load(model, check=check)
    check_stored("export", model.params)
    return export_model(model, out, format, **options)


def verify(
    out: str | Path, against: Model | str | Path | None = None
) -> Verified | CheckedArtifact:
    """Reads an export back, by code that shares nothing with what wrote it, and compares.

    An artifact is compared with its own digests, all of them.

    Args:
      against: the model an export was written from; the folder that it names unless given.
    Returns:
      Of an export .weight_difference .logit_difference and where they are, of an artifact how much
      was compared.
    Raises:
      CheckFailed: files, weights or logits differ.
      InputError: `out` is neither, names no model and none is given, or has no digests.
    """
    if artifact.is_artifact(out) and not (Path(out) / RECORD).is_file():
        if against is not None:
            raise InputError(
                f"verify: {out} is an artifact, compared with its own digests; leave out --against"
            )
        return verify_artifact(out)
    named = read_record(Path(out)).get("model")
    if against is None and named is None:
        raise InputError(f"verify: {out} was exported from memory; give the model (--against)")
    against = named if against is None else against
    return verify_export(out, against if isinstance(against, Model) else load(against))


def _finish(run: Run, model: Model, reporter: Reporter) -> Model:
    """Writes the artifact beside the run, checks that it holds the model, and gives it its name."""
    folder = run.begin_artifact()
    artifact.write_artifact(model, folder, render_pages(model.report, reporter.say))
    # Every byte is compared with memory below: digests of the weights would say no more.
    stored = artifact.load_artifact(folder, model.dtype, "fast")
    if not equal_trees(stored.params, model.params):
        raise OSError(errno.EIO, "what was read back is not what was written", str(folder))
    run.commit_artifact()
    return _name(run, stored)


def _name(run: Run, stored: Model) -> Model:
    """Gives a whole artifact its name."""
    run.finish(run.artifact)
    return dataclasses.replace(stored, folder=run.out, tokenizer=find_tokenizer(run.out))


@lru_cache(maxsize=8)
def _logits(fns: Any):
    return jax.jit(lambda params, tokens: fns.head(params, fns.hidden(params, tokens)[1]))
