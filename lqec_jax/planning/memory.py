"""Peak memory of a run, as a sum of parts that each have a name and a reason.

The parts are arrays whose sizes are known; what XLA holds besides is a few coefficients, fitted to
compiled updates (`memory_analysis`) of widths 128 to 4096 and to the resident sizes of whole runs.
On a CPU host and device are one memory, and the host's peak holds both.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from lqec_jax.core.types import Step
from lqec_jax.core.walking import STREAM_TOKENS
from lqec_jax.io.sources.source import keeps_blocks
from lqec_jax.models.config import ModelConfig
from lqec_jax.models.decoder import count_kept, needs_remat
from lqec_jax.planning.sizes import Sizes
from lqec_jax.planning.training import Training, read_training
from lqec_jax.recipe import Recipe
from lqec_jax.train.vocabulary import VOCAB_CHUNK
from lqec_kernels.formats import CompressedLinear, Dense
from lqec_kernels.reference import TILE_ELEMENTS

# Python, JAX and their libraries, and the compiler at work: for a forward pass, and for an update
# besides. Measured on a CPU.
PROCESS, TRAINING = 480 * 10**6, 450 * 10**6
# What a GPU's or TPU's runtime takes of its host besides. Assumed.
RUNTIME = 1500 * 10**6
# Copies of one linear, in float32, while it is quantized: the weight, its groups, codes, error.
COPIES = 5
# A gram, its damped copy and its factor: what a step that asks for one holds of that size.
GRAMS = 3
# Trained numbers held in float32: weights, two moments, the best so far; gradients while an update
# runs, once for the sum and once for a part of the batch.
KEPT, PASSING = 4, 2


@dataclass(frozen=True)
class TextSize:
    """How many windows a run reads, `score` of them to be measured on, of `seqlen` tokens."""

    seqlen: int
    windows: int
    score: int


@dataclass(frozen=True)
class Phase:
    """One phase of a run: its parts in bytes, by name, on the host and on the device."""

    name: str
    host: Mapping[str, int]
    device: Mapping[str, int]


def estimate_phases(
    sizes: Sizes, recipe: Recipe, text: TextSize, *, on_cpu: bool, one_window: bool = False
) -> list[Phase]:
    """Returns every phase with its parts.

    Args:
      one_window: training walks a batch one window at a time, `accumulate` equal to `batch`.
    """
    phases = [_add_host(_stream(sizes, recipe, text, on_cpu), _dense_kept(sizes, recipe))]
    for step in recipe.steps:
        if step.scope == "block":
            training = read_training(step)
            of = _train_on_moments if training.on_moments else _train_block
            phase = of(sizes, step, training, text, on_cpu)
            phases.append(_add_host(phase, _dense_kept(sizes, recipe)))
        if step.scope == "model":
            remat = needs_remat(sizes.config, text.seqlen, recipe.largest_batch)
            phase = _train(sizes, step, text, on_cpu, one=one_window, remat=remat)
            phases.append(_add_host(phase, _dense_kept(sizes, recipe)))
    return phases


def host_peak(phases: list[Phase], *, on_cpu: bool) -> int:
    """Returns the host's peak; on a CPU the device's parts lie in it."""
    held = [sum(p.host.values()) + (sum(p.device.values()) if on_cpu else 0) for p in phases]
    return PROCESS + (0 if on_cpu else RUNTIME) + max(held)


def device_peak(phases: list[Phase]) -> int:
    return max(sum(phase.device.values()) for phase in phases)


def run_bytes(sizes: Sizes, recipe: Recipe, text: TextSize, *, on_cpu: bool) -> int:
    """Returns what OUT.partial holds at most: streams, blocks of every phase, one checkpoint."""
    teacher = 2 * _slot(sizes, text.windows, text, on_cpu)
    walked = text.windows if recipe.reads_student else text.score
    student = 2 * _slot(sizes, walked, text, on_cpu)
    phases = len(recipe.phases)
    blocks = [read_training(step) for step in recipe.steps if step.scope == "block"]
    counts = [_count_trained(sizes, step) for step in recipe.steps if step.scope == "model"]
    trained = 4 * max(counts, default=0)
    answered = any(not training.on_moments for training in blocks)
    answers = _slot(sizes, text.windows, text, on_cpu) if answered else 0
    predictions = text.windows * text.seqlen * max(_scratch(sizes, s) for s in recipe.steps)
    fisher = 0
    if "fisher" in recipe.needs:  # what enters every block, and the result
        inputs = (sizes.config.layers + 1) * _slot(sizes, text.windows, text, on_cpu)
        fisher = inputs + 4 * sizes.weights
    kept = phases * sizes.config.layers * sizes.block + KEPT * trained
    return teacher + student + max(answers, predictions) + fisher + kept


def _dense_kept(sizes: Sizes, recipe: Recipe) -> dict[str, int]:
    """Returns the dense blocks that a run keeps, if it does."""
    if not (recipe.reads_dense_again and keeps_blocks(sizes.dense_block, sizes.config)):
        return {}
    return {"dense blocks, kept for later phases": sizes.config.layers * sizes.dense_block}


def _add_host(phase: Phase, more: Mapping[str, int]) -> Phase:
    return replace(phase, host={**phase.host, **more})


def _stream(sizes: Sizes, recipe: Recipe, text: TextSize, on_cpu: bool) -> Phase:
    width = _compute_bytes(on_cpu)
    tokens = min(STREAM_TOKENS, text.windows * text.seqlen) // text.seqlen * text.seqlen
    host = {
        "embedding, norm and head": sizes.outer,
        "one dense block": sizes.dense_block,
        "the compressed model, as far as it is": sizes.config.layers * sizes.block,
        "both ends of a stream, as mapped files": 2 * _slot(sizes, text.windows, text, on_cpu),
    }
    device = {
        "embedding, norm and head": sizes.outer,
        "one dense block": sizes.dense_block,
        "one compressed block": sizes.block,
        "a linear being quantized": COPIES * 4 * sizes.largest,
        "activations": max(tokens, text.seqlen) * _forward_width(sizes) * width,
    }
    if "fisher" in recipe.needs:
        device["a window's gradients, and their squares"] = 2 * 4 * _block_weights(sizes)
    if "gram" in recipe.needs:
        device["the gram of a linear's inputs, damped and factored"] = GRAMS * 4 * sizes.widest**2
    return Phase(" | ".join(s.name for s in recipe.steps if s.scope != "model"), host, device)


def _train_block(
    sizes: Sizes, step: Step, training: Training, text: TextSize, on_cpu: bool
) -> Phase:
    """Returns what one block takes while a block step trains it, the streams around it included."""
    width = _compute_bytes(on_cpu)
    tokens = training.count_at_once(text.seqlen, _backend(on_cpu)) * text.seqlen
    trained = 4 * sum(_count_trained_of_each(sizes, step))
    host = {
        "compiling an update": TRAINING,
        "embedding, norm and head": sizes.outer,
        "one dense block": sizes.dense_block,
        "the compressed model, as far as it is": sizes.config.layers * sizes.block,
        "both streams and the answers, as mapped files": 3
        * _slot(sizes, text.windows, text, on_cpu),
    }
    device = {
        "embedding, norm and head": sizes.outer,
        "one dense block, and a copy for the update": 2 * sizes.dense_block,
        "what is trained, its moments, the best": KEPT * trained,
        "gradients": PASSING * trained,
        "its weights as they would be stored, and their gradients": 2 * 4 * _block_weights(sizes),
        "activations": tokens * (count_kept(sizes.config) + 3 * sizes.config.d_model) * width,
    }
    return Phase(f"{step.name}, one block", host, device)


def _train_on_moments(
    sizes: Sizes, step: Step, training: Training, text: TextSize, on_cpu: bool
) -> Phase:
    """Returns what a block takes while its weights are trained one after another, on moments."""
    width, trained = _compute_bytes(on_cpu), 4 * max(_count_trained_of_each(sizes, step))
    tokens = max(min(STREAM_TOKENS, text.windows * text.seqlen), text.seqlen)
    host = {
        "compiling an update": TRAINING,
        "embedding, norm and head": sizes.outer,
        "one dense block": sizes.dense_block,
        "the compressed model, as far as it is": sizes.config.layers * sizes.block,
        "both streams, as mapped files": 2 * _slot(sizes, text.windows, text, on_cpu),
    }
    # Of the training windows and of the others, beside two sums of tokens that grow into them.
    moments = max(2 * d_in * (d_in + d_out) for d_in, d_out in sizes.groups) + 4 * sizes.widest**2
    device = {
        "embedding, norm and head": sizes.outer,
        "one dense block": sizes.dense_block,
        "one compressed block": sizes.block,
        "moments of what a group of linears reads": 4 * moments,
        "what is trained of a weight, its moments, the best": KEPT * trained,
        "gradients": PASSING * trained,
        "a weight as it would be stored, what it lacks, and gradients": COPIES * 4 * sizes.largest,
        "activations": 2 * tokens * _forward_width(sizes) * width,
    }
    return Phase(f"{step.name}, one block", host, device)


def _count_trained_of_each(sizes: Sizes, step: Step) -> list[int]:
    """Returns how many numbers a block step trains for each of a block's linears."""
    shapes = ((row["d_in"], row["d_out"]) for row in sizes.rows)
    leaves = (CompressedLinear(Dense(jax.ShapeDtypeStruct(s, jnp.float32))) for s in shapes)
    return [step.count(leaf) for leaf in leaves]


