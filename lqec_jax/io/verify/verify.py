"""Checks an export: its files, every weight that they stand for, and the logits these give.

The folder is read by its format's reader in this room, which shares nothing with the writer, and
compared block by block with the model it was written from; three blocks are held dense at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
from lqec_jax.io.verify.distance import bound_kl, measure
from lqec_jax.io.verify.rounding import Rounding, expect, read_rounding
from lqec_jax.models import families
from lqec_jax.models.config import ModelConfig
from lqec_jax.models.model import Model
from lqec_jax.models.parameters import with_constants

TOKENS = (2, 64)  # windows and their length, of ids drawn with seed 0
LOGITS = 1e-4  # of the largest logit: the same weights in another order of sums

Found = dict[str, Callable[[], np.ndarray]]


@dataclass(frozen=True)
class Verified:
    """What a check of an export measured.

    Attributes:
      weights: how many parameters were compared.
      weight_difference, weight_path: the largest difference of a weight, and where it is.
      logit_difference, largest_logit: over `TOKENS` random ids; half of the differences are no
        larger than logit_median, 99 of 100 than logit_99.
      kl: KL(model || export) over these ids, nats a token; and kl_of_rounding, of the model with
        its weights rounded as the export was asked to, computed here.
    """

    folder: Path
    format: str
    weights: int
    weight_difference: float
    weight_path: str
    logit_difference: float
    largest_logit: float
    logit_median: float
    logit_99: float
    kl: float
    kl_of_rounding: float


def verify_export(folder: str | Path, model: Model) -> Verified:
    """Compares an export with the model it was written from.

    Weights must be the model's rounded as the export was asked to, to the bit or to the order of a
    sum, see `rounding`. Logits must agree with those of the rounded weights to 1e-4 of the largest
    one where nothing is rounded; else they may lie as far from them, in KL, as these from the
    model's. Logits are of inputs that no weight rounds; how weights round them is compared apart,
    where the format says it.

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
    comparison = _Comparison(found, read_rounding(folder, record))
    logits = _run_all(model, comparison)
    if comparison.left:
        raise InputError(f"it holds {len(comparison.left)} more: {min(comparison.left)}")
    faults += comparison.faults[:1] + _judge(logits, exact=comparison.rounding.exact)
    apart = measure(logits.model, logits.export)
    measured = Verified(
        folder=folder,
        format=record["format"],
        weights=comparison.count,
        weight_difference=comparison.worst,
        weight_path=comparison.worst_path,
        logit_difference=apart.largest,
        largest_logit=float(np.abs(logits.model).max()),
        logit_median=apart.median,
        logit_99=apart.most_of_them,
        kl=apart.kl,
        kl_of_rounding=measure(logits.model, logits.rounded).kl,
    )
    return measured, faults


class _Logits(NamedTuple):
    """Of the model, of its weights rounded as asked, and of what the export holds."""

    model: np.ndarray
    rounded: np.ndarray
    export: np.ndarray


def _judge(logits: _Logits, *, exact: bool) -> list[str]:
    """Returns what is wrong with the export's logits, in words."""
    largest = float(np.abs(logits.model).max())
    slack = LOGITS * max(1.0, largest)
    apart = measure(logits.rounded, logits.export)
    rounded = measure(logits.model, logits.rounded).kl
    limit = rounded + bound_kl(slack)
    if apart.kl <= limit and (apart.largest <= slack or not exact):
        return []
    return [
        f"logits differ from those of the weights asked for ({apart.in_words}, of at most "
        f"{largest:.3g}); KL {limit:.2g} is what rounding explains"
    ]


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

    def __init__(self, found: Found, rounding: Rounding):
        self.left, self.rounding = set(found), rounding
        self.count, self.worst, self.worst_path = 0, 0.0, ""
        self.faults: list[str] = []
        self._found = found

    def take(self, path: str, want: Any) -> tuple[np.ndarray, np.ndarray]:
        """Reads one weight, compares it, and returns it as it must be and as it was read."""
        if path not in self._found:
            raise InputError(f"{path} is missing")
        self.left.discard(path)
        got = self._found[path]()
        wanted, dense = expect(want, self.rounding), _dense(want)
        if got.shape != dense.shape:
            raise InputError(f"{path} is {list(got.shape)}, not {list(dense.shape)}")
        largest = float(np.abs(got - dense).max())
        self.count += 1
        if not largest <= self.worst:
            self.worst, self.worst_path = largest, path
        wrong = ~((wanted.low <= got) & (got <= wanted.high))
        if wrong.any():
            gap = np.abs(got - wanted.dense)[wrong].max()
            self.faults.append(
                f"{path} differs by {gap:.3g}, of at most {np.abs(dense).max():.3g}, in "
                f"{np.count_nonzero(wrong)} of {wrong.size} numbers"
            )
        return wanted.dense, got


def _dense(want: Any) -> np.ndarray:
    """Returns a parameter as one float32 array."""
    return np.asarray(to_dense(want) if is_compressed(want) else want).astype(np.float32)


def _run_all(model: Model, comparison: _Comparison) -> _Logits:
    """Runs the model, its rounded weights and what was read side by side, and compares weights.

    Where nothing is rounded the first two are one.
    """
    fns, config = replace(model, dtype=jnp.float32).fns, model.config
    family = families.family(config.family)
    exact = comparison.rounding.exact
    outer = {path: get_at(model.params, path) for path in family.outer_tensors(config)}
    rounded, read = _take_all(comparison, outer, "")
    batch, length = TOKENS[0], min(TOKENS[1], config.max_length)
    tokens = np.random.RandomState(0).randint(0, config.vocab_size, (batch, length))
    step, finish = _jitted(fns)
    want, got = fns.embed(model.params, tokens), fns.embed(read, tokens)
    between = want if exact else fns.embed(rounded, tokens)
    paths = family.block_tensors(config)
    for layer, block in enumerate(each_block(model.params)):
        ours = {path: get_at(block, path) for path in paths}
        asked, theirs = (
            with_constants(config, layer, tree)
            for tree in _take_all(comparison, ours, f"blocks/{layer}/")
        )
        want, got = step(block, want), step(theirs, got)
        between = want if exact else step(asked, between)
    ours = {name: tree for name, tree in model.params.items() if name != "blocks"}
    want, got = np.asarray(finish(ours, want)), np.asarray(finish(read, got))
    return _Logits(want, want if exact else np.asarray(finish(rounded, between)), got)


def _take_all(
    comparison: _Comparison, wanted: Mapping[str, Any], prefix: str
) -> tuple[Params, Params]:
    """Compares parameters by path, and returns them as they must be and as they were read."""
    pairs = {path: comparison.take(f"{prefix}{path}", value) for path, value in wanted.items()}
    return tuple(_nest({path: pair[side] for path, pair in pairs.items()}) for side in (0, 1))


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
