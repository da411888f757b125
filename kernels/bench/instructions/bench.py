"""Counts the instructions of the Triton kernel for few rows, as assembled for an H200; no GPU.

    python kernels/bench/instructions/bench.py                            results.json, some minutes
    python kernels/bench/instructions/bench.py --table                    results.md from it

A count, no time: what runs is never measured here. `multiply_rows` is compiled for compute
capability 9.0, cut as `tuning.choose_by_rule` cuts it, and disassembled. Counted is one turn of its
main loop, the longest backward branch around matrix instructions, divided by the weights of a turn
that fall to a lane. Where a program makes only one turn there is no loop, and the whole program is
counted, addresses and stores included.

What a count is compared with are its maker's figures of an H200, not measured here: 132
multiprocessors that each issue 4 instructions of 32 lanes a cycle at 1.98 GHz, and logic, shifts
and sums of integers at half that rate; a matrix unit takes 4 cycles for a 16 x 8 x 16 product at
the rate of Hopper's own instructions, of which `mma.sync`, counted here, reaches less. A copy is
taken to move 4.2 TB/s. "Issue", "matrix" and "integer" say at how many times that rate of bytes,
words and scales and offsets counted, the slots or units would be full: below 1 the kernel cannot
keep up with memory, and it wants to stay well above.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from lqec_kernels.triton_matmul import cut_groups
from lqec_kernels.tuning import Config, Problem, choose_by_rule

HERE = Path(__file__).parent
SHAPES = [(8192, 28672), (4096, 4096)]
GROUP, UNIT, LANES = 64, 256, 32
# Offsets: none, numbers as scales are, whole numbers.
OFFSETS = {"none": 0, "fp16": 16, "u8": 8}

SLOTS_PER_SECOND = 132 * 4 * 1.98e9
MATRIX_CYCLES, INTEGER_CYCLES = 4, 2
COPY_BYTES_PER_SECOND = 4.2e12
REGISTERS, SHARED_BYTES, SHARED_RESERVED = 65536, 227 * 1024, 1024  # of a multiprocessor

# What the unit makes that takes two cycles an instruction; products of integers are made elsewhere.
HALF_RATE = r"LOP3|SHF|PRMT|IADD3|VIADD.*|VIMNMX|IMNMX|LEA|SEL|ISETP|POPC|BMSK|IABS"
CLASSES = {
    "tensor": r"HMMA|HGMMA|WARPGROUP",
    "integer": rf"{HALF_RATE}|IMAD",
    "float": r"FFMA|FADD|FMUL|HFMA2|HADD2|HMUL2|I2F|I2FP|F2F|F2FP|FSEL|FSETP",
    "load": r"LD.*|ST.*|DEPBAR|UBLKCP|UTMA.*",
}


class Case(NamedTuple):
    """One kernel that is counted."""

    d_in: int
    d_out: int
    bits: int
    rows: int
    offsets: str
    kind: str

    @property
    def config(self) -> Config:
        return choose_by_rule(Problem("rows", self.rows, self.d_in, self.d_out, self.bits, "any"))

    @property
    def bits_of_a_weight(self) -> float:
        return self.bits + (16 + OFFSETS[self.offsets]) / GROUP


def list_cases() -> list[Case]:
    large, small = SHAPES
    cases = [Case(*large, *rest, "bf16") for rest in product((2, 3, 4), (1, 8, 16), OFFSETS)]
    cases += [Case(*large, bits, 1, "fp16", "fp16") for bits in (2, 3, 4)]
    return cases + [Case(*small, bits, rows, "fp16", "bf16") for bits in (2, 4) for rows in (1, 16)]


# What the compiler makes


def compile_rows(case: Case) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lqec_kernels.triton_source import multiply_rows

    names, config = multiply_rows.arg_names, case.config
    size, subs, spread = cut_groups(case.bits, GROUP)
    constants = {
        "ROWS_X": case.rows, "D_IN": case.d_in, "D_OUT": case.d_out, "RANK": 0, "BITS": case.bits,
        "GROUP": GROUP, "SYMMETRIC": case.offsets == "none", "STACKED": False, "SIZE": size,
        "SUBS": subs, "SPREAD": spread, "UNITS": -(-case.d_in // UNIT // config.splits),
        "BLOCK_N": config.block_n, "BLOCK_M": config.block_m, "BLOCK_R": 16,
        "STAGES": config.num_stages, "PTX": True,
    }  # fmt: skip
    offsets = "fp16" if case.offsets == "none" else case.offsets
    types = {"low": "u32", "high": "u32", "scales": "fp16", "offsets": offsets, "layer": "i32",
             "y": "fp32", "down": "fp32"}  # fmt: skip
    arrays = [name for name in names if name not in constants]
    signature = {
        name: "*" + types.get(name, case.kind) if name in arrays else "constexpr" for name in names
    }
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in arrays}
    source = ASTSource(multiply_rows, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, LANES), options=options)


def disassemble(cubin: bytes) -> tuple[str, int, int]:
    """Returns the instructions, registers of a thread, and its bytes of stack, where spills lie."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    run = partial(subprocess.run, capture_output=True, text=True, check=True)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = run([tools / "nvdisasm", "-c", file.name]).stdout
        used = run([tools / "cuobjdump", "-res-usage", file.name]).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", used).groups()
    return text, int(registers), int(stack)


