"""The normalizer of a tokenizer.model, against what SentencePiece itself gives."""

import pytest

from lqec_jax.errors import InputError
from lqec_jax.io.sources.sentencepiece import read_normalizer


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


def nested(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def model(*, remove_extra: bool | None, pieces: int = 3) -> bytes:
    """Builds a SentencePiece model of a few pieces with a score each and a normalizer spec."""
    piece = nested(1, "▁a".encode()) + varint(2 << 3 | 5) + b"\0\0\0\0"
    spec = nested(1, b"identity") + varint(3 << 3) + b"\1"
    if remove_extra is not None:
        spec += varint(4 << 3) + bytes([remove_extra])
    return nested(1, piece) * pieces + nested(2, b"") + nested(3, spec)


def write(tmp_path, content: bytes):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("remove_extra", [True, None])  # unset means true in the format
@pytest.mark.parametrize(
    "text, wanted",
    [
        ("a  b   c", "a b c"),
        ("  a  ", "a"),
        (" a\n\n  b \n", "a\n\n b \n"),
        ("a\t b", "a\t b"),
        ("\n", "\n"),
        ("", ""),
    ],
)
def test_extra_spaces_are_removed_and_nothing_else(tmp_path, remove_extra, text, wanted):
    normalizer = read_normalizer(write(tmp_path, model(remove_extra=remove_extra)))
    assert normalizer.normalize_str(text) == wanted


def test_a_model_that_keeps_spaces_normalizes_nothing(tmp_path):
    assert read_normalizer(write(tmp_path, model(remove_extra=False))) is None


def test_another_kind_of_file_is_let_be(tmp_path):
    assert read_normalizer(write(tmp_path, b"IQ== 0\nIg== 1\n")) is None


def test_a_file_cut_short_is_refused(tmp_path):
    path = write(tmp_path, model(remove_extra=True)[:-3])
    with pytest.raises(InputError, match="damaged SentencePiece model") as caught:
        read_normalizer(path)
    assert "\n" not in str(caught.value)
