"""Generation: greedy is the argmax of the whole model, sampling stays in the nucleus, text ends."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import lqec_jax as lqec
from lqec_jax.errors import InputError
from lqec_jax.evaluate import generate as module
from lqec_jax.evaluate.generate import (
    brings_bos,
    choose,
    end_tokens,
    generate,
    generate_tokens,
    read_prompt,
    round_up,
    stream_text,
    stream_tokens,
)
from lqec_kernels.formats import CompressedLinear
from tests.golden.tiny_checkpoint import RAW, make_tokens, write_checkpoint
from tests.train.tiny import draw_decoder

PROMPTS = make_tokens(1).reshape(2, -1)[:, :5]
TEMPLATE = "{% for m in messages %}w2 {{ m.role }} {{ m.content }} {% endfor %}w3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with grouped heads, a context of 64 and a tokenizer of 64 words; w0 is BOS."""
    folder = write_checkpoint(tmp_path_factory.mktemp("generate") / "m", num_hidden_layers=2)
    words = {f"w{number}": number for number in range(63)} | {"user": 63}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["w0"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "w0", "chat_template": TEMPLATE})
    )
    return folder


@pytest.fixture(scope="module")
def model(folder):
    assert RAW["num_key_value_heads"] < RAW["num_attention_heads"]
    return lqec.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def continued(model):
    """The greedy continuation of two prompts by 20 tokens."""
    return generate_tokens(model, PROMPTS, max_new_tokens=20)


def check_greedy(model, prompts, new):
    whole = np.concatenate([prompts, new], axis=1)
    best = np.asarray(lqec.logits(model, whole)).argmax(-1)
    np.testing.assert_array_equal(new, best[:, prompts.shape[1] - 1 : -1])


def test_greedy_is_the_argmax_of_the_whole_model_at_every_step(model, continued):
    assert continued.shape == (2, 20) and continued.dtype == np.int32
    assert len(np.unique(continued)) > 4
    check_greedy(model, PROMPTS, continued)


def test_a_compressed_artifact_generates_as_it_computes(model, folder, tmp_path):
    params = draw_decoder(model.config, (2,))  # packed weights with adapters
    lqec.save(dataclasses.replace(model, params=params, recipe="drawn"), tmp_path / "small")
    small = lqec.load(tmp_path / "small", dtype="float32")
    assert isinstance(small.params["blocks"][0]["attn"]["q"]["kernel"], CompressedLinear)
    check_greedy(small, PROMPTS, generate_tokens(small, PROMPTS, max_new_tokens=20))


def test_a_row_does_not_depend_on_its_neighbour_or_on_the_padding(model, continued):
    beside = np.stack([PROMPTS[1], PROMPTS[0][::-1]])
    new = generate_tokens(model, beside, max_new_tokens=20)
    np.testing.assert_array_equal(new[0], continued[1])
    # 5 prompt tokens are padded to 16; 20 leave no room in 16 and are padded to 32.
    longer = np.concatenate([PROMPTS, continued[:, :15]], axis=1)
    rest = generate_tokens(model, longer, max_new_tokens=5)
    np.testing.assert_array_equal(rest, continued[:, 15:])


def test_one_compilation_serves_all_lengths_that_round_alike(model):
    programs = module._programs(model.config, model.dtype)
    generate_tokens(model, np.arange(3)[None], max_new_tokens=5)
    before = [program._cache_size() for program in programs]
    for length in (4, 5, 11):
        generate_tokens(model, np.arange(length)[None], max_new_tokens=16 - length)
    assert [program._cache_size() for program in programs] == before
    assert [round_up(n, 100) for n in (1, 16, 17, 64, 65, 100)] == [16, 16, 32, 64, 100, 100]


def test_the_cache_is_written_in_place(model):
    begin, advance = module._programs(model.config, model.dtype)
    greedy = module._Sampling(None, None, None)
    chosen, caches = begin(model.params, np.pad(PROMPTS, ((0, 0), (0, 11))), 5, greedy, length=32)
    assert caches[0].keys.shape == (2, 2, 2, 32, 8)
    after = advance(model.params, chosen, 5, greedy, caches)[1]
    assert caches[0].keys.is_deleted() and not after[0].keys.is_deleted()


# ---- sampling


@pytest.fixture(scope="module")
def draw():
    """(logits [vocab], temperature, top_p) -> 4000 draws."""

    @jax.jit
    def run(logits, temperature, top_p):
        sampling = module._Sampling(jax.random.key(7), temperature, top_p)
        one = lambda position: choose(logits[None], sampling, position)[0]  # noqa: E731
        return jax.vmap(one)(jnp.arange(4000))

    return lambda *given: np.asarray(run(*given))


PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [
        (0.05, {1}),
        (0.39, {1}),
        (0.41, {1, 3}),
        (0.69, {1, 3}),
        (0.71, {1, 3, 4}),
        (0.94, {0, 1, 3, 4}),
        (1.0, {0, 1, 2, 3, 4}),
    ],
)
def test_samples_come_from_the_nucleus_in_proportion(draw, top_p, nucleus):
    tokens = draw(np.log(PROBABILITIES).astype(np.float32) + 3, 1.0, top_p)
    assert set(tokens) == nucleus
    inside = np.array([p if i in nucleus else 0 for i, p in enumerate(PROBABILITIES)])
    seen = np.bincount(tokens, minlength=5) / len(tokens)
    np.testing.assert_allclose(seen, inside / inside.sum(), atol=0.03)  # 4 standard errors