# Counting


def find_turn(text: str) -> tuple[list[str], bool]:
    """Returns the instructions of the main loop's turn, or all and False where none is."""
    lines, labels, turn = [], {}, []
    for line in map(str.strip, text.splitlines()):
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"/\*[0-9a-f]+\*/\s+(.*?);", line):
            lines.append(instruction[1].strip())
    for last, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*?`\((\.L_\w+)\)", line)
        body = lines[labels[branch[1]] : last + 1] if branch else []
        if len(body) > len(turn) and any("MMA" in one for one in body):
            turn = body
    return (turn, True) if turn else (lines, False)


def count_codes(instructions: list[str]) -> Counter:
    """Counts by operation, without its predicate and width; moves by IMAD are told apart."""
    codes = Counter()
    for line in instructions:
        code = re.sub(r"^@!?U?P\w+\s+", "", line).split()[0]
        codes["IMAD.MOV" if code.startswith("IMAD.MOV") else code.partition(".")[0]] += 1
    return codes


def classify(codes: Counter, weights: float) -> dict[str, float]:
    """Returns instructions a weight by class; what belongs to none is 'other'."""
    shares = {
        name: sum(n for code, n in codes.items() if re.fullmatch(pattern, code)) / weights
        for name, pattern in CLASSES.items()
    }
    return shares | {"other": codes.total() / weights - sum(shares.values())}


def count(case: Case) -> dict[str, Any]:
    kernel, config = compile_rows(case), case.config
    text, registers, stack = disassemble(kernel.asm["cubin"])
    turn, loops = find_turn(text)
    codes = count_codes(turn)
    threads = config.num_warps * LANES
    weights = config.block_n * UNIT / threads
    integer = sum(n for code, n in codes.items() if re.fullmatch(HALF_RATE, code))
    slots = {"issue": codes.total(), "matrix": MATRIX_CYCLES * codes["HMMA"],
             "integer": INTEGER_CYCLES * integer}  # fmt: skip
    bytes_per_weight = case.bits_of_a_weight / 8

    def share(cycles: float) -> float:
        """Returns how many times a copy's rate so many cycles a turn and lane allow."""
        weights_per_second = SLOTS_PER_SECOND * LANES * weights / cycles
        return weights_per_second * bytes_per_weight / COPY_BYTES_PER_SECOND

    shared = kernel.metadata.shared
    resident = min(
        REGISTERS // (-(-registers // 8) * 8 * threads), SHARED_BYTES // (shared + SHARED_RESERVED)
    )
    ahead = min(config.num_stages - 1, -(-case.d_in // UNIT // config.splits))
    return {
        **case._asdict(), "block_n": config.block_n, "num_warps": config.num_warps,
        "splits": config.splits, "counted": "turn" if loops else "program",
        "a_weight": codes.total() / weights, "classes": classify(codes, weights),
        "registers": registers, "stack_bytes": stack,
        "spills": codes["LDL"] + codes["STL"], "shared_bytes": shared,
        "programs_a_multiprocessor": resident,
        "bytes_in_flight": int(resident * ahead * config.block_n * UNIT * bytes_per_weight),
        "of_copy_rate": {name: share(cycles) for name, cycles in slots.items()},
        "codes": dict(codes.most_common()),
    }  # fmt: skip


# The table


def write_table(results: dict) -> str:
    head = ["[d_in, d_out]", "x", "bits", "rows", "offsets", "counted", "instructions a weight",
            *CLASSES, "other", "registers", "spills", "programs", "KB in flight", "issue", "matrix",
            "integer"]  # fmt: skip
    lines = [
        f"Instructions of a lane for a weight, as Triton {results['triton']} makes them for "
        f"compute capability 9.0, {results['date']}; nothing was run. Groups of {GROUP}, float16 "
        "scales. Registers of a thread; spills in a turn; programs that a multiprocessor has room "
        "for, and what all of them have asked of memory at once. Last: how many times the rate of "
        "a copy each would allow; see the program beside this file.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in results["rows"]:
        cells = [
            f"[{row['d_in']}, {row['d_out']}]", row["kind"], row["bits"], row["rows"],
            row["offsets"], row["counted"], f"{row['a_weight']:.2f}",
            *(f"{n:.2f}" for n in row["classes"].values()), row["registers"], row["spills"],
            row["programs_a_multiprocessor"], f"{row['bytes_in_flight'] / 1024:.0f}",
            *(f"{n:.1f}" for n in row["of_copy_rate"].values()),
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    parser.add_argument("--table", action="store_true", help="results.md from what was counted")
    options = parser.parse_args(arguments)
    if options.table:
        table = write_table(json.loads(options.out.read_text()))
        options.out.with_suffix(".md").write_text(table)
        return
    import triton

    rows = [count(case) for case in list_cases()]
    results = {"date": date.today().isoformat(), "triton": triton.__version__, "rows": rows}
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
