"""Runs compressions in processes of their own and holds their peak memory against `lqec plan`'s.

    python configs/studies/plan_memory/study.py --model DIR --calib TEXT --out results.json

Besides the model given it makes one of 59 million random parameters, large enough for arrays to
count beside the process. Writes JSON and a table. The host peak is the process's resident maximum,
of which mapped files are a part.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from lqec_jax.planning.plan import plan

WIDTH, FF, LAYERS, HEADS, VOCAB, LENGTH = 768, 2048, 8, 12, 4096, 512
RTN, SVD = "rtn(bits=2, group_size=64)", "rtn(bits=2, group_size=64) | svd(rank=16)"
RILQ = "rtn(bits=2, group_size=64) | rilq(rank=16, updates=2, batch=2)"


def make_model(folder: Path) -> None:
    """Writes a Llama of random weights."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5)

    one, square = np.ones(WIDTH, np.float32), (WIDTH, WIDTH)
    tensors = {"model.embed_tokens.weight": draw(VOCAB, WIDTH), "model.norm.weight": one,
               "lm_head.weight": draw(VOCAB, WIDTH)}  # fmt: skip
    shapes = {f"self_attn.{name}_proj": square for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (FF, WIDTH), "mlp.up_proj": (FF, WIDTH),
               "mlp.down_proj": (WIDTH, FF)}  # fmt: skip
    for layer in range(LAYERS):
        place = f"model.layers.{layer}"
        tensors |= {f"{place}.{name}.weight": draw(*shape) for name, shape in shapes.items()}
        tensors |= {f"{place}.{n}_layernorm.weight": one for n in ("input", "post_attention")}
    config = {
        "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": FF,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "vocab_size": VOCAB, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    np.save(folder / "tokens.npy", rng.integers(0, VOCAB, 64 * LENGTH, np.int32))


def measure(name: str, model: Path, recipe: str, calib: Path, seqlen: int, windows: int) -> dict:
    """Compresses once and returns the plan's numbers beside what came."""
    foretold = plan(str(model), recipe, seqlen=seqlen, windows=windows)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "lqec_jax", "compress", str(model), str(out), "--recipe",
                   recipe, "--calib", str(calib), "--seqlen", str(seqlen), "--windows",
                   str(windows), "--quiet"]  # fmt: skip
        subprocess.run(command, check=True)
        report = json.loads((out / "report.json").read_text())
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return {
        "name": name,
        "recipe": recipe,
        "seqlen": seqlen,
        "windows": windows,
        "planned_file_bytes": foretold["file_bytes"],
        "file_bytes": size,
        "planned_peak_mb": foretold["here"]["host_peak_bytes"] / 1e6,
        "peak_mb": report["peak_rss_mb"],
    }


def write_table(results: dict, path: Path) -> None:
    lines = [
        f"Peak memory of whole `lqec compress` processes beside `lqec plan`, {results['machine']}, "
        f"CPU, {results['date']}.",
        "",
        "| model | recipe | windows | peak MB | planned | ratio | file bytes | planned |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        recipe = row["recipe"].replace("|", "\\|")
        lines.append(
            f"| {row['name']} | `{recipe}` | {row['windows']} x {row['seqlen']} "
            f"| {row['peak_mb']:.0f} | {row['planned_peak_mb']:.0f} "
            f"| {row['planned_peak_mb'] / row['peak_mb']:.2f} | {row['file_bytes']} "
            f"| {row['planned_file_bytes']} |"
        )
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calib", type=Path, required=True, help="text for --model")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} processors"
    results = {"machine": machine, "date": date.today().isoformat(), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        random = Path(folder) / "random"
        make_model(random)
        text, small = random / "tokens.npy", arguments.model
        trained = "rtn(bits=2, group_size=32) | rilq(rank=16, updates=3)"
        for row in (
            (small.name, small, trained, arguments.calib, 256, 320),
            ("59M random", random, RTN, text, LENGTH, 64),
            ("59M random", random, SVD, text, LENGTH, 16),
            ("59M random", random, RILQ, text, LENGTH, 16),
        ):
            results["rows"].append(measure(*row))
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
            write_table(results, arguments.out.with_suffix(".md"))


if __name__ == "__main__":
    main()
