"""Text to windows: both protocols by hand, every source, every way the text is wrong."""

import itertools
import json
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import pytest

from lqec_jax.calibration.data import (
    cut_windows,
    load_tokens,
    read_documents,
    split_windows,
    tokenize,
)
from lqec_jax.core.arguments import check_tokens
from lqec_jax.errors import InputError, MissingExtra
from lqec_jax.io.sources.tokenizer import Tokenizer

SHARED = Path(__file__).parents[3] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is absent")


def encode(text):
    """Merges `ab` into one token, so that a join is not the sum of its parts."""
    ids, at = [], 0
    while at < len(text):
        pair = text[at : at + 2] == "ab"
        ids.append(500 if pair else ord(text[at]))
        at += 1 + pair
    return ids


class Letters:
    """A tokenizer of code points."""

    def __init__(self, bos_id=1):
        self.bos_id = bos_id

    def encode(self, text):
        return encode(text)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(call, *args, **kwargs):
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- protocols


@pytest.mark.parametrize(
    ("protocol", "bos", "wanted"),
    [
        ("documents", 1, [1, 99, 97, 1, 98, 1, 500]),
        ("documents", None, [99, 97, 98, 500]),
        ("gptq", 1, [1, 99, 97, 10, 10, 98, 10, 10, 500]),
        ("gptq", None, [99, 97, 10, 10, 98, 10, 10, 500]),
    ],
)
def test_each_protocol_by_hand(protocol, bos, wanted):
    tokens = tokenize(["ca", "b", "ab"], encode, bos, protocol)
    assert tokens.dtype == np.int32 and tokens.ndim == 1
    assert tokens.tolist() == wanted


def test_an_empty_document_is_its_bos():
    assert tokenize(["a", "", "b"], encode, 1, "documents").tolist() == [1, 97, 1, 1, 98]


@pytest.mark.parametrize(
    ("protocol", "wanted"),
    [
        ("documents", [1, 99, 97, 1, 98, 1, 500, 1, 97, 1, 98]),
        # One text: of its first document alone a BOS would be put before it.
        ("gptq", [1, 99, 97, 10, 10, 98, 10, 10, 1, 500, 10, 10, 1, 1, 97, 1, 98]),
    ],
)
@pytest.mark.parametrize("limit", [None, 4, 9])
def test_a_text_that_brings_its_bos_gets_no_second(protocol, wanted, limit):
    notes = []
    documents = ["\x01ca", "b", "\x01ab", "\x01\x01a\x01b"]
    tokens = tokenize(documents, encode, 1, protocol, limit, "x.txt", notes.append)
    assert tokens.tolist() == wanted[:limit]
    if limit is None:
        assert notes == ["x.txt: 3 of 4 documents bring their own BOS; none gets a second"]


@pytest.mark.parametrize("protocol", ["documents", "gptq"])
def test_without_a_bos_of_its_own_nothing_is_said(protocol):
    notes = []
    plain = tokenize(["ca", "b\x01"], encode, 1, protocol, note=notes.append)
    assert plain.tolist()[-2:] == [98, 1] and not notes
    # To a tokenizer without one it is a token as any other.
    bare = tokenize(["\x01ca"], encode, None, protocol, note=notes.append)
    assert bare.tolist() == [1, 99, 97] and not notes


@pytest.mark.parametrize("protocol", ["documents", "gptq"])
def test_a_limit_counts_what_is_left_of_a_text(protocol):
    documents = ["\x01" * 3000 + "abc" * 2000, "c"]
    whole = tokenize(documents, encode, 1, protocol)
    assert whole[:3].tolist() == [1, 500, 99]
    for limit in (1, 2, 700, 5000):
        head = tokenize(documents, encode, 1, protocol, limit)
        np.testing.assert_array_equal(head, whole[:limit])


@needs_shared
@pytest.mark.parametrize("protocol", ["documents", "gptq"])
def test_twenty_stories_have_twenty_bos_whoever_wrote_them(protocol):
    folder = SHARED / "cases" / "two-bos"
    if not folder.is_dir():
        pytest.skip("no folder ../shared/cases")
    notes = []
    tokenizer = Tokenizer.load(SHARED / "models" / "xs279k")
    tokens = load_tokens(folder / "with_bos.jsonl", tokenizer, protocol, note=notes.append)
    assert (tokens == 1).sum() == 20 and tokens[0] == 1 and tokens[1] != 1
    assert len(notes) == 1 and "20 of 20 documents bring their own BOS" in notes[0]
    plain = load_tokens(folder / "plain.jsonl", tokenizer, protocol, note=notes.append)
    assert (plain == 1).sum() == {"documents": 20, "gptq": 1}[protocol] and len(notes) == 1