def test_temperature_flattens_and_sharpens(draw):
    logits = np.log(PROBABILITIES).astype(np.float32)
    for temperature in (0.5, 2.0):
        wanted = PROBABILITIES ** (1 / temperature)
        seen = np.bincount(draw(logits, temperature, 1.0), minlength=5) / 4000
        np.testing.assert_allclose(seen, wanted / wanted.sum(), atol=0.03)


@pytest.mark.parametrize("temperature", [1e-4, 1e-30])
def test_a_vanishing_temperature_is_greedy(draw, temperature):
    logits = np.float32([3.0, 90.0, 89.9, -50.0])
    assert set(draw(logits, temperature, 1.0)) == {1}


def test_the_seed_decides_the_text(model):
    def write(seed):
        return generate(model, "w5 w6", max_new_tokens=12, temperature=1.5, top_p=0.9, seed=seed)

    assert write(1) == write(1) != write(2)


# ---- where a text ends


def test_rows_end_at_their_end_token_and_all_at_the_last(model, continued):
    stop = frozenset({int(continued[0, 2]), int(continued[1, 6])})
    assert int(continued[1, 6]) not in continued[1, :6]
    first = next(i for i in range(20) if int(continued[0, i]) in stop)
    second = next(i for i in range(20) if int(continued[1, i]) in stop)
    assert first != second
    ended = generate_tokens(model, PROMPTS, max_new_tokens=20, stop=stop)
    assert ended.shape == (2, max(first, second) + 1)
    for row, end in enumerate((first, second)):
        np.testing.assert_array_equal(ended[row, : end + 1], continued[row, : end + 1])
        assert (ended[row, end:] == continued[row, end]).all()


def test_a_text_ends_at_the_models_end_token(model):
    words = generate(model, "w5 w6", max_new_tokens=12).split()
    end = next(word for number, word in enumerate(words) if number > 2 and word[1:].isdigit())
    raw = {**model.raw_config, "eos_token_id": [62, int(end[1:])]}
    ending = dataclasses.replace(model, raw_config=raw)
    assert end_tokens(ending) == {62, int(end[1:])}
    assert generate(ending, "w5 w6", max_new_tokens=12).split() == words[: words.index(end)]
    # Or by one that generation_config.json alone names, which the tokenizer has read.
    named = dataclasses.replace(model.tokenizer, end_ids=frozenset({int(end[1:])}))
    ending = dataclasses.replace(model, tokenizer=named)
    assert generate(ending, "w5 w6", max_new_tokens=12).split() == words[: words.index(end)]


def test_the_context_is_filled_and_not_passed(model):
    limit = model.config.max_length
    short = dataclasses.replace(model, config=dataclasses.replace(model.config, max_length=16))
    assert generate_tokens(short, make_tokens(1)[None, :13], max_new_tokens=20).shape == (1, 3)
    with pytest.raises(InputError, match=f"has {limit} tokens; at most {limit - 1}"):
        generate_tokens(model, np.zeros((1, limit), np.int32))


# ---- text


def test_pieces_join_to_the_text(model):
    pieces = list(stream_text(model, "w5 w6", max_new_tokens=8, temperature=1.0))
    assert len(pieces) >= 8
    assert "".join(pieces) == generate(model, "w5 w6", max_new_tokens=8, temperature=1.0)


def test_a_character_of_several_tokens_comes_whole():
    whole = "é€".encode()

    def decode(ids):
        return bytes(whole[i] for i in ids).decode(errors="replace")

    steps = iter(np.arange(5)[:, None])
    pieces = module._decode_stream(decode, [], steps, frozenset())
    assert [piece for piece in pieces if piece] == ["é", "€"]


def test_a_prompt_gets_its_bos_and_a_conversation_its_template(model):
    assert read_prompt(model, "w5 w6") == read_prompt(model, "w0 w5 w6") == [0, 5, 6]
    assert brings_bos(model, "w0 w5") and not brings_bos(model, "w5 w0")
    assert not brings_bos(model, [{"role": "user", "content": "w0"}])
    assert not brings_bos(dataclasses.replace(model, tokenizer=None), "w0")
    assert read_prompt(model, [{"role": "user", "content": "w5"}]) == [2, 63, 5, 3]


def test_what_cannot_be_continued_is_refused(model, folder, tmp_path):
    bare = dataclasses.replace(model, tokenizer=None)
    with pytest.raises(InputError, match="no tokenizer"):
        generate(bare, "w5")
    without_bos = dataclasses.replace(model.tokenizer, bos_id=None)
    with pytest.raises(InputError, match="prompt is empty"):
        generate(dataclasses.replace(model, tokenizer=without_bos), "")
    plain = shutil.copytree(folder, tmp_path / "plain")
    (plain / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="no chat template"):
        generate(lqec.load(plain), [{"role": "user", "content": "w5"}])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_p": 0}, "top_p=0 leaves no token"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_numbers_out_of_range_are_refused(model, options, words):
    with pytest.raises(InputError, match=words):
        stream_tokens(model, PROMPTS, **options)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (np.zeros(4, np.int32), r"int32 \[4\]; integers \[batch, time\]"),
        (np.zeros((1, 4)), r"float64 \[1, 4\]"),
        (np.zeros((1, 0), np.int32), r"\[1, 0\]"),
        ([[1, 64]], "id 64, outside the model's vocabulary of 64"),
    ],
)
def test_tokens_that_are_none_are_refused(model, tokens, words):
    with pytest.raises(InputError, match=words):
        stream_tokens(model, tokens)
