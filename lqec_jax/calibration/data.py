"""Text to windows of tokens, under a named protocol.

Perplexities under two protocols cannot be compared, so a protocol is named, never guessed:
`documents` is BOS (if the tokenizer has one) + tokens for each document, all concatenated;
`gptq` is the literature's (Frantar et al. 2023, arXiv:2210.17323): documents joined by two
newlines, tokenized once, one leading BOS if the tokenizer has one.
A text that begins with the BOS already, as chat templates write it, gets no second one.
The stream is cut into consecutive windows and the remainder is dropped.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from tokenize import TokenError  # numpy lets it through for a damaged header
from typing import Protocol

import numpy as np

from lqec_jax.core.arguments import check_tokens
from lqec_jax.errors import InputError, MissingExtra, did_you_mean

PROTOCOLS = ("documents", "gptq")
# The texts that come with the embedded model, see `lqec_jax.demo`.
EMBEDDED = {
    f"demo:{name}": Path(__file__).parents[1] / "demo" / "model" / f"{name}.jsonl"
    for name in ("calib", "heldout")
}
SUFFIXES = (".txt", ".jsonl", ".parquet", ".npy")
_JOINT = "\n\n"
_SLACK = 256  # tokens
_CHARACTERS = 6  # of text a token is first taken to cover; doubled where it covers more
_HEAD = 64  # characters of a text in which a BOS of its own shows


class Encoder(Protocol):
    """What `load_tokens` needs of a tokenizer; `encode` adds no special token."""

    bos_id: int | None

    def encode(self, text: str) -> Sequence[int]: ...


def read_documents(source: str | Path) -> Iterator[str]:
    """Yields the documents of a text source one at a time; reads no further than it is asked.

    Args:
      source: `.txt` (one document), `.jsonl` (field `text` of each row; empty lines are skipped),
        `.parquet` (column `text`), `hf:NAME[:CONFIG[:SPLIT]]` (field `text`; split `train`), or a
        text of the embedded model, `demo:calib` or `demo:heldout`.
    Raises:
      InputError: no such file, an unknown suffix, text that is not UTF-8, a row without `text`
        (file and line named).
      MissingExtra: parquet without pyarrow, `hf:` without datasets.
    """
    if str(source).startswith("hf:"):
        return _read_hub(str(source))
    path = _find_file(source)
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise InputError(f"{path} holds token ids, wanted text; name a .txt, .jsonl or .parquet")
    return readers[path.suffix](path)


def tokenize(
    documents: Iterable[str],
    encode: Callable[[str], Sequence[int]],
    bos_id: int | None,
    protocol: str,
    limit: int | None = None,
    source: str | Path = "the text",
    note: Callable[[str], None] | None = None,
) -> np.ndarray:
    """Turns documents into one stream of ids, int32 [tokens].

    Args:
      encode: text -> ids, adding no special token.
      protocol: `documents` or `gptq`, see the module.
      limit: keeps the first `limit` tokens and stops reading once they are there.
      source: what an error calls the text.
      note: is told, in one line, how many documents brought a BOS of their own, where some did.
    Raises:
      InputError: an unknown protocol; a text without a token.
    Example:
      >>> tokenize(["ab", "c"], lambda text: [ord(c) for c in text], 1, "documents")
      array([ 1, 97, 98,  1, 99], dtype=int32)
    """
    _check_protocol(protocol)
    bos = np.asarray([] if bos_id is None else [bos_id], np.int32)
    count = _OwnBos()
    if bos_id is not None:
        documents = count.over(documents, encode, bos_id)

    def encode_bare(text: str) -> np.ndarray:
        return drop_bos(np.asarray(encode(text), np.int32), bos_id)

    if protocol == "documents":
        pieces = _encode_each(documents, encode_bare, bos, limit)
    else:
        pieces = [bos, _encode_joined(documents, encode_bare, limit)]
    if note is not None and count.own:
        note(f"{str(source).rpartition('/')[2]}: {count.in_words}")  # goes into reports: no place
    if sum(piece.size for piece in pieces[1::2]) == 0:
        raise InputError(f"{source} has no tokens; wanted a document that has some")
    return np.concatenate(pieces)[:limit]


def load_tokens(
    source: str | Path,
    tokenizer: Encoder | None,
    protocol: str,
    *,
    seqlen: int | None = None,
    limit: int | None = None,
    note: Callable[[str], None] | None = None,
) -> np.ndarray:
    """Reads a source of text or of ids as one stream, int32 [tokens].

    Args:
      source: as `read_documents`, or a `.npy` of integers: a stream [tokens], or windows
        [n, seqlen], which `cut_windows` cuts into the same windows again.
      tokenizer: has `encode` and `bos_id`; not used for a `.npy`, whose ids are taken as they are.
      seqlen: the window length the caller will cut; a `.npy` of windows must have it.
      limit: keeps the first `limit` tokens.
      note: as in `tokenize`.
    Raises:
      InputError: as `read_documents` and `tokenize`; a `.npy` of another shape or dtype.
    """
    _check_protocol(protocol)
    path = None if str(source).startswith("hf:") else _find_file(source)
    if path is not None and path.suffix == ".npy":
        return _read_npy(path, seqlen, limit)
    if tokenizer is None:
        raise InputError(f"{source} is text, and there is no tokenizer; name a .npy of token ids")
    documents = read_documents(source)
    return tokenize(documents, tokenizer.encode, tokenizer.bos_id, protocol, limit, source, note)


def drop_bos(ids: Sequence[int], bos_id: int | None) -> Sequence[int]:
    """Returns a text's ids without the BOS that it begins with, however often it does.

    Example:
      >>> drop_bos([1, 1, 97, 1], 1)
      [97, 1]
    """
    first = 0
    while bos_id is not None and first < len(ids) and ids[first] == bos_id:
        first += 1
    return ids[first:]


def cut_windows(tokens: np.ndarray, seqlen: int, windows: int | None = None) -> np.ndarray:
    """Cuts a stream into consecutive windows and drops the remainder; [tokens] -> [n, seqlen].

    Args:
      windows: keeps the first so many; where the stream holds fewer, n says how many there are.
    Raises:
      InputError: seqlen or windows below 1 (a window of one token predicts nothing: below 2), or a
        stream shorter than one window.
    """
    if seqlen < 2:
        raise InputError(f"seqlen is {seqlen}, wanted 2 or more: a window predicts its next tokens")
    if windows is not None and windows < 1:
        raise InputError(f"windows is {windows}, wanted 1 or more")
    count = len(tokens) // seqlen
    if count == 0:
        raise InputError(
            f"{len(tokens)} tokens do not fill one window of {seqlen}; give more text or a smaller "
            "seqlen"
        )
    kept = min(count, windows or count)
    return tokens[: kept * seqlen].reshape(kept, seqlen)  # [n, seqlen]


def split_windows(windows: np.ndarray, val_ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Splits [n, seqlen] into training windows and the last round(val_ratio * n) for validation.

    Each part has at least one window.
    Raises:
      InputError: fewer than two windows; val_ratio outside (0, 1).
    """
    if not 0 < val_ratio < 1:
        raise InputError(f"val_ratio is {val_ratio}, wanted a fraction between 0 and 1, as 0.2")
    n = len(windows)
    if n < 2:
        raise InputError(
            f"{n} calibration window{'s' * (n != 1)}, wanted 2 or more (one to train on, one to "
            "validate); give more text, more windows or a smaller seqlen"
        )
    held = min(max(round(val_ratio * n), 1), n - 1)
    return windows[: n - held], windows[n - held :]