def test_an_unknown_protocol_is_named():
    assert "'gptqq' is not known; did you mean 'gptq'?" in refusal(
        tokenize, ["a"], encode, 1, "gptqq"
    )


@pytest.mark.parametrize("protocol", ["documents", "gptq"])
@pytest.mark.parametrize("documents", [[], [""]])
def test_a_text_without_tokens_is_refused(protocol, documents):
    bare = refusal(tokenize, documents, lambda text: [], 1, protocol)
    assert "the text has no tokens" in bare
    named = refusal(tokenize, documents, lambda text: [], 1, protocol, source="x.txt")
    assert "x.txt has no tokens" in named


@pytest.mark.parametrize("protocol", ["documents", "gptq"])
@pytest.mark.parametrize("bos", [1, None])
def test_a_limit_gives_the_head_of_the_whole(protocol, bos):
    rng = np.random.default_rng(0)
    documents = ["".join(rng.choice(list("ab c"), size)) for size in (0, 3, 5000, 1, 9000, 40)]
    whole = tokenize(documents, encode, bos, protocol)
    for limit in (1, 2, 4, 5, 100, 2000, 9000, 10_000, 10**6):
        head = tokenize(documents, encode, bos, protocol, limit)
        np.testing.assert_array_equal(head, whole[:limit])


@pytest.mark.parametrize("protocol", ["documents", "gptq"])
@pytest.mark.parametrize("width", [6, 40])
def test_a_limit_never_cuts_a_token(protocol, width):
    """With long words for tokens, a head cut anywhere near the limit would end in half a word."""
    rng = np.random.default_rng(0)
    words = ["".join(word) for word in rng.choice(list("abcdefgh"), (4000, width))]

    def encode_words(text):
        return [zlib.crc32(word.encode()) % 10**6 for word in text.split()]

    documents = [" ".join(words[at : at + 1000]) for at in range(0, 4000, 1000)]
    whole = tokenize(documents, encode_words, None, protocol)
    for limit in (1, 2, 3, 50, 999, 1001, 2500):
        head = tokenize(documents, encode_words, None, protocol, limit)
        np.testing.assert_array_equal(head, whole[:limit])


@pytest.mark.parametrize("protocol", ["documents", "gptq"])
def test_a_limit_stops_reading_and_encoding(protocol):
    read, encoded = [], []

    def endless():
        for number in itertools.count():
            read.append(number)
            yield "word " * 100

    def count(text):
        encoded.append(len(text))
        return encode(text)

    assert tokenize(endless(), count, 1, protocol, 2000).size == 2000
    assert len(read) < 40 and sum(encoded) < 20_000
    encoded.clear()
    assert tokenize(["word " * 10**6], count, 1, protocol, 2000).size == 2000
    assert sum(encoded) < 20_000


# --- sources


def test_a_txt_is_one_document_with_its_own_line_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo \xc3\xa9\n")
    assert list(read_documents(path)) == ["one\r\n\r\ntwo é\n"]
    path.write_bytes(b"one\ntwo \xe9\n")
    assert f"{path}, line 2: not UTF-8" in refusal(lambda: list(read_documents(path)))


def test_a_jsonl_is_one_document_a_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\\nb", "id": 1}\n\n  \n{"text": "\xe2\x80\xa8c"}')
    assert list(read_documents(str(path))) == ["a\nb", "\u2028c"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "\xff"}', "not JSON (not UTF-8)"),
        (b'["a"]', "is a list"),
        (b'{"content": "a", "id": 1}', "fields are ['content', 'id']"),
        (b'{"text": null}', "'text' is NoneType"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, line, said):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "ok"}\n\n' + line + b"\n")
    documents = read_documents(path)
    assert next(documents) == "ok"
    message = refusal(next, documents)
    assert f"{path}, line 3: " in message and said in message


def test_rows_are_read_as_they_are_asked_for(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "abc"}\n' * 2000 + b"damaged\n")
    assert load_tokens(path, Letters(), "documents", limit=300).size == 300
    assert "line 2001" in refusal(load_tokens, path, Letters(), "documents")