def _train(
    sizes: Sizes, step: Step, text: TextSize, on_cpu: bool, *, one: bool, remat: bool
) -> Phase:
    width, trained = _compute_bytes(on_cpu), 4 * _count_trained(sizes, step)
    training = read_training(step)
    at_once = 1 if one else training.count_at_once(text.seqlen, _backend(on_cpu))
    tokens, config = at_once * text.seqlen, sizes.config
    host = {
        "compiling an update": TRAINING,
        "embedding, norm and head": sizes.outer,
        "the teacher's answers, as a mapped file": _slot(sizes, text.windows, text, on_cpu),
        # Blocks are kept on the host one by one, and come back to be written.
        "the compressed model again, to be read and written": sizes.config.layers * sizes.block,
    }
    device = {
        "the compressed model": sizes.student,
        **update_parts(config, trained, tokens, width, recomputed=remat),
        "tiles of dense weights": tile_bytes(sizes.largest),
    }
    if predictions := training.schedule.batch * text.seqlen * _scratch(sizes, step):
        device["what the teacher predicts of a batch"] = predictions
    return Phase(step.name, host, device)


def update_parts(
    config: ModelConfig, trained: int, tokens: int, width: int, *, recomputed: bool
) -> dict[str, int]:
    """Returns what an update of adapters holds beside the model, in bytes by name.

    Args:
      trained: bytes of the adapters in float32.
      tokens: that walk together.
      width: bytes of an activation.
      recomputed: of a block nothing is kept but its input.
    """
    block, inputs = count_kept(config) * width, config.layers * config.d_model * width
    chunk = min(config.vocab_size, VOCAB_CHUNK)
    head = chunk * config.d_model * 4 if config.vocab_size > VOCAB_CHUNK else 0
    return {
        "adapters, their moments, the best": KEPT * trained,
        "gradients": PASSING * trained,
        "activations": tokens * (inputs + block if recomputed else config.layers * block),
        "logits": tokens * 2 * 4 * chunk + head,
    }


