"""The plan of a compression: sizes exact, peaks and time estimated, and which machines hold it."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import jax

from lqec_jax.core.arguments import check_choice, check_int
from lqec_jax.errors import InputError
from lqec_jax.planning.accounting import account
from lqec_jax.planning.machines import MACHINES, Machine
from lqec_jax.planning.memory import TextSize, device_peak, estimate_phases, host_peak, run_bytes
from lqec_jax.planning.sizes import Sizes, measure_model
from lqec_jax.planning.training import Training, read_training
from lqec_jax.recipe import Recipe, parse_recipe

# Of a machine's peak arithmetic that a run is assumed to reach, and of its memory that it may hold.
EFFICIENCY, USABLE = 0.35, 0.92
SHORTEST = 64  # tokens; a window shorter than that teaches little
# Papers whose accounting a plan can add.
PAPERS = ("int2.1",)


def plan(
    model: str,
    recipe: str | Recipe,
    *,
    seqlen: int = 512,
    windows: int = 320,
    val_ratio: float = 0.2,
    paper: str | None = None,
) -> dict[str, Any]:
    """Says what `compress` with these arguments will take; reads config.json and file headers.

    Args:
      model: a folder, with or without weights in it, or a hub id.
      seqlen, windows, val_ratio: as for `compress`.
      paper: 'int2.1' adds that paper's accounting of the model, as `int21`.
    Returns:
      Exact: `bits_per_weight, stored_bytes` (linears), `file_bytes` (the artifact's safetensors),
      `kept_bytes, dense_bytes, linears`. Estimated: `here` (this backend's peaks by phase and
      part), `run_bytes` (OUT.partial) and `machines`, each with peaks, seconds, `fits` and the
      smallest `change` that would make it fit.
    Raises:
      InputError: as `compress` for the recipe and the model; a length or a count below its least; a
        paper without an accounting.
    Example:
      >>> plan("models/babyllama", "rtn(bits=2, group_size=32) | rilq(rank=16)")["file_bytes"]
      745928
    """
    recipe = parse_recipe(recipe)
    check_int("plan", "windows", windows, 1)
    if paper is not None:
        check_choice("plan", "paper", paper, PAPERS)
    sizes = measure_model(model, recipe)
    check_int("plan", "seqlen", seqlen, 2, sizes.config.max_length)
    if not 0 < val_ratio < 1:
        raise InputError(f"plan: val_ratio={val_ratio!r}; a fraction between 0 and 1 was wanted")
    text = TextSize(seqlen, windows, max(1, round(windows * val_ratio)))
    on_cpu = jax.default_backend() == "cpu"
    phases = estimate_phases(sizes, recipe, text, on_cpu=on_cpu)
    facts = {
        "model": str(model),
        "recipe": str(recipe),
        "text": asdict(text),
        "bits_per_weight": sizes.bits_per_weight,
        "stored_bytes": sizes.linears,
        "file_bytes": sizes.files,
        "dense_bytes": sizes.config.layers * _linear_bytes(sizes),
        "kept_bytes": sizes.dense - sizes.config.layers * _linear_bytes(sizes),
        "linears": list(sizes.rows),
        "here": {
            "backend": jax.default_backend(),
            "phases": [asdict(phase) for phase in phases],
            "host_peak_bytes": host_peak(phases, on_cpu=on_cpu),
            "device_peak_bytes": None if on_cpu else device_peak(phases),
        },
        "run_bytes": run_bytes(sizes, recipe, text, on_cpu=on_cpu),
        "machines": [_judge(machine, sizes, recipe, text) for machine in MACHINES],
    }
    return facts if paper is None else facts | {"int21": account(sizes.config)}


def _linear_bytes(sizes: Sizes) -> int:
    """Returns the bytes of one block's linears as they are stored, dense."""
    return sizes.weights // sizes.config.layers * sizes.stored_dtype.itemsize


def _judge(machine: Machine, sizes: Sizes, recipe: Recipe, text: TextSize) -> dict[str, Any]:
    """Says whether a machine holds the run, and what is the smallest change that makes it."""
    host, device = _peaks(sizes, recipe, text, one_window=False)
    fits = _holds(machine, host, device)
    change = None if fits else _find_change(machine, sizes, recipe, text)
    return {
        "name": machine.name,
        "host_bytes": machine.host,
        "device_bytes": machine.device,
        "host_peak_bytes": host,
        "device_peak_bytes": device,
        "seconds": count_flops(sizes, recipe, text) / (EFFICIENCY * machine.flops),
        "fits": fits,
        "change": change,
    }


def _peaks(sizes: Sizes, recipe: Recipe, text: TextSize, *, one_window: bool) -> tuple[int, int]:
    phases = estimate_phases(sizes, recipe, text, on_cpu=False, one_window=one_window)
    return host_peak(phases, on_cpu=False), device_peak(phases)


def _holds(machine: Machine, host: int, device: int) -> bool:
    return host <= USABLE * machine.host and device <= USABLE * machine.device


def _find_change(machine: Machine, sizes: Sizes, recipe: Recipe, text: TextSize) -> str:
    for words, smaller, one_window in _changes(recipe, text):
        if _holds(machine, *_peaks(sizes, recipe, smaller, one_window=one_window)):
            return words
    return "none that was tried: the model itself is too large for it"


def _changes(recipe: Recipe, text: TextSize) -> Iterator[tuple[str, TextSize, bool]]:
    """Yields ever larger changes: of how a batch is walked, then of length, then of the text."""
    trains = [step for step in recipe.steps if step.scope == "model"]
    walk = [f"{step.name}(accumulate={read_training(step).schedule.batch})" for step in trains]
    if walk:
        yield ", ".join(walk), text, True
    length = text.seqlen
    while (length := length // 2) >= SHORTEST:
        yield ", ".join([*walk, f"seqlen={length}"]), replace(text, seqlen=length), True
    count, shortest = text.windows, min(text.seqlen, SHORTEST)
    while (count := count // 2) >= 16:
        words = ", ".join([*walk, f"seqlen={shortest}", f"windows={count}"])
        yield words, TextSize(shortest, count, max(1, count * text.score // text.windows)), True


def count_flops(sizes: Sizes, recipe: Recipe, text: TextSize) -> float:
    """Counts the multiplications and additions of a run's forward and backward passes.

    2 a weight and token forward; as much again for the inputs' gradient, and where blocks are
    recomputed; adapters cost little beside that. Quantizing itself is not counted. Without another
    text to score, the validation windows are those that stages are measured on.
    """
    config = sizes.config
    forward = 2 * (sizes.weights + config.vocab_size * config.d_model)
    tokens = text.windows * text.seqlen
    walked = tokens + (tokens if recipe.reads_student else text.score * text.seqlen)
    total = forward * walked
    if "fisher" in recipe.needs:
        total += 3 * forward * (tokens - text.score * text.seqlen)
    for step in recipe.steps:
        if step.scope == "block":
            total += _count_block_flops(sizes, read_training(step), text)
        if step.scope == "model":
            training, train = read_training(step), text.windows - text.score
            walks = 3 * training.count_windows(train) + training.count_looks(train) * text.score
            total += forward * text.seqlen * walks
    return float(total)


def _count_block_flops(sizes: Sizes, training: Training, text: TextSize) -> int:
    """Counts what training every block takes beside the passes around it."""
    tokens = text.windows * text.seqlen
    if training.on_moments:
        return sizes.config.layers * _count_moments(sizes, training.schedule.updates, tokens)
    train = text.windows - text.score
    seen, looks = training.count_windows(train), training.count_looks(train)
    # Of every window's first pass: the teacher's block in both streams.
    passes = 2 * tokens + 3 * seen * text.seqlen + looks * text.score * text.seqlen
    return 2 * sizes.weights * passes


def _count_moments(sizes: Sizes, updates: int, tokens: int) -> int:
    """Counts the training of a block's weights on moments of their inputs.

    A walk of both streams as far as each group's inputs, two products of inputs with inputs and two
    with weights; then two products of a gram with a weight an update, the loss and its gradient.
    """
    total = walked = 0
    for d_in, d_out in sizes.groups:
        total += tokens * (2 * 2 * walked + 4 * d_in * d_in + 4 * d_in * d_out)
        total += updates * 4 * d_in * d_in * d_out
        walked += d_in * d_out
    return total
