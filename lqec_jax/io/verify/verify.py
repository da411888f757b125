"""Checks an export: its files, every weight that they stand for, and the logits these give.

The folder is read by its format's reader in this room, which shares nothing with the writer, and
compared block by block with the model it was written from; two blocks are held dense at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from lqec_jax.core.tree import (
    drop_corrections,
    drop_input_grids,
    each_block,
    get_at,
    is_compressed,
    set_at,
)
from lqec_jax.core.types import ModelFns, Params
from lqec_jax.errors import CheckFailed, InputError
from lqec_jax.io.artifact.leaves import flatten
from lqec_jax.io.exports.record import find_files, hash_base, read_record
from lqec_jax.io.exports.table import FORMATS
from lqec_jax.io.exports.walk import to_dense
from lqec_jax.io.files import read_json
from lqec_jax.models import families
from lqec_jax.models.config import ModelConfig
from lqec_jax.models.model import Model
from lqec_jax.models.parameters import with_constants

TOKENS = (2, 64)  # windows and their length, of ids drawn with seed 0
# Of a weight's size: sums of float32 in another order; both factors of a product rounded.
EXACT = 1e-6
TINY = 1e-7  # what float16 rounds to zero
# Of the largest logit: the same weights in another order of sums; rounded weights, by their dtype.
LOGITS = 1e-4
LOGIT_ROUNDINGS = 16

Found = dict[str, Callable[[], np.ndarray]]


@dataclass(frozen=True)
class Verified:
    """What a check of an export measured.

    Attributes:
      weights: how many parameters were compared.
      weight_difference, weight_path: the largest difference of a weight, and where it is.
      logit_difference, largest_logit: over `TOKENS` random ids.
    """

    folder: Path
    format: str
    weights: int
    weight_difference: float
    weight_path: str
    logit_difference: float
    largest_logit: float


def verify_export(folder: str | Path, model: Model) -> Verified:
    """Compares an export with the model it was written from.

    Weights must agree to the rounding of the export's dtype, elementwise; logits to 1e-4 of the
    largest one, or to 16 roundings of a narrower dtype. Logits are of inputs that no weight rounds;
    how weights round them is compared apart, where the format says it.

    Raises:
      CheckFailed: files, weights or logits differ; names which and by how much.
      InputError: the folder is no export.
    """
    folder = Path(folder)
    record = read_record(folder)
    faults = find_files(record, folder)
    try:
        verified, more = _compare(folder, record, model)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        # A damaged file may look like anything; from a whole one only our own errors are expected.
        if not faults and not isinstance(error, InputError):
            raise
        raise _failure(folder, [*faults, f"it cannot be read back ({error})"]) from error
    if faults + more:
        raise _failure(folder, [*faults, *more])
    return verified


def _failure(folder: Path, faults: list[str]) -> CheckFailed:
    return CheckFailed(f"{folder}: {'; '.join(faults)}; export it again")


def _compare(folder: Path, record: Mapping[str, Any], model: Model) -> tuple[Verified, list[str]]:
    """Returns what was measured and what is wrong about it."""
    if record["base_sha256"] != hash_base(model.params):
        raise InputError("it was exported from another model than the one it is compared with")
    if record.get("base_only"):
        model = replace(model, params=drop_corrections(model.params))
    row = FORMATS[record["format"]]
    faults = []
    if "inputs" in row.holds and not record.get("exact_inputs"):
        faults += _compare_inputs(import_module(row.reader).read_inputs(folder), model)
    # What is read are matrices: both sides run with inputs as they come.
    model = replace(model, params=drop_input_grids(model.params))
    if "base" in row.holds:
        _check_config(folder, model.config)
    found = open_weights(folder, record, model)
    rounding = _rounding(record)
    comparison = _Comparison(found, rounding)
    logits = _run_both(model, comparison)
    if comparison.left:
        raise InputError(f"it holds {len(comparison.left)} more: {min(comparison.left)}")
    want, got = logits
    largest = float(np.abs(want).max())
    difference = float(np.abs(want - got).max())
    limit = max(LOGITS, LOGIT_ROUNDINGS * rounding) * max(1.0, largest)
    faults += comparison.faults[:1]
    if not difference <= limit:
        faults.append(f"logits differ by {difference:.3g}, of at most {largest:.3g}")
    measured = Verified(folder, record["format"], comparison.count, comparison.worst,
                        comparison.worst_path, difference, largest)  # fmt: skip
    return measured, faults


def _compare_inputs(found: Mapping[str, Mapping[str, Any]], model: Model) -> list[str]:
    """Returns the first weight that rounds what it reads otherwise than the model's, in words."""
    wanted = {
        path: asdict(weight.input_grid)
        for path, weight in _each_weight(model)
        if is_compressed(weight) and weight.input_grid is not None
    }
    other = (p for p in sorted({*found, *wanted}) if found.get(p) != wanted.get(p))
    return [
        f"{path} rounds its inputs by {found.get(path)}, not {wanted.get(path)}"
        for path in list(other)[:1]
    ]