def tile_bytes(largest: int) -> int:
    """Returns what products hold of dense weights, the largest linear having so many numbers."""
    return 3 * 4 * min(largest, TILE_ELEMENTS)


def _scratch(sizes: Sizes, step: Step) -> int:
    """Returns the bytes that a model step keeps of every token's teacher."""
    return step.scratch_bytes(sizes.config.vocab_size) if step.scope == "model" else 0


def _count_trained(sizes: Sizes, step: Step) -> int:
    """Returns how many numbers a model step trains."""
    paths = (row["path"] for row in sizes.rows)
    moved = (leaf for path, leaf in zip(paths, sizes.leaves, strict=True)
             if path not in step.leave_out)  # fmt: skip
    return sizes.config.layers * sum(step.count(leaf) for leaf in moved)


def _slot(sizes: Sizes, windows: int, text: TextSize, on_cpu: bool) -> int:
    """Returns the bytes of one end of a stream."""
    return windows * text.seqlen * sizes.config.d_model * _compute_bytes(on_cpu)


def _block_weights(sizes: Sizes) -> int:
    """Returns how many weights the linears of one block have."""
    return sizes.weights // sizes.config.layers


def _forward_width(sizes: Sizes) -> int:
    """Returns the numbers a block holds of one token at once where nothing is differentiated."""
    return 3 * sizes.config.d_model + 3 * sizes.config.d_ff


def _backend(on_cpu: bool) -> str:
    return "cpu" if on_cpu else "gpu"


def _compute_bytes(on_cpu: bool) -> int:
    return 4 if on_cpu else 2
