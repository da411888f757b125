"""A tiny Llama checkpoint on disk, its tokens, and a run of it, made anew wherever a test asks."""

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.golden.tiny_weights import make_weights

RAW = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
SEQLEN = 32
# One recipe for every test that trains, so that its update is compiled once.
RTN = "rtn(bits=3, group_size=32)"
RILQ = (
    "rilq(rank=2, updates=40, batch=4, eval_every=10, patience=0, lr=0.001, model_weight=1.0, "
    "token_weight=0.0)"
)


def write_checkpoint(folder: Path, seed: int = 0, **changes) -> Path:
    """Writes config.json and random weights; `changes` are of the config."""
    raw = {**RAW, **changes}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    save_file(make_weights(raw, seed), folder / "model.safetensors")
    return folder


def make_tokens(windows: int, seed: int = 0) -> np.ndarray:
    """Returns a stream of int32 ids that fills so many windows, most of them from half the ids."""
    rng = np.random.RandomState(seed)
    count = windows * SEQLEN
    skewed = np.minimum(rng.randint(0, 64, count), rng.randint(0, 64, count))
    return skewed.astype(np.int32)


def write_tokens(path: Path, windows: int, seed: int = 0) -> Path:
    np.save(path, make_tokens(windows, seed))
    return path


def hash_folder(folder: Path) -> dict[str, str]:
    """Returns the sha256 of every file under a folder, by its relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
