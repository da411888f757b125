"""Text from a model, one token at a time: greedy, or sampled from the nucleus.

Sampling divides logits by the temperature and keeps the smallest set of most likely tokens whose
probability reaches top_p (Holtzman et al. 2020, arXiv:1904.09751).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lqec_jax.core.arguments import check_int, check_number, check_tokens
from lqec_jax.errors import InputError
from lqec_jax.models.config import ModelConfig
from lqec_jax.models.model import Model
from lqec_jax.models.raw_config import Section
from lqec_jax.models.stepping import step_fns

SHORTEST = 16  # tokens; lengths are rounded up to this times a power of two, one compilation each


Prompt = str | Sequence[Mapping[str, str]]


def generate(
    model: Model,
    prompt: Prompt,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """Continues a text; ends at the model's end token, or where its context is full.

    Args:
      model: dense or compressed, with a tokenizer.
      prompt: text, before which a BOS is put if the tokenizer has one and the text does not begin
        with it; or a conversation, messages `{"role": ..., "content": ...}`, which the tokenizer's
        chat template renders.
      temperature: 0 always takes the likeliest token; 1 samples as the model says.
      top_p: sample only from the likeliest tokens that reach this probability together.
      seed: the same seed gives the same text.
    Returns:
      What follows the prompt.
    Raises:
      InputError: a number out of range; a model without tokenizer, or without the chat template
        that a conversation needs; a prompt that is empty or fills the context.
    Example:
      >>> generate(model, "Once upon a time", max_new_tokens=20)
    """
    return "".join(stream_text(model, prompt, max_new_tokens=max_new_tokens, seed=seed,
                               temperature=temperature, top_p=top_p))  # fmt: skip


def stream_text(model: Model, prompt: Prompt, **options: Any) -> Iterator[str]:
    """Yields what `generate` returns, piece by piece as it comes."""
    ids, stop = read_prompt(model, prompt), end_tokens(model)
    steps = stream_tokens(model, np.asarray([ids]), stop=stop, **options)
    return _decode_stream(model.tokenizer.decode, ids, steps, stop)


def _decode_stream(
    decode: Callable[[list[int]], str],
    ids: list[int],
    steps: Iterator[np.ndarray],
    stop: frozenset[int],
) -> Iterator[str]:
    # Decoded with all that precedes: a token's text depends on its neighbours, and the bytes of one
    # character may lie in several tokens.
    shown, text = len(decode(ids)), ""
    for step in steps:
        ids = [*ids, *(int(token) for token in step if token not in stop)]
        text = decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[shown:]
            shown = len(text)
    yield text[shown:]


def generate_tokens(model: Model, tokens: Any, **options: Any) -> np.ndarray:
    """Continues prompts of one length.

    Args:
      tokens: int [b, t].
      options: as `stream_tokens`.
    Returns:
      int32 [b, new]; a row that has ended goes on with its end token.
    Raises:
      InputError: as `stream_tokens`.
    """
    return np.stack(list(stream_tokens(model, tokens, **options)), axis=1)


def stream_tokens(
    model: Model,
    tokens: Any,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: frozenset[int] = frozenset(),
) -> Iterator[np.ndarray]:
    """Yields the next token of every row, int32 [b], until all have ended.

    Args:
      tokens: int [b, t], prompts of one length.
      max_new_tokens: how many at most; fewer where the model's context is full before.
      temperature, top_p, seed: as `generate`.
      stop: ids that end a row; the row goes on with that id.
    Raises:
      InputError: tokens are not [b, t], are outside the vocabulary, or fill the context; a number
        out of range.
    Cost: two compilations for each length rounded up, then one block row a token.
    """
    sampling = _check_sampling(max_new_tokens, temperature, top_p, seed)
    tokens = _check_prompts(model.config, tokens)
    count = tokens.shape[1]
    steps = min(max_new_tokens, model.config.max_length - count)
    return _stream(model, tokens, steps, sampling, frozenset(stop))


class _Sampling(NamedTuple):
    """temperature and top_p None: greedy, another program."""

    key: Any
    temperature: float | None
    top_p: float | None


def _stream(
    model: Model, tokens: np.ndarray, steps: int, sampling: _Sampling, stop: frozenset[int]
) -> Iterator[np.ndarray]:
    count, limit = tokens.shape[1], model.config.max_length
    begin, advance = _programs(model.config, model.dtype)
    padded = np.pad(tokens, ((0, 0), (0, round_up(count, limit) - count)))
    chosen, caches = begin(model.params, padded, count, sampling, round_up(count + steps, limit))
    ended = np.zeros(len(tokens), bool)
    previous = np.zeros(len(tokens), np.int32)
    for position in range(count, count + steps):
        if position > count:
            chosen, caches = advance(model.params, chosen, position - 1, sampling, caches)
        previous = np.where(ended, previous, np.asarray(chosen)).astype(np.int32)
        yield previous
        ended |= np.isin(previous, list(stop))
        if ended.all():
            return


@lru_cache(maxsize=8)
def _programs(config: ModelConfig, dtype: Any) -> tuple[Callable, Callable]:
    """Returns the compiled (begin, advance), which end with the choice of the next token."""
    fns = step_fns(config, dtype)

    @partial(jax.jit, static_argnames="length")
    def begin(params, tokens, count, sampling, length):
        logits, caches = fns.prefill(params, tokens, count, length)
        return choose(logits, sampling, count), caches

    @partial(jax.jit, donate_argnames="caches")
    def advance(params, tokens, position, sampling, caches):
        logits, caches = fns.decode(params, tokens, position, caches)
        return choose(logits, sampling, position + 1), caches

    return begin, advance


def choose(logits: jax.Array, sampling: _Sampling, position: Any) -> jax.Array:
    """Returns the next token of every row: logits float32 [b, vocab] -> int32 [b]."""
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # The largest at 0: no temperature, however small, can overflow.
    logits = (logits - logits.max(-1, keepdims=True)) / sampling.temperature
    tokens = jnp.broadcast_to(jnp.arange(logits.shape[-1], dtype=jnp.int32), logits.shape)
    falling, tokens = jax.lax.sort((-logits, tokens), num_keys=1)  # [b, vocab], likeliest first
    probability = jax.nn.softmax(-falling, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    nucleus = jnp.where(before < sampling.top_p, -falling, -jnp.inf)
    rank = jax.random.categorical(jax.random.fold_in(sampling.key, position), nucleus)
    return jnp.take_along_axis(tokens, rank[:, None], axis=-1)[:, 0]


def read_prompt(model: Model, prompt: Prompt) -> list[int]:
    """Returns a prompt's ids: BOS and the text, or the conversation in the chat template.

    Raises:
      InputError: there is no tokenizer, no chat template, or nothing to continue.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError(
            "generate: the model has no tokenizer; copy its files into the model's folder, or give "
            "token ids to generate_tokens"
        )
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, bos=tokenizer.bos_id is not None)
    else:
        ids = tokenizer.encode(tokenizer.chat(prompt))
    if not ids:
        raise InputError("generate: the prompt is empty; give some text to continue")
    return ids


