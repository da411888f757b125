"""Examples to learn from: rows of text, or of prompts and what should follow them.

A row `{"text": ...}` is BOS (if the tokenizer has one) + its tokens + EOS (if it has one), and all
of it but the BOS is learned. A row `{"prompt": ..., "completion": ...}` is BOS + prompt +
completion + EOS, each of the two tokenized by itself, and what follows the prompt is learned. A BOS
that a row begins with, or an EOS that it ends with, is that one; no row gets a second. Rows are fed
one each, padded behind; nothing reads or learns the padding, because attention looks back.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from lqec_jax.calibration.data import Encoder, drop_bos
from lqec_jax.errors import InputError

WANTED = '{"text": ...} or {"prompt": ..., "completion": ...}'


class RowEncoder(Encoder, Protocol):
    """What `read_examples` needs of a tokenizer: also the token that ends a row."""

    eos_id: int | None


class Examples(NamedTuple):
    """Rows of tokens and which of them are learned.

    Attributes:
      tokens: int32 [n, t], padded behind with 0.
      learned: bool [n, t - 1]; learned[i, j] says whether predicting tokens[i, j + 1] counts.
      cut: how many rows were longer than `seqlen` and lost their end.
      dropped: how many rows had nothing left to learn, so that they are not among the n.
      own_ends: how many rows brought a BOS or an EOS of their own.
    """

    tokens: np.ndarray
    learned: np.ndarray
    cut: int
    dropped: int
    own_ends: int = 0


def read_examples(source: str | Path, tokenizer: RowEncoder, seqlen: int) -> Examples:
    """Reads a .jsonl of examples.

    Args:
      seqlen: longest row in tokens; what is longer loses its end.
    Raises:
      InputError: no such file, or no .jsonl; a row that is none of the two kinds (file and line
        named); no row with anything to learn.
    """
    rows, cut, dropped, own_ends = [], 0, 0, 0
    for prompt, completion in _read_rows(Path(source).expanduser()):
        ids, first, own = _encode(tokenizer, prompt, completion)
        own_ends += own
        cut += len(ids) > seqlen
        ids = ids[:seqlen]
        if len(ids) > first:
            rows.append((ids, first))
        else:
            dropped += 1
    if not rows:
        raise InputError(
            f"{source}: none of its {dropped} rows has a token to learn within {seqlen} tokens; "
            "give completions that are not empty, or a larger seqlen"
        )
    return Examples(*_pad(rows), cut, dropped, own_ends)


def weigh(learned: np.ndarray) -> np.ndarray:
    """Returns what each prediction counts, so that the mean over rows is the mean over tokens.

    weight[i, j] = learned[i, j] · n / Σ learned, float32 [n, t - 1].
    """
    return (learned * (len(learned) / learned.sum())).astype(np.float32)


def _encode(
    tokenizer: RowEncoder, prompt: str | None, completion: str
) -> tuple[list[int], int, bool]:
    """Returns a row's tokens, where learning begins (at least 1), whether it brought own ends."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    came = [list(tokenizer.encode(text)) if text else [] for text in (prompt, completion)]
    # Of a completion too: a row has one beginning, and a prompt may be empty.
    asked, body = (drop_bos(ids, tokenizer.bos_id) for ids in came)
    body = drop_bos(body[::-1], tokenizer.eos_id)[::-1]
    own = len(asked) + len(body) < sum(map(len, came))
    head = bos + asked
    # An end alone is nothing to learn.
    return head + body + (eos if body else []), max(len(head), 1), own


def _pad(rows: Sequence[tuple[list[int], int]]) -> tuple[np.ndarray, np.ndarray]:
    length = max(len(ids) for ids, _ in rows)
    tokens = np.zeros((len(rows), length), np.int32)
    learned = np.zeros((len(rows), length - 1), bool)
    for number, (ids, first) in enumerate(rows):
        tokens[number, : len(ids)] = ids
        learned[number, first - 1 : len(ids) - 1] = True
    return tokens, learned


def _read_rows(path: Path) -> Iterator[tuple[str | None, str]]:
    """Yields (prompt or None, completion or text) of each row that is not empty."""
    if path.suffix != ".jsonl":
        raise InputError(f"{path} is no .jsonl; wanted rows of {WANTED}")
    if not path.is_file():
        raise InputError(f"no file {path}; check the path")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _parse_row(line, f"{path}, line {number}")


def _parse_row(line: bytes, where: str) -> tuple[str | None, str]:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as err:
        reason = "not UTF-8" if isinstance(err, UnicodeDecodeError) else getattr(err, "msg", err)
        raise InputError(f"{where}: not JSON ({reason}); wanted {WANTED}") from err
    if not isinstance(row, dict):
        raise InputError(f"{where}: is a {type(row).__name__}; wanted {WANTED}")
    if "text" in row and not {"prompt", "completion"} & set(row):
        return None, _take(row, "text", where)
    if {"prompt", "completion"} <= set(row) and "text" not in row:
        return _take(row, "prompt", where), _take(row, "completion", where)
    raise InputError(f"{where}: fields are {list(row)}; wanted {WANTED}")


def _take(row: dict, name: str, where: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise InputError(f"{where}: {name!r} is {type(value).__name__}; wanted a string")
    try:
        value.encode()
    except UnicodeEncodeError as err:  # JSON can spell half a surrogate pair, no tokenizer takes it
        raise InputError(f"{where}: {name!r} holds half a surrogate pair; repair the row") from err
    return value
