"""What `bench.py` times, what of it must be read and reckoned, and its table.

A figure without a run is told as 'not run'.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

GROUP = 64
PEERS = ("bf16 matmul", "in-graph dequantize", "gemlite", "bitsandbytes NF4", "ejkernel")
OURS = "lqec"
IN_SCAN = "lqec, layers of a scan"


class Problem(NamedTuple):
    """One product: x [m, d_in] with a weight of so many bits and an adapter of so high a rank."""

    d_in: int
    d_out: int
    bits: int
    m: int
    rank: int = 0

    @property
    def moved(self) -> int:
        """Returns the bytes of the packed weight, its scales and zeros, the adapter, x and y."""
        weight = self.d_in * self.d_out * self.bits // 8 + self.d_in // GROUP * self.d_out * 4
        return weight + 2 * (self.d_in + self.d_out) * (self.rank + self.m)

    @property
    def flops(self) -> int:
        return 2 * self.m * (self.d_in * self.d_out + self.rank * (self.d_in + self.d_out))


class Plan(NamedTuple):
    """What is timed.

    Attributes:
      shapes: [d_in, d_out] of the weights.
      bits, rows: of decoding; prefill has `tokens` rows, at the least and the most bits.
      rank: of the adapter whose cost is told.
      cache: bytes that a weight must have left when it comes again.
      rounds, repeats: of the loop, and of its runs.
      side: of the arrays and matrices by which the device's rates are measured.
    """

    shapes: tuple
    bits: tuple
    rows: tuple
    tokens: int
    rank: int
    cache: int
    rounds: int
    repeats: int
    side: int

    def problems(self) -> Iterator[Problem]:
        for (d_in, d_out), bits in product(self.shapes, self.bits):
            for m in self.rows:
                yield Problem(d_in, d_out, bits, m)
            yield Problem(d_in, d_out, bits, self.rows[0], self.rank)
            if bits in (self.bits[0], self.bits[-1]):
                yield Problem(d_in, d_out, bits, self.tokens)


PLANS = {
    "full": Plan(
        shapes=((4096, 4096), (4096, 11008), (8192, 28672)), bits=(2, 3, 4), rows=(1, 2, 4, 8, 16),
        tokens=2048, rank=64, cache=4 * 64 * 2**20, rounds=4, repeats=9, side=8192,
    ),
    "small": Plan(
        shapes=((256, 64),), bits=(2, 4), rows=(1, 2), tokens=8, rank=4, cache=2**14, rounds=1,
        repeats=1, side=64,
    ),
}  # fmt: skip


def list_sides(problem: Problem, plan: Plan) -> tuple[str, ...]:
    """Peers have no adapter; layers of a scan are told for one row."""
    if problem.rank:
        return (OURS,)
    return (OURS, IN_SCAN, *PEERS) if problem.m == plan.rows[0] else (OURS, *PEERS)


def write_table(results: dict) -> str:
    """Writes results as Markdown; without a row of it, a figure is 'not run'."""
    plan, ceilings = PLANS[results["plan"]], results["ceilings"]
    taken = {
        (row["side"], *(row[name] for name in Problem._fields)): row["seconds"]
        for row in results["rows"]
    }
    lines = [write_heading(results), ""]
    columns = [OURS, IN_SCAN, *PEERS]
    lines.append(
        "| [d_in, d_out] | bits | rows | rank | floor us | of copy rate | over floor + "
        "launch | over bf16 | " + " | ".join(f"{name} us" for name in columns) + " |"
    )
    lines.append("|" + "---|" * (8 + len(columns)))
    for problem in plan.problems():
        seconds = {name: taken.get((name, *problem)) for name in columns}
        cells = [f"[{problem.d_in}, {problem.d_out}]", problem.bits, problem.m, problem.rank]
        cells += compare_with_ceilings(problem, seconds, ceilings)
        known = list_sides(problem, plan)
        cells += [tell(seconds[name], 1e6) if name in known else "" for name in columns]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", *write_adapter_costs(plan, taken)]
    return "\n".join(lines) + "\n"


def write_heading(results: dict) -> str:
    if not results["device"]:
        return ("Products with packed weights on a GPU: not run, because none was available. The "
                "program beside this file runs them.")  # fmt: skip
    ceilings = results["ceilings"]
    versions = ", ".join(f"{name} {v}" for name, v in results["versions"].items() if v)
    copied = ceilings["copy_bytes_per_second"] / 1e9
    multiplied = ceilings["matmul_flops_per_second"] / 1e12
    return (
        f"Products with packed weights, groups of {results['group_size']} with scales and zeros of "
        f"16 bits, implementation {results['implementation']!r}; {results['device']}, {versions}; "
        f"{results['date']}. Measured ceilings: a copy {copied:.1f} GB/s read and written, a "
        f"bfloat16 product {multiplied:.3f} Tflop/s, an empty launch "
        f"{1e6 * ceilings['launch_seconds']:.2f} us."
    )


def compare_with_ceilings(problem: Problem, seconds: dict, ceilings: dict | None) -> list[str]:
    """Returns floor, share of the copy's rate, time over floor and launch, gain over bfloat16."""
    ours, dense = seconds[OURS], seconds[PEERS[0]]
    if not ceilings:
        return ["not run"] * 4
    by_bytes = problem.moved / ceilings["copy_bytes_per_second"]
    floor = max(by_bytes, problem.flops / ceilings["matmul_flops_per_second"])
    if not ours:
        return [tell(floor, 1e6), "not run", "not run", "not run"]
    launched = floor + ceilings["launch_seconds"]
    gain = f"{dense / ours:.2f}x" if dense else "" if problem.rank else "not run"
    return [tell(floor, 1e6), f"{by_bytes / ours:.0%}", f"{ours / launched:.2f}x", gain]


def write_adapter_costs(plan: Plan, taken: dict) -> list[str]:
    lines = [f"| [d_in, d_out] | bits | an adapter of rank {plan.rank} adds |", "|---|---|---|"]
    for (d_in, d_out), bits in product(plan.shapes, plan.bits):
        problem = Problem(d_in, d_out, bits, plan.rows[0])
        plain = taken.get((OURS, *problem))
        adapted = taken.get((OURS, *problem._replace(rank=plan.rank)))
        cost = f"{adapted / plain - 1:.0%}" if plain and adapted else "not run"
        lines.append(f"| [{d_in}, {d_out}] | {bits} | {cost} |")
    return lines


def tell(seconds: float | None, unit: float) -> str:
    return f"{unit * seconds:.1f}" if seconds else "not run"


NOTHING = {"plan": "full", "device": None, "ceilings": None, "rows": []}