def brings_bos(model: Model, prompt: Prompt) -> bool:
    """Says whether a text begins with the BOS that would otherwise be put before it."""
    own = model.tokenizer.bos_id if model.tokenizer is not None else None
    if own is None or not isinstance(prompt, str):
        return False
    return model.tokenizer.encode(prompt)[:1] == [own]


def end_tokens(model: Model) -> frozenset[int]:
    """Returns the ids that end a text: all that the model's files name.

    The tokenizer's own, config.json's and generation_config.json's; an instruct model ends its turn
    by one token and a text by another.
    """
    named = Section(model.raw_config).ids("eos_token_id")
    return named if model.tokenizer is None else named | model.tokenizer.end_ids


def round_up(length: int, limit: int) -> int:
    """Returns the length to compile for: a power of two times `SHORTEST`, at most `limit`."""
    rounded = SHORTEST
    while rounded < length:
        rounded *= 2
    return min(rounded, limit)


def _check_sampling(max_new_tokens: Any, temperature: Any, top_p: Any, seed: Any) -> _Sampling:
    check_int("generate", "max_new_tokens", max_new_tokens, 1)
    check_number("generate", "temperature", temperature, 0)
    check_number("generate", "top_p", top_p, 0, 1)
    check_int("generate", "seed", seed, 0, 2**32 - 1)
    if top_p == 0:
        raise InputError("generate: top_p=0 leaves no token; for the likeliest, temperature=0")
    if temperature == 0:
        return _Sampling(None, None, None)
    return _Sampling(jax.random.key(seed), float(temperature), float(top_p))


def _check_prompts(config: ModelConfig, tokens: Any) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.size:
        raise InputError(
            f"generate: tokens are {tokens.dtype} {list(tokens.shape)}; integers [batch, time] "
            "were wanted"
        )
    check_tokens(tokens, config.vocab_size)
    if tokens.shape[1] >= config.max_length:
        raise InputError(
            f"generate: the prompt has {tokens.shape[1]} tokens; at most {config.max_length - 1} "
            f"were wanted, the model's context is {config.max_length}"
        )
    return tokens.astype(np.int32)