def test_a_parquet_column(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    texts = [f"story {i} é" for i in range(3000)]
    parquet.write_table(pyarrow.table({"id": list(range(3000)), "text": texts}), path)
    assert list(read_documents(path)) == texts
    parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    assert f"{path}, row 2: 'text' is NoneType" in refusal(lambda: list(read_documents(path)))
    parquet.write_table(pyarrow.table({"content": ["a"]}), path)
    assert "columns are ['content']" in refusal(lambda: list(read_documents(path)))
    path.write_bytes(path.read_bytes()[:-5])
    assert "not a whole parquet file" in refusal(lambda: list(read_documents(path)))


def test_optional_readers_name_their_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    for source, extra in ((tmp_path / "a.parquet", "parquet"), ("hf:c4", "hf")):
        with pytest.raises(MissingExtra) as caught:
            list(read_documents(source))
        assert f"lqec-jax[{extra}]" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hf:wikitext", ("wikitext", None, "train")),
        ("hf:org/name:config-v1", ("org/name", "config-v1", "train")),
        ("hf:org/name:config-v1:test", ("org/name", "config-v1", "test")),
        ("hf:org/name::test", ("org/name", None, "test")),
    ],
)
def test_a_hub_data_set_is_streamed(monkeypatch, source, asked):
    calls = []

    def load_dataset(name, config, split, streaming):
        calls.append((name, config, split, streaming))
        return iter([{"text": "a", "id": 0}, {"text": "b", "id": 1}, {"words": "c"}])

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    documents = read_documents(source)
    assert [next(documents), next(documents)] == ["a", "b"]
    assert calls == [(*asked, True)]
    assert f"{source}, row 3: fields are ['words']" in refusal(next, documents)


def test_a_hub_that_fails_is_one_line(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no\nroute")

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert "hf:x cannot be read (no route)" in refusal(lambda: list(read_documents("hf:x")))
    for source in ("hf:", "hf::a", "hf:a:b:c:d"):
        message = refusal(lambda source=source: list(read_documents(source)))
        assert repr(source) in message and "wanted hf:NAME" in message


def test_a_source_that_is_none(tmp_path):
    assert f"no file {tmp_path / 'a.txt'}" in refusal(read_documents, tmp_path / "a.txt")
    assert "wanted a file .txt, .jsonl" in refusal(read_documents, tmp_path / "a.csv")
    assert "wanted a file" in refusal(load_tokens, tmp_path, Letters(), "documents")
    np.save(tmp_path / "a.npy", np.arange(3))
    assert "holds token ids, wanted text" in refusal(read_documents, tmp_path / "a.npy")
    (tmp_path / "b.txt").write_text("")
    message = refusal(load_tokens, tmp_path / "b.txt", Letters(), "documents")
    assert f"{tmp_path / 'b.txt'} has no tokens" in message
    assert "there is no tokenizer" in refusal(load_tokens, tmp_path / "b.txt", None, "gptq")


def test_text_and_its_ids_give_the_same_tokens(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "cab"}, {"text": "a b"}])
    tokens = load_tokens(path, Letters(), "documents")
    assert tokens.tolist() == [1, 99, 500, 1, 97, 32, 98]
    np.save(tmp_path / "a.npy", tokens)
    np.testing.assert_array_equal(load_tokens(tmp_path / "a.npy", None, "documents"), tokens)
    np.save(tmp_path / "b.npy", tokens.astype(np.uint16))
    ids = load_tokens(tmp_path / "b.npy", None, "documents", limit=3)
    assert ids.dtype == np.int32 and ids.tolist() == [1, 99, 500]


def test_saved_windows_are_cut_into_the_same_windows(tmp_path):
    windows = np.arange(24, dtype=np.int32).reshape(4, 6)
    np.save(tmp_path / "w.npy", windows)
    tokens = load_tokens(tmp_path / "w.npy", None, "documents", seqlen=6)
    np.testing.assert_array_equal(cut_windows(tokens, 6), windows)
    for seqlen in (5, 12, None):
        message = refusal(load_tokens, tmp_path / "w.npy", None, "documents", seqlen=seqlen)
        assert "is [4, 6], wanted [tokens]" in message


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros(4, np.float32), "is float32, wanted int32"),
        (np.zeros((2, 3, 4), np.int32), "is [2, 3, 4], wanted"),
        (np.zeros(0, np.int32), "has no tokens"),
        (np.array([3, 2**32 + 5]), "token 1 is id 4294967301"),
        (np.array([3, -1]), "token 1 is id -1"),
        (np.array([None]), "not a .npy of numbers"),
    ],
)
def test_an_array_that_holds_no_tokens(tmp_path, array, said):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    assert said in refusal(load_tokens, tmp_path / "a.npy", None, "documents", seqlen=4)


