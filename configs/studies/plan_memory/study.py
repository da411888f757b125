"""Runs compressions in processes of their own and holds their peak memory against `lqec plan`'s.

    python configs/studies/plan_memory/study.py --model DIR --calib TEXT --out results.json

Besides the model given it makes one of 59 million random parameters, large enough for arrays to
count beside the process. The host peak is the process's resident maximum, of which mapped files are
a part.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from lqec_jax.planning.plan import plan

sys.path.insert(0, str(Path(__file__).parents[3]))
from configs.studies.harness import Study, open_row, table

WIDTH, FF, LAYERS, HEADS, VOCAB, LENGTH = 768, 2048, 8, 12, 4096, 512
RTN, SVD = "rtn(bits=2, group_size=64)", "rtn(bits=2, group_size=64) | svd(rank=16)"
RILQ = "rtn(bits=2, group_size=64) | rilq(rank=16, updates=2, batch=2)"
TRAINED = "rtn(bits=2, group_size=32) | rilq(rank=16, updates=3)"
RANDOM = "59M random"
COLUMNS = (
    ("model", "{name}"),
    ("recipe", "`{recipe}`"),
    ("windows", "{windows} x {seqlen}"),
    ("peak MB", "{peak_mb:.0f}"),
    ("planned", "{planned_peak_mb:.0f}"),
    ("ratio", lambda row: f"{row['planned_peak_mb'] / row['peak_mb']:.2f}"),
    ("file bytes", "{file_bytes}"),
    ("planned", "{planned_file_bytes}"),
)


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


def list_rows(arguments: argparse.Namespace) -> list[dict]:
    rows = [(arguments.model.name, TRAINED, 256, 320), (RANDOM, RTN, LENGTH, 64),
            (RANDOM, SVD, LENGTH, 16), (RANDOM, RILQ, LENGTH, 16)]  # fmt: skip
    names = ("name", "recipe", "seqlen", "windows")
    return [dict(zip(names, row, strict=True)) for row in rows]


def measure(key: dict, arguments: argparse.Namespace, results: dict) -> dict:
    """Compresses once and returns the plan's numbers beside what came."""
    if key["name"] != RANDOM:
        return compress(key, arguments.model, arguments.calib)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "random")
        return compress(key, Path(folder) / "random", Path(folder) / "random" / "tokens.npy")


def compress(key: dict, model: Path, calib: Path) -> dict:
    recipe, seqlen, windows = (key[name] for name in ("recipe", "seqlen", "windows"))
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
        "planned_file_bytes": foretold["file_bytes"],
        "file_bytes": size,
        "planned_peak_mb": foretold["here"]["host_peak_bytes"] / 1e6,
        "peak_mb": report["peak_rss_mb"],
    }


def write_page(results: dict, arguments: argparse.Namespace) -> list[str]:
    made = results | open_row(results["rows"][-1])
    line = (
        f"Peak memory of whole `lqec compress` processes beside `lqec plan`, {made['machine']}, "
        f"CPU, {made['date']}."
    )
    return [line, "", *table(COLUMNS, results["rows"])]


STUDY = Study(
    __doc__, __file__, list_rows, measure, write_page, needs=("model", "calib"),
    options={"--model": {"type": Path}, "--calib": {"type": Path, "help": "text for --model"}},
)  # fmt: skip


if __name__ == "__main__":
    STUDY.run()
