"""How the Triton kernels are cut, apart from their code: what was measured, else a rule.

`choose` looks into the user's cache, which `autotune` fills; then into the table of the package,
measured by its authors; then asks the rule, which knows sizes only.
"""

import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax

TABLE = Path(__file__).with_name("triton_configs.json")
UNIT = 256
# Programs that the rule wants: four for each multiprocessor of a large GPU, which has room for as
# many at once. Each loads two turns ahead, so that is enough; the few of a second wave would run
# alone, and every split of the inputs is a float32 result to write and to sum.
PROGRAMS = 512
# Seconds of timing that are enough for one configuration, and the fewest runs.
ENOUGH, FEWEST = 0.05, 5

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """How one product is cut; all but `splits` are powers of two.

    Attributes:
      block_m: rows of x in a program, at least 8.
      block_n: columns of the weight in a program.
      splits: into how many parts the inputs are split; 1 for 'tiles', which splits none.
      num_warps, num_stages: of Triton's programs and of their pipelines of loads.
    """

    block_m: int
    block_n: int
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 3


class Problem(NamedTuple):
    """What a configuration is chosen for.

    Attributes:
      kind: 'rows' or 'tiles', a kernel of `triton_source`.
      m: rows of x as the kernel sees them.
      d_in, d_out, bits: of the weight.
      device: its kind as jax names it, for example 'NVIDIA H200'.
    """

    kind: str
    m: int
    d_in: int
    d_out: int
    bits: int
    device: str

    @property
    def key(self) -> str:
        """Names problems that share a configuration: rows up to the same power of two do."""
        rows = _power_of_two(self.m)
        return f"{self.kind} {rows}x{self.d_in}x{self.d_out} {self.bits} bits"


def choose(problem: Problem, folder: Path | None = None) -> Config:
    """Chooses a configuration: the user's measured one, the package's, or the rule's.

    Args:
      problem: kind, sizes and device.
      folder: of the user's cache; None is `cache_folder()`.
    """
    for known in (_read(cache_file(problem.device, folder)), _read_table().get(problem.device, {})):
        if problem.key in known:
            return Config(**known[problem.key])
    return choose_by_rule(problem)


def choose_by_rule(problem: Problem) -> Config:
    """Chooses by sizes alone.

    'rows': two warps take 128 columns and all rows, and inputs are split into so many parts that
    there are about 512 programs. It is 64 columns where a program had too little room for more: at
    8 bits, and with more than 16 rows, whose sums four warps make. Fewer rows are never given four:
    Triton then takes other instructions of the matrix units, which want x in shared memory, and
    puts it there once more. 'tiles': 128 columns and up to 128 rows, on 8 warps, with two stages of
    loads: three are more shared memory than there is.
    """
    units = -(-problem.d_in // UNIT)
    if problem.kind == "rows":
        rows = max(8, _power_of_two(problem.m))
        columns = 128 if rows <= 16 and problem.bits < 8 else 64
        splits = max(1, round(PROGRAMS / -(-problem.d_out // columns)))
        return Config(rows, columns, min(units, splits), num_warps=2 if rows <= 16 else 4)
    rows = min(128, max(16, _power_of_two(problem.m)))
    return Config(rows, 128, num_warps=8 if rows == 128 else 4, num_stages=2)


def list_candidates(problem: Problem) -> list[Config]:
    """Lists what `autotune` tries: the rule's choice and what lies around it."""
    rule = choose_by_rule(problem)
    if problem.kind == "rows":
        units = -(-problem.d_in // UNIT)
        splits = sorted({1, *(min(units, max(1, rule.splits * n // 2)) for n in (1, 2, 4))})
        few, many = [(32, 1), (64, 1), (64, 2), (128, 2), (256, 2)], [(64, 4), (128, 4), (128, 8)]
        sizes = few if rule.block_m <= 16 else many
        found = [Config(rule.block_m, n, s, w, t) for n, w in sizes for s in splits for t in (2, 4)]
    else:
        rows = sorted({32, 64, rule.block_m})
        sizes = [(64, 4), (128, 4), (128, 8), (256, 8)]
        found = [Config(m, n, 1, w, t) for m in rows for n, w in sizes for t in (2, 3)]
    return [rule, *(config for config in found if config != rule)]


def autotune(
    problem: Problem,
    make_run: Callable[[Config], Callable[[], Any]],
    *,
    candidates: Iterable[Config] | None = None,
    measure: Callable[[Callable[[], Any]], float] | None = None,
    folder: Path | None = None,
) -> Config:
    """Times configurations and remembers the fastest in the user's cache.

    Args:
      problem: what is timed.
      make_run: configuration -> a function that makes the product once.
      candidates: None lists them by `list_candidates`.
      measure: function -> seconds; None is `measure_seconds`.
      folder: of the cache.
    Returns:
      The fastest; `choose` returns it from now on.
    Raises:
      RuntimeError: none could run; names the last reason.
    """
    measure = measure or measure_seconds
    taken, reason = {}, "there were no candidates"
    for config in list_candidates(problem) if candidates is None else candidates:
        try:
            taken[config] = measure(make_run(config))
        # What a device has too little of, registers or shared memory, comes under many names.
        except Exception as error:
            reason = str(error).partition("\n")[0]
            _log.info("%s: %s cannot run: %s", problem.key, config, reason)
    if not taken:
        raise RuntimeError(f"no configuration runs for {problem.key}: {reason}")
    best = min(taken, key=taken.get)
    _log.info("%s: %s takes %.1f us", problem.key, best, 1e6 * taken[best])
    _remember(problem, best, folder)
    return best


def measure_seconds(run: Callable[[], Any]) -> float:
    """Times a function by the median of its runs, after one that compiles."""
    jax.block_until_ready(run())
    seconds: list[float] = []
    while len(seconds) < FEWEST or sum(seconds) < ENOUGH:
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def cache_folder() -> Path:
    """Returns where the user's measured configurations lie."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lqec_jax"


def cache_file(device: str, folder: Path | None = None) -> Path:
    """Returns the file for a device and the versions here; others have files of their own."""
    try:
        compiler = version("triton")
    except PackageNotFoundError:
        compiler = "none"
    name = "".join(c if c.isalnum() else "-" for c in device)
    parts = f"triton-{name}-jax{jax.__version__}-triton{compiler}.json"
    return (cache_folder() if folder is None else folder) / parts


def _remember(problem: Problem, config: Config, folder: Path | None) -> None:
    """Adds a configuration to the cache; a reader sees the file before or after, never between."""
    path = cache_file(problem.device, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = _read(path) | {problem.key: asdict(config)}
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    with os.fdopen(handle, "w") as file:
        json.dump(known, file, indent=1)
    os.replace(name, path)


def _read(path: Path) -> dict[str, dict]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        _log.warning("%s is no JSON; it is taken as empty, and replaced when next tuned", path)
        return {}


@cache
def _read_table() -> dict[str, dict]:
    return json.loads(TABLE.read_text())


def _power_of_two(number: int) -> int:
    return 1 << (max(number, 1) - 1).bit_length()