def _check_protocol(protocol: str) -> None:
    if protocol not in PROTOCOLS:
        near = did_you_mean(protocol, PROTOCOLS)
        raise InputError(f"protocol {protocol!r} is not known{near}")


class _OwnBos:
    """Counts documents as they are read, and those that bring a BOS of their own."""

    read = own = 0

    def over(
        self, documents: Iterable[str], encode: Callable[[str], Sequence[int]], bos_id: int
    ) -> Iterator[str]:
        for document in documents:
            self.read += 1
            self.own += list(encode(document[:_HEAD])[:1]) == [bos_id]
            yield document

    @property
    def in_words(self) -> str:
        return f"{self.own} of {self.read} documents bring their own BOS; none gets a second"


def _encode_each(
    documents: Iterable[str], encode: Callable, bos: np.ndarray, limit: int | None
) -> list[np.ndarray]:
    """Returns BOS, ids, BOS, ids, ... of the documents in turn."""
    pieces, total, seen = [], 0, False
    for document in documents:
        left = None if limit is None else max(limit - total, 1)
        pieces += [bos, _encode_joined([document], encode, left)]
        total += bos.size + pieces[-1].size
        seen = seen or pieces[-1].size > 0
        # Empty documents may fill a limit with BOS alone; a text must show one token of its own.
        if limit is not None and total >= limit and seen:
            break
    return pieces


