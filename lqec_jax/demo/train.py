"""Trains the embedded model: `python -m lqec_jax.demo.train --out DIR`.

A Llama of 1.2 million parameters and a byte-level BPE of its own, on the text of `corpus`. Muon
(Jordan et al. 2024; optax.contrib.muon) on the matrices of the blocks and Adam on the rest.
"""

import argparse
import dataclasses
import json
import platform
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import tokenizers
from optax.contrib import MuonDimensionNumbers, muon
from safetensors.numpy import save_file

from lqec_jax.api import load, perplexity
from lqec_jax.calibration.data import cut_windows
from lqec_jax.core.progress import Reporter
from lqec_jax.core.tree import get_at, unstack_blocks
from lqec_jax.core.types import Params
from lqec_jax.demo.corpus import Corpus, Document, read_corpus
from lqec_jax.evaluate.report import describe_environment
from lqec_jax.io.artifact.artifact import check_free
from lqec_jax.models import families
from lqec_jax.models.config import ModelConfig
from lqec_jax.models.decoder import init_params, model_fns
from lqec_jax.runs.text import read_windows
from lqec_jax.train.update import count_parts, init_state, make_update
from lqec_jax.train.vocabulary import next_token_nll

LOOK = 16  # held-out windows in the curve
BETWEEN = "<|endoftext|>"  # before every document: the begin of one and the end of another
CONFIG = ModelConfig(family="llama", vocab_size=1024, d_model=128, d_ff=384, layers=5, heads=4,
                     kv_heads=4, head_dim=32, max_length=256, tied_head=True)  # fmt: skip

CARD = """---
license: apache-2.0
library_name: lqec_jax
pipeline_tag: text-generation
language: en
---

# The demo model of lqec_jax

A Llama of {parameters} parameters in bfloat16 that writes what looks like Python documentation. It
is there to be compressed: it knows nothing and should answer nobody.

Trained by `python -m lqec_jax.demo.train` on the pydoc topics and the docstrings of Python
{python}'s standard library, in {minutes:.0f} processor minutes. Perplexity on `heldout.jsonl`,
documents that it was not trained on: {ppl:.3f}. `training.json` has the rest.

`calib.jsonl` is a part of the text it was trained on. Both texts are excerpts of CPython's
documentation, Copyright (c) 2001 Python Software Foundation, under the PSF License Agreement:
https://docs.python.org/3/license.html
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the model is trained; windows are as long as its context."""

    config: ModelConfig = CONFIG
    updates: int = 1800
    batch: int = 8
    lr: float = 6e-3
    least_lr: float = 0.05  # of lr, at the end of the cosine
    warmup: float = 0.05  # of the updates
    weight_decay: float = 0.1
    look_every: int = 50
    seed: int = 0


def train(out: Path, settings: Settings, corpus: Corpus, reporter: Reporter) -> dict[str, Any]:
    """Trains a tokenizer and a model and writes both, with two texts and a record of it all.

    Args:
      out: a Hugging Face folder to make; may not exist.
    Returns:
      What training.json holds.
    Raises:
      InputError: `out` exists or cannot be written.
    """
    check_free(out, overwrite=False)
    started = time.perf_counter()
    out.mkdir(parents=True)
    tokenizer = train_tokenizer(corpus.train, settings.config.vocab_size)
    write_tokenizer(tokenizer, out)
    write_text(corpus.calibrate, out / "calib.jsonl")
    write_text(corpus.held_out, out / "heldout.jsonl")
    texts = (encode(tokenizer, corpus.train), encode(tokenizer, corpus.held_out))
    params, curve = train_model(*texts, settings, reporter)
    write_model(params, settings.config, tokenizer.token_to_id(BETWEEN), out)
    record = {
        "corpus_sha256": corpus.sha256,
        "documents": {part: len(documents) for part, documents in corpus._asdict().items()},
        "python": platform.python_version(),
        "settings": dataclasses.asdict(settings),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "curve": curve,
        "held_out": score(out),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time(),  # of all cores; what the machine also did is not in it
        "environment": describe_environment(),
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    write_card(record, out)
    return record


def train_tokenizer(documents: Sequence[Document], size: int) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE (Sennrich et al. 2016) of `size` ids, the separator's being 0."""
    bytes_of = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = bytes_of
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BETWEEN],
        initial_alphabet=sorted(bytes_of.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, documents: Sequence[Document]) -> np.ndarray:
    """Returns one stream of ids, int32 [tokens], the separator before every document."""
    first = [tokenizer.token_to_id(BETWEEN)]
    return np.concatenate(
        [first + tokenizer.encode(text).ids for _, text in documents], dtype=np.int32
    )


