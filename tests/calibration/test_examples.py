"""Examples: what of a row is learned, how rows are cut, and what is refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from lqec_jax.calibration.examples import read_examples, weigh
from lqec_jax.errors import InputError
from lqec_jax.io.sources.tokenizer import Tokenizer

BOS, EOS = 1, 2


def make_tokenizer(bos=BOS, eos=EOS):
    return SimpleNamespace(bos_id=bos, eos_id=eos, encode=lambda text: [ord(c) for c in text])


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text(text + "\n")
    return path


def read(tmp_path, *rows, seqlen=64, **tokens):
    return read_examples(write(tmp_path, *rows), make_tokenizer(**tokens), seqlen)


def learned_tokens(examples):
    """Returns the tokens of each row that are learned."""
    pairs = zip(examples.tokens, examples.learned, strict=True)
    return [row[1:][mask].tolist() for row, mask in pairs]


def test_a_text_is_learned_whole_and_a_completion_after_its_prompt(tmp_path):
    examples = read(tmp_path, {"text": "abc"}, {"prompt": "ab", "completion": "cd"})
    a, b, c, d = map(ord, "abcd")
    np.testing.assert_array_equal(examples.tokens, [[BOS, a, b, c, EOS, 0], [BOS, a, b, c, d, EOS]])
    assert learned_tokens(examples) == [[a, b, c, EOS], [c, d, EOS]]
    assert (examples.cut, examples.dropped) == (0, 0)
    assert examples.tokens.dtype == np.int32


def test_a_tokenizer_without_ends_adds_none(tmp_path):
    examples = read(tmp_path, {"text": "abc"}, {"prompt": "", "completion": "xyz"}, bos=None,
                    eos=None)  # fmt: skip
    # Nothing comes before the first token, so nothing predicts it.
    assert learned_tokens(examples) == [[98, 99], [121, 122]]
    np.testing.assert_array_equal(examples.tokens, [[97, 98, 99], [120, 121, 122]])


def test_rows_that_bring_their_ends_get_no_second(tmp_path):
    a, b, c = map(ord, "abc")
    rows = [
        {"text": "\x01abc\x02"},
        {"prompt": "\x01ab", "completion": "c"},
        {"prompt": "ab", "completion": "c\x02\x02"},
        {"prompt": "", "completion": "\x01abc"},
        {"prompt": "ab", "completion": "\x01c"},
        {"text": "abc"},
    ]
    examples = read(tmp_path, *rows)
    assert examples.tokens.tolist() == [[BOS, a, b, c, EOS]] * 6
    assert learned_tokens(examples) == [[a, b, c, EOS], *[[c, EOS]] * 2, [a, b, c, EOS], [c, EOS],
                                        [a, b, c, EOS]]  # fmt: skip
    assert examples.own_ends == 5
    # Ends alone are nothing to learn, and marks inside of a text are the text's.
    assert read(tmp_path, {"text": "a"}, {"prompt": "a", "completion": "\x02"}).dropped == 1
    assert read(tmp_path, {"text": "a\x01\x02b"}).tokens.tolist() == [[BOS, a, BOS, EOS, b, EOS]]


def test_the_case_of_two_ends(shared):
    path = shared / "cases" / "two-bos" / "ft.jsonl"
    if not path.is_file():
        pytest.skip("no folder ../shared/cases")
    examples = read_examples(path, Tokenizer.load(shared / "models" / "xs279k"), 64)
    for row in examples.tokens.tolist():
        assert row[0] == BOS and row.count(BOS) == 1 and row.count(EOS) == 1
    assert examples.own_ends == 2


def test_long_rows_lose_their_end_and_rows_without_anything_to_learn_are_counted(tmp_path):
    rows = [
        {"text": "abcdefgh"},
        {"prompt": "abcdefgh", "completion": "i"},
        {"prompt": "a", "completion": ""},
        {"text": ""},
        {"prompt": "a", "completion": "bcdefg"},
    ]
    examples = read(tmp_path, *rows, seqlen=5)
    assert learned_tokens(examples) == [[97, 98, 99, 100], [98, 99, 100]]
    assert (examples.cut, examples.dropped) == (3, 3)
    with pytest.raises(InputError, match="none of its 2 rows has a token to learn within 4 tokens"):
        read(tmp_path, {"prompt": "abcd", "completion": "e"}, {"text": ""}, seqlen=4)


def test_the_mean_over_rows_is_the_mean_over_learned_tokens(tmp_path):
    examples = read(tmp_path, {"text": "abcdef"}, {"prompt": "abc", "completion": "d"})
    nll = np.random.default_rng(0).random(examples.learned.shape)
    wanted = nll[examples.learned].mean()
    assert (weigh(examples.learned) * nll).sum(axis=1).mean() == pytest.approx(wanted, rel=1e-6)


def test_empty_lines_are_no_rows(tmp_path):
    assert len(read(tmp_path, {"text": "a"}, "", {"text": "b"}, "  ").tokens) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: not JSON"),
        ('["a"]', "line 2: is a list"),
        ({"prompt": "a"}, r"line 2: fields are \['prompt'\]"),
        ({"text": "a", "completion": "b"}, "line 2: fields are"),
        ({"text": 3}, "line 2: 'text' is int"),
        ({"prompt": "a", "completion": None}, "line 2: 'completion' is NoneType"),
        ('{"text": "\\ud800"}', "line 2: 'text' holds half a surrogate pair"),
    ],
)
def test_a_bad_row_is_named_in_one_line(tmp_path, row, message):
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, {"text": "fine"}, row)
    assert "\n" not in str(caught.value)


def test_only_a_jsonl_that_is_there_is_read(tmp_path):
    for name, message in (("rows.txt", "is no .jsonl"), ("none.jsonl", "no file")):
        with pytest.raises(InputError, match=message):
            read_examples(tmp_path / name, make_tokenizer(), 8)
