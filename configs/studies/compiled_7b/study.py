"""A 7-billion-parameter Llama's programs, compiled for accelerators that are not here.

    python configs/studies/compiled_7b/study.py --target h200     # needs [cuda12] and [triton]
    python configs/studies/compiled_7b/study.py --target v5e      # needs [tpu]
    python configs/studies/compiled_7b/study.py --table

XLA compiles for a described device without one, so what a program holds and moves is known before
it has run. Nothing is timed: seconds are in other tables, or not run.

2 bits in groups of 64 with integer zeros, rank 64, 32 layers in one scan, bfloat16. Decode is one
token after 256 for 1 or 16 sequences, prefill reads 2048 tokens, an update of RILQ takes 8 windows
of 1024 tokens over a mesh of data x model devices, adapters and Adam's moments in float32. MB are
those of one device: arguments (weights, caches, optimizer), and what XLA holds beside them.
"Words written" are packed words that a step of the loop over layers copies before it reads them,
in MB a layer: 0 where kernels read the stack in place. Launches are kernels, fusions and copies of
one layer. Without a device XLA cannot time its choices for large products, so those may differ.
"""

import argparse
import collections
import math
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))
from configs.studies.compiled_7b import targets
from configs.studies.harness import Study, quote, table

KERNEL = {"h200": "triton", "v5e": "pallas"}
CONTEXT, PROMPT, WINDOWS, TOKENS = 256, 2048, 8, 1024
MESHES = [(1, 1), (4, 1), (2, 2), (1, 4)]
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Arrays of fewer packed words are no weights.
LEAST_WORDS = 2**16
COLUMNS = (
    ("target", "{target}"),
    ("jax", "{jax}"),
    ("date", "{date}"),
    ("program", "{program}"),
    ("sequences", lambda row: str(row["sequences"] or 1)),
    ("products", "{implementation}"),
    ("mesh", lambda row: "x".join(map(str, row["mesh"]))),
    ("arguments, MB", "{arguments_mb:.0f}"),
    ("held beside, MB", "{temporary_mb:.0f}"),
    ("words written, MB", "{words_written_mb:.1f}"),
    ("launches a layer", "{launches_a_layer}"),
    ("collectives", lambda row: write_counts(row["collectives"]) or "-"),
)


def list_programs(target: str) -> list[dict]:
    kernel = KERNEL[target]
    programs = [
        {"program": "decode", "implementation": name, "sequences": count, "mesh": (1, 1)}
        for count in (1, 16)
        for name in (kernel, "xla")
    ]
    programs += [
        {"program": "prefill", "implementation": name, "sequences": 0, "mesh": (1, 1)}
        for name in (kernel, "xla")
    ]
    return programs + [
        {"program": "rilq update", "implementation": "xla", "sequences": WINDOWS, "mesh": mesh}
        for mesh in MESHES
    ]


def list_rows(arguments: argparse.Namespace) -> list[dict]:
    targets.aim(arguments.target)
    import jax  # noqa: F401  it is told of its platform before it is imported

    targets.pretend(arguments.target)
    facts = {"target": arguments.target, "layers": arguments.layers}
    return [facts | program for program in list_programs(arguments.target)]


def compile_program(program: dict, arguments: argparse.Namespace, results: dict) -> dict:
    from configs.studies.compiled_7b.programs import make_mesh, trace_generation, trace_update

    target, layers = program["target"], program["layers"]
    data, model = program["mesh"]
    mesh = make_mesh(targets.describe(target, 4 if data * model > 1 else 1), data, model)
    started = time.perf_counter()
    if program["program"] == "rilq update":
        traced = trace_update(mesh, layers, WINDOWS, TOKENS)
    else:
        length = PROMPT if program["program"] == "prefill" else CONTEXT
        sequences = program["sequences"]
        traced = trace_generation(mesh, layers, sequences, length, program["implementation"])
    platform = {"gpu": "cuda"}.get(targets.PLATFORMS[target], targets.PLATFORMS[target])
    compiled = traced.lower(lowering_platforms=(platform,)).compile()
    seconds = time.perf_counter() - started
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return {
        "arguments_mb": memory.argument_size_in_bytes / 1e6,
        "temporary_mb": memory.temp_size_in_bytes / 1e6,
        "compile_seconds": seconds,
        **read_program(text),
    }


def read_program(text: str) -> dict:
    """Reads optimized HLO: what the largest loop body launches and copies, and all collectives."""
    # An instruction inside a fusion is no launch and writes nothing.
    computations = {
        head: body
        for head, body in split_computations(text).items()
        if "fused" not in head and "fusion" not in head
    }
    kinds = r" (fusion|custom-call|copy|dynamic-slice|dot|convolution)\("
    launched = {head: re.findall(kinds, body) for head, body in computations.items()}
    loop = max((h for h in launched if "ENTRY" not in h), key=lambda h: len(launched[h]))
    written = 0
    for line in computations[loop].splitlines():
        if re.search(r" (fusion|copy|dynamic-slice)\(", line):
            result = line.partition("=")[2].partition(" fusion(")[0].partition(" copy(")[0]
            sizes = [
                math.prod(map(int, s.split(","))) for s in re.findall(r"[us]32\[([\d,]+)\]", result)
            ]
            written += 4 * sum(size for size in sizes if size >= LEAST_WORDS)
    found = re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text)
    return {
        "launches_a_layer": len(launched[loop]),
        "words_written_mb": written / 1e6,
        "collectives": dict(collections.Counter(found)),
    }


def split_computations(text: str) -> dict[str, str]:
    """Returns the computations of an HLO module by their first lines."""
    parts = re.split(r"\n(?=%|ENTRY)", text)
    return {part.partition("\n")[0][:120]: part for part in parts[1:]}


def write_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def write_page(results: dict, arguments: argparse.Namespace) -> list[str]:
    return [*quote(__doc__, 2, 3), *table(COLUMNS, results["rows"])]


STUDY = Study(
    __doc__, __file__, list_rows, compile_program, write_page, needs=("target",),
    options={"--target": {"choices": targets.PLATFORMS},
             "--layers": {"type": int, "default": 32}},
)  # fmt: skip


if __name__ == "__main__":
    STUDY.run()