def train_model(
    tokens: np.ndarray, held_out: np.ndarray, settings: Settings, reporter: Reporter
) -> tuple[Params, list[dict[str, float]]]:
    """Trains from scratch on windows that begin anywhere; returns parameters and the curve.

    The held-out loss of the curve is over `LOOK` windows, and decides nothing.
    """
    config, batch = settings.config, settings.batch
    fns = model_fns(config, jnp.float32, remat=False)

    def loss(params: Params, windows: jax.Array):
        return jnp.mean(next_token_nll(fns, params, fns.hidden(params, windows)[1], windows)), {}

    optimizer = make_optimizer(settings)
    update = make_update(loss, optimizer, accumulate=count_parts(batch, config.max_length))
    params = jax.jit(partial(init_params, config))(jax.random.key(settings.seed))
    state = init_state(params, optimizer, select=lambda path, leaf: True)
    reporter.begin("training", settings.updates)
    look = cut_windows(held_out, config.max_length, LOOK)
    evaluate = jax.jit(lambda params: loss(params, look)[0])
    losses, curve = [], []
    for number, windows in enumerate(_draw_batches(tokens, settings), start=1):
        state, metrics = update(state, windows)
        losses.append(metrics["loss"])
        if number % settings.look_every == 0 or number == settings.updates:
            mean = float(np.mean(jax.device_get(losses)))
            val = float(evaluate(state.params))
            curve.append({"update": number, "train_loss": mean, "val_loss": val})
            reporter.advance(number, f"loss {mean:.3f}, held out {val:.3f}")
            losses = []
    return state.params, curve


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """Returns Muon on kernels, [layers, d_in, d_out], and Adam on embedding and norms."""
    warmup = max(1, round(settings.warmup * settings.updates))
    lr = optax.warmup_cosine_decay_schedule(
        0.0, settings.lr, warmup, max(settings.updates, warmup + 1), settings.least_lr * settings.lr
    )

    def find_matrices(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: MuonDimensionNumbers((1,), (2,)) if _ends_in(path, "kernel") else None,
            params,
        )

    return muon(
        lr,
        weight_decay=settings.weight_decay,
        consistent_rms=0.2,  # the size of Adam's steps, so that one learning rate serves both
        adam_b2=0.95,
        adam_learning_rate=lr,
        muon_weight_dimension_numbers=find_matrices,
    )


def write_tokenizer(tokenizer: tokenizers.Tokenizer, out: Path) -> None:
    """Writes tokenizer.json and what says which of its tokens is special."""
    tokenizer.save(str(out / "tokenizer.json"))
    named = {
        "bos_token": BETWEEN,
        "eos_token": BETWEEN,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(named, indent=1) + "\n")


def write_text(documents: Sequence[Document], path: Path) -> None:
    """Writes a document a line, as {"name", "text"}."""
    rows = (json.dumps(document._asdict(), ensure_ascii=False) for document in documents)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def write_model(params: Params, config: ModelConfig, special: int, out: Path) -> None:
    """Writes config.json and the weights in bfloat16, under Hugging Face's names."""
    family = families.family(config.family)
    blocks = unstack_blocks(params["blocks"])
    tensors = dict(_name_tensors(params, family.outer_tensors(config)))
    for layer, block in enumerate(blocks):
        tensors |= _name_tensors(block, family.block_tensors(config), layer)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "hidden_act": config.activation,
        "tie_word_embeddings": config.tied_head,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "bos_token_id": special,
        "eos_token_id": special,
        "torch_dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(raw, indent=1) + "\n")


def write_card(record: dict[str, Any], out: Path) -> None:
    """Writes what the model is and whose text it has read, with that text's license."""
    values = record | {"ppl": record["held_out"]["ppl"], "minutes": record["cpu_seconds"] / 60}
    (out / "README.md").write_text(CARD.format(**values))
    license = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if license.is_file():  # some distributions keep it elsewhere
        shutil.copyfile(license, out / "LICENSE.python.txt")


def score(folder: Path) -> dict[str, Any]:
    """Scores a written model on its held-out text."""
    model = load(folder, "float32")
    length = model.config.max_length
    windows, protocol = read_windows(model, folder / "heldout.jsonl", length)
    return vars(perplexity(model, windows, length, protocol=protocol))


def _draw_batches(tokens: np.ndarray, settings: Settings) -> Iterator[np.ndarray]:
    """Yields windows that begin at random places, int32 [batch, length]."""
    rng, length = np.random.default_rng(settings.seed), settings.config.max_length
    for _ in range(settings.updates):
        first = rng.integers(0, len(tokens) - length + 1, settings.batch)
        yield np.stack([tokens[place : place + length] for place in first])


def _ends_in(path: tuple, name: str) -> bool:
    return getattr(path[-1], "key", None) == name


def _name_tensors(
    tree: Params, stored: dict, layer: int | None = None
) -> Iterator[tuple[str, Any]]:
    for path, tensor in stored.items():
        array = np.asarray(get_at(tree, path)).astype(ml_dtypes.bfloat16)
        name = tensor.name if layer is None else tensor.name.format(layer=layer)
        yield name, np.ascontiguousarray(array.T if tensor.transposed else array)


class _Lines:
    """Prints a line a look, with the time that is left."""

    def begin(self, task: str, total: int, done: int = 0) -> None:
        self._total, self._started = total, time.perf_counter()

    def advance(self, done: int, message: str = "") -> None:
        passed = time.perf_counter() - self._started
        left = passed / done * (self._total - done)
        self.say(f"{done}/{self._total}, {message}, {passed:.0f} s, about {left:.0f} s left")

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--updates", type=int, default=Settings.updates)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    given = parser.parse_args()
    settings = Settings(updates=given.updates, seed=given.seed)
    record = train(given.out, settings, read_corpus(), _Lines())
    print(f"held-out perplexity {record['held_out']['ppl']:.3f}, {record['seconds']:.0f} s")


if __name__ == "__main__":
    main()
