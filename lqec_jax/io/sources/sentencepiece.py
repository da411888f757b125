"""What a SentencePiece model does to a text before it is cut into tokens.

A tokenizer.json converted from a tokenizer.model may have lost that half: Llama's converter assumes
that nothing is normalized, which holds for Meta's models and not for every model trained with
SentencePiece's defaults. Those collapse runs of spaces, so the same text becomes other tokens, and
perplexities differ by a percent. The model file beside it says what was done when the weights were
trained.
"""

from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import normalizers

from lqec_jax.errors import InputError

# Field numbers of sentencepiece_model.proto.
_NORMALIZER_SPEC = 3
_CHARSMAP, _REMOVE_EXTRA_WHITESPACES = 2, 4
_FIRST_BYTE = b"\x0a"  # field 1, the pieces, as a nested message
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_normalizer(path: Path) -> normalizers.Normalizer | None:
    """Returns the normalizer that a tokenizer.model asks for.

    None where it changes nothing, and for a file of another kind of that name (Llama 3's is
    tiktoken's).

    Raises:
      InputError: a SentencePiece model that is cut short or damaged.
    """
    model = path.read_bytes()
    if not model.startswith(_FIRST_BYTE):
        return None
    try:
        spec = b"".join(v for n, v in _fields(model) if n == _NORMALIZER_SPEC)
        settings = dict(_fields(spec))
        charsmap = settings.get(_CHARSMAP)
        steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    except Exception as error:  # the Rust side raises Exception itself, no subclass
        raise InputError(
            f"{path}: a damaged SentencePiece model; restore it, or remove it and use "
            "tokenizer.json alone"
        ) from error
    if settings.get(_REMOVE_EXTRA_WHITESPACES, 1):  # the format's default is to remove
        # Only spaces, and only at the ends of the whole text: newlines are tokens.
        steps += [
            normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), ""),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    return normalizers.Sequence(steps) if steps else None


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (number, value) of a protobuf message's fields; nested messages as bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
        elif kind == _BYTES:
            length, at = _varint(message, at)
            value, at = message[at : at + length], at + length
        elif kind in (_FIXED64, _FIXED32):
            width = 8 if kind == _FIXED64 else 4
            value, at = message[at : at + width], at + width
        else:
            raise ValueError(f"wire type {kind}")
        if at > len(message):
            raise ValueError("cut short")
        yield number, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
