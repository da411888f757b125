"""The script that made the embedded model, at a size where it takes seconds; what it wrote."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

import lqec_jax as lqec
from lqec_jax.core.progress import Silent
from lqec_jax.demo.corpus import Corpus, Document
from lqec_jax.demo.train import BETWEEN, CONFIG, Settings, score, train, train_tokenizer
from lqec_jax.errors import InputError
from lqec_jax.io.tensor_file import read_header

TINY = Settings(
    config=dataclasses.replace(CONFIG, vocab_size=300, d_model=16, d_ff=32, layers=2, heads=2,
                               kv_heads=2, head_dim=8, max_length=32),
    updates=2,
    batch=2,
    look_every=1,
)  # fmt: skip
WORDS = "the return value of a function is the value that the function returns to its caller"


def make_document(number: int) -> Document:
    rng = np.random.default_rng(number)
    return Document(f"document:{number}", " ".join(rng.permutation(WORDS.split() * 8)))


CORPUS = Corpus(
    train=tuple(make_document(number) for number in range(6)),
    calibrate=(make_document(0),),
    held_out=(make_document(6), make_document(7)),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of two updates, and what the script returned."""
    folder = tmp_path_factory.mktemp("train") / "model"
    return folder, train(folder, TINY, CORPUS, Silent())


def test_a_record_is_kept_of_what_was_done(trained):
    folder, record = trained
    assert json.loads((folder / "training.json").read_text()) == json.loads(json.dumps(record))
    assert record["corpus_sha256"] == CORPUS.sha256
    assert record["documents"] == {"train": 6, "calibrate": 1, "held_out": 2}
    assert [point["update"] for point in record["curve"]] == [1, 2]
    assert all(0 < point["val_loss"] < 6 for point in record["curve"])
    # Untrained, every id is about as likely as any other.
    assert record["curve"][0]["train_loss"] == pytest.approx(np.log(300), rel=0.05)
    assert record["held_out"] == score(folder)
    assert record["held_out"]["protocol"] == "documents/32"


def test_the_folder_is_a_model_of_that_size(trained):
    folder, record = trained
    model = lqec.load(folder)
    assert model.config == TINY.config
    assert model.tokenizer.bos_id == model.tokenizer.eos_id == 0
    tensors = read_header(folder / "model.safetensors").values()
    assert {tensor.dtype.name for tensor in tensors} == {"bfloat16"}
    assert sum(tensor.size for tensor in tensors) == record["parameters"]
    assert model.tokenizer.decode(model.tokenizer.encode(WORDS)) == WORDS


def test_the_same_seed_writes_the_same_model_and_another_a_different_one(trained, tmp_path):
    train(tmp_path / "again", TINY, CORPUS, Silent())
    train(tmp_path / "other", dataclasses.replace(TINY, seed=1), CORPUS, Silent())
    hashes = [
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        for folder in (trained[0], tmp_path / "again", tmp_path / "other")
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_folder_that_exists_is_left_alone(trained):
    with pytest.raises(InputError, match="exists"):
        train(trained[0], TINY, CORPUS, Silent())


def test_the_tokenizer_knows_every_byte_and_its_separator():
    tokenizer = train_tokenizer(CORPUS.train, 300)
    assert tokenizer.token_to_id(BETWEEN) == 0
    assert tokenizer.get_vocab_size() == 300
    text = "\t\x00 naïve — 漢字 \U0001f600\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("the function").ids) == 2