def test_a_damaged_array(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(100, dtype=np.int32))
    whole = (tmp_path / "a.npy").read_bytes()
    for content in (whole[:-8], whole[:40], b"", b"text"):
        (tmp_path / "a.npy").write_bytes(content)
        message = refusal(load_tokens, tmp_path / "a.npy", None, "documents")
        assert str(tmp_path / "a.npy") in message


# --- windows


def test_windows_are_consecutive_and_the_remainder_is_dropped():
    tokens = np.arange(23, dtype=np.int32)
    assert cut_windows(tokens, 5).tolist() == np.arange(20).reshape(4, 5).tolist()
    assert cut_windows(tokens, 5, windows=2).tolist() == np.arange(10).reshape(2, 5).tolist()
    assert cut_windows(tokens, 5, windows=9).shape == (4, 5)
    assert cut_windows(tokens, 23).shape == (1, 23)


@pytest.mark.parametrize(
    ("seqlen", "windows", "said"),
    [
        (24, None, "23 tokens do not fill one window of 24"),
        (1, None, "seqlen is 1, wanted 2"),
        (0, None, "seqlen is 0"),
        (5, 0, "windows is 0"),
        (5, -1, "windows is -1"),
    ],
)
def test_windows_that_cannot_be_cut(seqlen, windows, said):
    assert said in refusal(cut_windows, np.arange(23, dtype=np.int32), seqlen, windows)


@pytest.mark.parametrize(
    ("n", "ratio", "held"),
    [(320, 0.2, 64), (10, 0.25, 2), (10, 0.01, 1), (10, 0.99, 9), (2, 0.5, 1), (3, 0.34, 1)],
)
def test_the_last_windows_validate(n, ratio, held):
    windows = np.arange(n * 4).reshape(n, 4)
    train, validation = split_windows(windows, ratio)
    assert len(validation) == held
    np.testing.assert_array_equal(np.concatenate([train, validation]), windows)


def test_a_split_that_leaves_a_part_empty_is_refused():
    assert "1 calibration window, wanted 2" in refusal(split_windows, np.zeros((1, 4)), 0.2)
    assert "0 calibration windows" in refusal(split_windows, np.zeros((0, 4)), 0.2)
    for ratio in (0, 1, -0.1, 1.5, float("nan")):
        assert f"val_ratio is {ratio}" in refusal(split_windows, np.zeros((4, 4)), ratio)


# --- the real text


@needs_shared
@pytest.mark.parametrize(
    ("model", "split", "tokens", "windows"),
    [
        ("babyllama", "dev", 233_566, 912),
        ("babyllama", "calib", 1_295_905, 5062),
        ("xs279k", "dev", 116_010, 453),
        ("xs279k", "calib", 635_176, 2481),
    ],
)
def test_real_stories_have_their_counted_windows(model, split, tokens, windows):
    tokenizer = pytest.importorskip("lqec_jax.io.sources.tokenizer").Tokenizer.load(
        SHARED / "models" / model
    )
    source = SHARED / "data" / f"tinystories_{split}.jsonl"
    stream = load_tokens(source, tokenizer, "documents")
    check_tokens(stream, tokenizer.vocab_size)
    assert stream.size == tokens and cut_windows(stream, 256).shape == (windows, 256)
    assert (stream == 1).sum() == {"dev": 300, "calib": 1500}[split]


@needs_shared
@pytest.mark.parametrize("model", ["babyllama", "xs279k"])
@pytest.mark.parametrize("protocol", ["documents", "gptq"])
def test_a_limit_on_real_text_gives_the_head_of_the_whole(model, protocol):
    """The tokenizers have no word boundaries, so a merge could in principle reach anywhere."""
    tokenizer = pytest.importorskip("lqec_jax.io.sources.tokenizer").Tokenizer.load(
        SHARED / "models" / model
    )
    documents = [(SHARED / "data" / "wikitext2_valid.txt").read_text(encoding="utf-8")[:200_000]]
    whole = tokenize(documents, tokenizer.encode, tokenizer.bos_id, protocol)
    for limit in (1, 100, 2048, 20_000):
        head = tokenize(documents, tokenizer.encode, tokenizer.bos_id, protocol, limit)
        np.testing.assert_array_equal(head, whole[:limit])
