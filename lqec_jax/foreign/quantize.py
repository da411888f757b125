"""`quantize_tree`: the linear steps of a recipe on the weights of somebody else's Flax model."""

import sys
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.calibration.collect import collect
from lqec_jax.core.arguments import check_all
from lqec_jax.core.types import LinearProblem, LinearStats
from lqec_jax.errors import InputError, did_you_mean
from lqec_jax.foreign import axes as kernel_axes
from lqec_jax.foreign import linen
from lqec_jax.foreign.kernel import PackedKernel, box, to_matrix
from lqec_jax.recipe import Recipe, check_chain, parse_recipe
from lqec_jax.runs.linears import apply_steps, preview_leaf
from lqec_kernels.formats import CompressedLinear, Dense

VECTORS = ("bias", "scale")  # of one layer, whatever the rank; nobody misses them
SMALLEST = 4096  # weights; less is not worth a scale, and a default should not touch it
Select = str | Sequence[str] | Callable[[str, Any], bool] | None


class Quantized(NamedTuple):
    """What `quantize_tree` returns: the tree or module, and what was done to it."""

    params: Any
    report: dict[str, Any]


def quantize_tree(
    params: Any,
    recipe: str | Recipe,
    select: Select = None,
    *,
    axes: Mapping[str, str] | None = None,
    inputs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Quantized:
    """Compresses the weights of any Flax model, which then works unchanged.

    Kernels are replaced by packed ones that read as the dense array: in linen by boxes that Flax
    opens itself, in NNX by an `nnx.Param` of their own kind. What a kernel is made of stays
    differentiable, so `partition(params)` separates the adapters for a training loop of yours.
    Products inside `packed()`, and those of an NNX module's linear layers anywhere, make no dense
    copy.

    Args:
      params: of linen: nested dicts, or variables with a 'params' collection; or an `nnx.Module`
        or `nnx.State`. Not changed; a module is copied.
      recipe: linear steps only.
      select: which weights, as a glob of paths ('*/mlp/*'), several of them, or
        (path, array) -> bool. Every `kernel` of at least 4,096 weights unless given: an output head
        too.
      axes: what the axes of kernels of rank 3 and more are, glob of paths -> one letter an axis: l
        for stacked layers, i for inputs, o for outputs, {'*/query/kernel': 'ioo'}. Without it the
        shape of the bias, Flax's names and the norms of a scanned block say it, or the kernel is
        left as it is and listed.
      inputs: path -> what that weight reads, [..., *inputs], after the layers' axes if it is a
        stack; for steps that use statistics.
    Returns:
      (.params, .report), the report with `recipe, seed, bits_per_weight` over what was compressed,
      `linears` (one entry a matrix, `path[3]` in a stack) and `skipped`, path and reason of every
      other matrix.
    Raises:
      InputError: a recipe with a model step; steps that need inputs, and there are none; a weight
        that a step refuses, or that is not finite; a selection without weights.
    Cost: the recipe's, one matrix at a time.
    Example:
      >>> params, report = lqec.quantize_tree(params, "rtn(bits=4, group_size=32) | svd(rank=8)")
      >>> y = model.apply({"params": params}, x)
      >>> train, frozen = lqec.partition(params, "adapters")
    """
    recipe = _check_recipe(parse_recipe(recipe))
    told = kernel_axes.check_told(axes or {})
    weights, put = _open(params)
    shapes = {path: tuple(w.shape) for path, w in weights.items()}
    chosen, skipped = _choose(weights, select)
    plan, unread = _read(chosen, shapes, told)
    skipped |= unread
    if not plan:
        path, reason = next(iter({**unread, **skipped}.items()))
        raise InputError(f"quantize_tree: nothing to compress; {path} is left: {reason}")
    inputs = _check_inputs(recipe, plan, shapes, inputs or {})
    _check_weights(recipe, plan, weights)
    check_chain(recipe)
    kernels, linears = {}, []
    for number, (path, letters) in enumerate(plan.items()):
        key = jax.random.fold_in(jax.random.key(seed), number)
        kernels[path], entries = _compress(
            recipe, path, weights[path], letters, inputs.get(path), key
        )
        linears += entries
    return Quantized(put(kernels), _report(recipe, seed, linears, skipped))


def _check_recipe(recipe: Recipe) -> Recipe:
    whole = [step.name for step in recipe.steps if step.scope != "linear"]
    if whole:
        raise InputError(
            f"quantize_tree: {whole[0]} needs a whole model of known parts; give linear steps, and "
            "train the adapters of lqec.partition(params) in a loop of your own"
        )
    return recipe


def _open(params: Any) -> tuple[dict[str, Any], Callable]:
    """Returns path -> array or PackedKernel, and a function that puts others in their place."""
    weights, put = _opener(params)(params)
    kinds = (jax.Array, np.ndarray, PackedKernel)
    weights = {path: w for path, w in weights.items() if isinstance(w, kinds)}
    if not weights:
        raise InputError(
            f"quantize_tree: a {type(params).__name__} without arrays at any path; the params of a "
            "linen model, an nnx.Module or an nnx.State was wanted"
        )
    if any(isinstance(w, jax.core.Tracer) for w in weights.values()):
        raise InputError("quantize_tree: params are traced; call it outside of jit and grad")
    return weights, put


def _opener(params: Any) -> Callable:
    # NNX does not import beside every jax that linen works with, and who has not imported it has no
    # module of it.
    if "flax.nnx" in sys.modules:
        from lqec_jax.foreign import nnx

        if nnx.is_nnx(params):
            return nnx.open_module
    return linen.open_params


# ---- which weights


def _choose(weights: Mapping[str, Any], select: Select) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the chosen weights, and why every other matrix is left."""
    refuse = _refusal(select)
    chosen, skipped = {}, {}
    for path, w in weights.items():
        reason = refuse(path, w)
        if reason is None:
            reason = _unfit(w)
            chosen |= {} if reason else {path: w}
        elif len(w.shape) < 2 or path.rpartition("/")[2] in VECTORS:
            continue
        if reason:
            skipped[path] = reason
    if not chosen and not skipped:
        raise InputError(f"quantize_tree: there is no matrix among {', '.join(list(weights)[:3])}")
    return chosen, skipped


def _refusal(select: Select) -> Callable[[str, Any], str | None]:
    """Returns (path, array) -> why the selection leaves it, None if it does not."""
    if select is None:
        return _refuse_by_default
    if callable(select):
        return lambda path, w: None if bool(select(path, w)) else "select returned False"
    globs = [select] if isinstance(select, str) else select
    if not (isinstance(globs, list | tuple) and globs and all(isinstance(g, str) for g in globs)):
        raise InputError(
            f"quantize_tree: select={select!r}; a glob such as '*/mlp/*', a list of them, or a "
            "function (path, array) -> bool was wanted"
        )
    match = f"matches no glob of select={', '.join(map(repr, globs))}"
    return lambda path, w: None if any(fnmatchcase(path, g) for g in globs) else match


def _refuse_by_default(path: str, w: Any) -> str | None:
    if path.rpartition("/")[2] != "kernel":
        return "not named 'kernel'; select= can name it"
    size = int(np.prod(w.shape))
    return None if size >= SMALLEST else f"{size} weights, fewer than {SMALLEST}"


def _unfit(w: Any) -> str | None:
    if isinstance(w, PackedKernel):
        return "compressed already"
    if not jnp.issubdtype(w.dtype, jnp.floating):
        return f"{w.dtype} numbers are no weights"
    return None if len(w.shape) >= 2 else f"{list(w.shape)} is no matrix"


def _read(
    chosen: Mapping[str, Any], shapes: Mapping[str, tuple], told: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Returns path -> axes of what can be compressed, and path -> reason of what cannot."""
    unused = [g for g in told if not any(fnmatchcase(path, g) for path in chosen)]
    if unused:
        raise InputError(f"quantize_tree: axes={{{unused[0]!r}: ...}} matches no chosen weight")
    plan, unread = {}, {}
    for path in chosen:
        letters = kernel_axes.read_axes(path, shapes, told)
        if letters:
            plan[path] = letters
        else:
            unread[path] = (
                f"which axes of {list(shapes[path])} are inputs is not plain; tell it, for example "
                f"axes={{{path!r}: 'l{'i' * (len(shapes[path]) - 2)}o'}}"
            )
    return plan, unread


# ---- compressing


def _check_inputs(
    recipe: Recipe, plan: Mapping[str, str], shapes: Mapping[str, tuple], inputs: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Returns path -> float32 [layers, tokens, d_in], or says what is missing or does not fit."""
    unknown = [path for path in inputs if path not in plan]
    if unknown:
        raise InputError(
            f"quantize_tree: inputs of {unknown[0]!r}, which is no chosen weight"
            f"{did_you_mean(unknown[0], plan)}"
        )
    missing = [path for path in plan if path not in inputs]
    if recipe.needs and missing:
        raise InputError(
            f"quantize_tree: {recipe} reads the inputs' {', '.join(sorted(recipe.needs))}; give "
            f"inputs={{{missing[0]!r}: x, ...}}"
        )
    return {
        path: _flatten_inputs(path, jnp.asarray(x), shapes[path], plan[path])
        for path, x in inputs.items()
    }


def _flatten_inputs(path: str, x: jax.Array, shape: tuple, letters: str) -> jax.Array:
    stack, sizes, _ = kernel_axes.split_shape(shape, letters)
    good = x.shape[: len(stack)] == stack and x.shape[x.ndim - len(sizes) :] == sizes
    if not good or x.ndim <= len(stack) + len(sizes) or not x.size:
        wanted = ", ".join(map(str, (*stack, "tokens", *sizes)))
        raise InputError(
            f"quantize_tree: inputs of {path!r} are {list(x.shape)}; [{wanted}] was wanted"
        )
    if not _is_finite(x):
        raise InputError(f"quantize_tree: inputs of {path!r} hold NaN or Inf; give finite ones")
    layers, d_in, _ = kernel_axes.count_weights(shape, letters)
    return x.astype(jnp.float32).reshape(layers, -1, d_in)  # [layers, tokens, d_in]


def _check_weights(recipe: Recipe, plan: Mapping[str, str], weights: Mapping[str, Any]) -> None:
    """Refuses weights before anything is computed: on shapes alone, but for finiteness."""
    shapes = {
        path: kernel_axes.count_weights(weights[path].shape, letters)[1:]
        for path, letters in plan.items()
    }
    try:
        check_all(lambda path: preview_leaf(recipe, *shapes[path]), shapes)
    except InputError as error:
        raise InputError(f"{error}; select= can leave weights out") from error
    for path in plan:
        if not _is_finite(weights[path]):
            raise InputError(f"quantize_tree: {path} holds NaN or Inf; give finite weights")


@jax.jit
def _is_finite(array: Any) -> jax.Array:
    return jnp.isfinite(array).all()


def _compress(
    recipe: Recipe, path: str, w: Any, letters: str, x: jax.Array | None, key: jax.Array
) -> tuple[PackedKernel, list[dict]]:
    """Compresses a kernel, a stack layer by layer, so that one dense layer is held at a time."""
    leaves, entries = [], []
    stack = kernel_axes.split_shape(w.shape, letters)[0]
    for layer, index in enumerate(np.ndindex(*stack)):
        name = f"{path}[{','.join(map(str, index))}]" if stack else path
        matrix = to_matrix(w[index], letters[len(stack) :])
        stats = collect([x[layer]], recipe.needs) if recipe.needs else LinearStats()
        problem = LinearProblem(matrix, stats, jax.random.fold_in(key, layer))
        tokens = x.shape[1] if recipe.needs else None
        start = CompressedLinear(Dense(matrix))
        leaf, entry = apply_steps(name, recipe.steps, problem, start, tokens)
        leaves.append(leaf)
        entries.append(entry)
    return box(leaves, w, letters), entries


def _report(
    recipe: Recipe, seed: int, linears: list[dict], skipped: Mapping[str, str]
) -> dict[str, Any]:
    weights = [entry["d_in"] * entry["d_out"] for entry in linears]
    bits = sum(entry["bits_per_weight"] * n for entry, n in zip(linears, weights, strict=True))
    return {
        "recipe": str(recipe),
        "seed": seed,
        "bits_per_weight": bits / sum(weights),
        "linears": linears,
        "skipped": [{"path": path, "reason": reason} for path, reason in skipped.items()],
    }
