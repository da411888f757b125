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
import json
import math
import re
import time
from datetime import date
from pathlib import Path

import targets

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results.json", HERE / "results.md"
KERNEL = {"h200": "triton", "v5e": "pallas"}
CONTEXT, PROMPT, WINDOWS, TOKENS = 256, 2048, 8, 1024
MESHES = [(1, 1), (4, 1), (2, 2), (1, 4)]
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Arrays of fewer packed words are no weights.
LEAST_WORDS = 2**16


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


def compile_program(target: str, program: dict, layers: int) -> dict:
    from programs import make_mesh, trace_generation, trace_update

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


def write_table() -> None:
    """Writes results.md from results.json."""
    lines = [" ".join(__doc__.split("\n\n")[n].split()) + "\n" for n in (2, 3)]
    lines += [
        "| target | jax | date | program | sequences | products | mesh | arguments, MB | held "
        "beside, MB | words written, MB | launches a layer | collectives |",
        "|---|" + "---|" * 11,
    ]
    for row in json.loads(RESULTS.read_text()):
        collectives = ", ".join(f"{n} {name}" for name, n in sorted(row["collectives"].items()))
        mesh = "x".join(map(str, row["mesh"]))
        lines.append(
            f"| {row['target']} | {row['jax']} | {row['date']} | {row['program']} "
            f"| {row['sequences'] or 1} | {row['implementation']} | {mesh} "
            f"| {row['arguments_mb']:.0f} | {row['temporary_mb']:.0f} "
            f"| {row['words_written_mb']:.1f} | {row['launches_a_layer']} | {collectives or '-'} |"
        )
    TABLE.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=targets.PLATFORMS)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        return write_table()
    target = arguments.target
    targets.aim(target)
    import jax

    targets.pretend(target)
    facts = {"target": target, "jax": jax.__version__, "date": str(date.today()),
             "layers": arguments.layers}  # fmt: skip
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = [row for row in rows if row["target"] != target]
    for program in list_programs(target):
        rows.append(facts | program | compile_program(target, program, arguments.layers))
        print(json.dumps(rows[-1]), flush=True)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