class _Comparison:
    """Takes weights one by one and keeps the worst."""

    def __init__(self, found: Found, rounding: float):
        self.left = set(found)
        self.count, self.worst, self.worst_path = 0, 0.0, ""
        self.faults: list[str] = []
        self._found, self._rounding = found, rounding

    def take(self, path: str, want: Any) -> np.ndarray:
        """Reads one weight, compares it, and returns what was read."""
        if path not in self._found:
            raise InputError(f"{path} is missing")
        self.left.discard(path)
        got = self._found[path]()
        dense, size = _dense_and_size(want)
        if got.shape != dense.shape:
            raise InputError(f"{path} is {list(got.shape)}, not {list(dense.shape)}")
        gap = np.abs(got - dense)
        largest = float(gap.max())
        self.count += 1
        if not largest <= self.worst:
            self.worst, self.worst_path = largest, path
        if not (gap <= max(EXACT, 2 * self._rounding) * size + TINY).all():
            self.faults.append(f"{path} differs by {largest:.3g}, of at most {size.max():.3g}")
        return got


def _dense_and_size(want: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns a weight as one float32 array, and the sizes of the sums it was made of."""
    if not is_compressed(want):
        dense = np.asarray(want).astype(np.float32)
        return dense, np.abs(dense)
    size = np.abs(np.asarray(to_dense(replace(want, corrections=()))))
    for correction in want.corrections:
        size = size + np.asarray(_size(correction))
    return np.asarray(to_dense(want)), size


@jax.jit
def _size(correction: Any) -> jax.Array:
    factors = correction.factors()
    return jax.tree.map(jnp.abs, correction if factors is None else factors).dense()


def _run_both(model: Model, comparison: _Comparison) -> tuple[np.ndarray, np.ndarray]:
    """Runs the model and what was read side by side, comparing each weight on the way."""
    fns, config = replace(model, dtype=jnp.float32).fns, model.config
    family = families.family(config.family)
    outer = {path: get_at(model.params, path) for path in family.outer_tensors(config)}
    read = _nest({path: comparison.take(path, value) for path, value in outer.items()})
    batch, length = TOKENS[0], min(TOKENS[1], config.max_length)
    tokens = np.random.RandomState(0).randint(0, config.vocab_size, (batch, length))
    step, finish = _jitted(fns)
    want, got = fns.embed(model.params, tokens), fns.embed(read, tokens)
    paths = family.block_tensors(config)
    for layer, block in enumerate(each_block(model.params)):
        theirs = {p: comparison.take(f"blocks/{layer}/{p}", get_at(block, p)) for p in paths}
        want, got = step(block, want), step(with_constants(config, layer, _nest(theirs)), got)
    ours = {name: tree for name, tree in model.params.items() if name != "blocks"}
    return np.asarray(finish(ours, want)), np.asarray(finish(read, got))


@lru_cache(maxsize=8)
def _jitted(fns: ModelFns) -> tuple[Callable, Callable]:
    """Returns (block, h) -> h and (outer params, h) -> logits."""
    step = jax.jit(lambda block, h: fns.block(block, h)[0])
    return step, jax.jit(lambda params, h: fns.head(params, fns.norm(params, h)))


def open_weights(folder: Path, record: Mapping[str, Any], model: Model) -> Found:
    """Returns what reads each parameter of an export, by our path and in our orientation."""
    row = FORMATS[record["format"]]
    found = import_module(row.reader).read(folder, record)
    if row.names == "ours":
        constants = flatten(with_constants(model.config, 0, {}))[0]
        return {
            p: t for p, t in found.items() if p.split("/", 2)[-1].replace("/", ".") not in constants
        }
    places = _places(model.config)
    strange = sorted(set(found) - set(places))
    if strange:
        raise InputError(f"it holds {len(strange)} tensors of no weight: {strange[0]}")
    named = {places[name][0]: partial(_turn, t, places[name][1]) for name, t in found.items()}
    if "base" in row.holds:
        return named
    base = _open_base(record, model)
    return base | {path: partial(_add, base[path], thunk) for path, thunk in named.items()}


def _open_base(record: Mapping[str, Any], model: Model) -> Found:
    """Returns what adapters are added to: the folder they name, or else the model's own base."""
    if record.get("base") is not None:
        folder = Path(record["base"])
        inner = read_record(folder)
        if inner["base_sha256"] != record["base_sha256"]:
            raise InputError(f"its base {folder} was exported from another model")
        return open_weights(folder, inner, model)
    bare = replace(model, params=drop_corrections(model.params))
    return {path: partial(_dense, weight) for path, weight in _each_weight(bare)}


def _each_weight(model: Model) -> Iterator[tuple[str, Any]]:
    """Yields each parameter of a model by its path, blocks one by one."""
    family = families.family(model.config.family)
    for path in family.outer_tensors(model.config):
        yield path, get_at(model.params, path)
    for layer, block in enumerate(each_block(model.params)):
        for path in family.block_tensors(model.config):
            yield f"blocks/{layer}/{path}", get_at(block, path)


def _places(config: ModelConfig) -> dict[str, tuple[str, bool]]:
    """Returns stored name -> our path, and whether it is stored transposed."""
    family = families.family(config.family)
    places = {s.name: (path, s.transposed) for path, s in family.outer_tensors(config).items()}
    for path, stored in family.block_tensors(config).items():
        for layer in range(config.layers):
            name = stored.name.format(layer=layer)
            places[name] = (f"blocks/{layer}/{path}", stored.transposed)
    return places


def _turn(thunk: Callable[[], np.ndarray], transposed: bool) -> np.ndarray:
    return thunk().T if transposed else thunk()


def _add(base: Callable[[], np.ndarray], delta: Callable[[], np.ndarray]) -> np.ndarray:
    return base() + delta()


def _dense(weight: Any) -> np.ndarray:
    return _dense_and_size(weight)[0]


def _nest(flat: Mapping[str, np.ndarray]) -> Params:
    tree: Params = {}
    for path, array in flat.items():
        tree = set_at(tree, path, array)
    return tree


def _check_config(folder: Path, wanted: ModelConfig) -> None:
    raw = read_json(folder / "config.json")
    raw.pop("quantization_config", None)
    if families.read_config(raw) != wanted:
        raise InputError("its config.json describes another model")


def _rounding(record: Mapping[str, Any]) -> float:
    """Returns the largest relative error of an export's dtype, its base's included."""
    narrow = record["dtype"] in ("bfloat16", "float16")
    own = float(ml_dtypes.finfo(record["dtype"]).eps) / 2 if narrow else 0.0
    base = record.get("base")
    return own if base is None else max(own, _rounding(read_record(Path(base))))