def _encode_joined(
    documents: Iterable[str], encode: Callable[[str], np.ndarray], limit: int | None
) -> np.ndarray:
    """Encodes the join of the documents, of a long text only as much as `limit` tokens need.

    The head of a text has the first tokens of the whole, but for the few next to the cut, where a
    token could have merged with what follows; so it is cut `_SLACK` tokens later.
    """
    documents, parts, length = iter(documents), [], 0
    room = math.inf if limit is None else _CHARACTERS * (limit + _SLACK)
    while True:
        while length < room and (document := next(documents, None)) is not None:
            parts.append(document)
            length += len(document) + len(_JOINT)
        whole = length < room
        text = _JOINT.join(parts)
        ids = encode(text if whole else text[:room])
        if whole or ids.size >= limit + _SLACK:
            return ids
        room *= 2


def _find_file(source: str | Path) -> Path:
    path = EMBEDDED.get(str(source)) or Path(source).expanduser()
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"{source} is not a text source; wanted a file {', '.join(SUFFIXES)}, or "
            "hf:NAME[:CONFIG[:SPLIT]]"
        )
    if not path.is_file():
        raise InputError(f"no file {source}; check the path")
    return path


def _read_txt(path: Path) -> Iterator[str]:
    try:
        # Bytes, not text mode: a \r\n of the file is part of what is scored.
        yield path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as err:
        line = err.object[: err.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: not UTF-8; save the text as UTF-8") from err


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield _parse_row(line, f"{path}, line {number}")


def _parse_row(line: bytes, where: str) -> str:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError) as err:
        other = "not UTF-8" if isinstance(err, UnicodeDecodeError) else str(err)
        reason = getattr(err, "msg", other)
        raise InputError(f'{where}: not JSON ({reason}); wanted {{"text": "..."}}') from err
    if not isinstance(row, dict):
        raise InputError(f'{where}: is a {type(row).__name__}; wanted {{"text": "..."}}')
    return _check_text(row, where)


def _check_text(row: dict, where: str) -> str:
    text = row.get("text")
    if not isinstance(text, str):
        came = f"'text' is {type(text).__name__}" if "text" in row else f"fields are {list(row)}"
        raise InputError(f"{where}: {came}; wanted a string under 'text', rename or convert")
    try:
        text.encode()
    except UnicodeEncodeError as err:  # JSON can spell half a surrogate pair, no tokenizer takes it
        raise InputError(f"{where}: its text holds half a surrogate pair; repair the row") from err
    return text


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("pyarrow", "parquet", f"reading {path}") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if "text" not in names:
            raise InputError(f"{path}: columns are {names}; wanted a column 'text', rename one")
        batches = file.iter_batches(batch_size=1024, columns=["text"])
        texts = chain.from_iterable(batch.column("text").to_pylist() for batch in batches)
        for number, text in enumerate(texts, start=1):
            yield _check_text({"text": text}, f"{path}, row {number}")
    except InputError:
        raise
    except (OSError, ValueError) as err:
        raise InputError(f"{path}: not a whole parquet file; download or write it again") from err


def _read_hub(source: str) -> Iterator[str]:
    name, *rest = source.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise InputError(f"{source!r} is not a data set; wanted hf:NAME[:CONFIG[:SPLIT]]")
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "hf", f"reading {source}") from None
    config, split = (rest + [""] * 2)[:2]
    try:
        # Streamed: a corpus of hundreds of gigabytes is read for a few megabytes of text.
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield _check_text(row, f"{source}, row {number}")
    except InputError:
        raise
    except (OSError, ValueError) as err:
        reason = " ".join(str(err).split())[:200]
        raise InputError(
            f"{source} cannot be read ({reason}); check the name, or give a local .jsonl"
        ) from err


def _read_npy(path: Path, seqlen: int | None, limit: int | None) -> np.ndarray:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, TokenError) as err:
        raise InputError(f"{path}: not a .npy of numbers; write it with numpy.save") from err
    if ids.dtype.kind not in "iu":
        raise InputError(f"{path} is {ids.dtype}, wanted int32 token ids; save integers")
    if ids.ndim != 1 and not (ids.ndim == 2 and ids.shape[1] == seqlen):
        wanted = "[tokens]" if seqlen is None else f"[tokens] or [n, {seqlen}]"
        raise InputError(
            f"{path} is {list(ids.shape)}, wanted {wanted}; save one stream, or set seqlen to the "
            "length of its windows"
        )
    if not ids.size:
        raise InputError(f"{path} has no tokens; save at least one window")
    ids = ids.reshape(-1)[:limit]  # [tokens]
    check_tokens(ids, 2**31)  # before the cast: int64 ids would wrap into valid ones
    return np.array(ids, np.int32)
