"""The corpus: the same text from the same library, and nothing held out that is also trained on."""

import json
import platform
import sys
import sysconfig
from pathlib import Path

import pytest

from lqec_jax.demo import model_path
from lqec_jax.demo.corpus import (
    QUOTATION,
    Document,
    drop_quotations,
    read_corpus,
    read_docstrings,
    read_topics,
    split,
)

LONG = "a paragraph that is long enough to be a quotation where it comes again, word for word"


LIBRARY = Path(sysconfig.get_path("stdlib"))
PART = LIBRARY / "asyncio"  # the whole takes ten seconds to parse


@pytest.fixture(scope="module")
def corpus():
    return read_corpus(PART)


def paragraphs(documents):
    """Returns the long paragraphs, whatever their indentation."""
    words = (" ".join(p.split()) for document in documents for p in document.text.split("\n\n"))
    return {p for p in words if len(p) >= QUOTATION}


def test_two_readings_are_one_text(corpus):
    again = read_corpus(PART)
    assert again == corpus
    assert again.sha256 == corpus.sha256


def test_the_hash_sees_every_letter_and_every_part(corpus):
    first = corpus.train[0]
    changed = first._replace(text=first.text[:-1] + "~")
    assert corpus._replace(train=(changed, *corpus.train[1:])).sha256 != corpus.sha256
    moved = corpus._replace(train=corpus.train[1:], held_out=(first, *corpus.held_out))
    assert moved.sha256 != corpus.sha256


def test_nothing_held_out_is_trained_on_or_calibrated_with(corpus):
    held_out, train = set(corpus.held_out), set(corpus.train)
    assert not held_out & train
    assert set(corpus.calibrate) < train
    assert not paragraphs(corpus.held_out) & paragraphs(corpus.train)


def test_every_document_has_a_name_of_its_own(corpus):
    names = [document.name for part in (corpus.train, corpus.held_out) for document in part]
    assert len(names) == len(set(names))
    assert {"module:events", "topic:compound"} <= set(names)
    assert min(map(len, corpus)) >= 3


@pytest.mark.slow
def test_the_whole_library_is_what_the_embedded_model_was_trained_on():
    whole = read_corpus()
    letters = [sum(len(document.text) for document in part) for part in whole]
    assert letters[0] > 1_500_000 and letters[1] > 150_000 and letters[2] > 50_000
    assert not paragraphs(whole.held_out) & paragraphs(whole.train)
    training = json.loads((model_path() / "training.json").read_text())
    if training["python"] == platform.python_version():
        assert whole.sha256 == training["corpus_sha256"]


def test_the_texts_that_come_with_the_model_are_disjoint():
    held_out, calibrate = (
        [Document(**json.loads(line)) for line in (model_path() / name).read_bytes().splitlines()]
        for name in ("heldout.jsonl", "calib.jsonl")
    )
    assert split(held_out).held_out == tuple(held_out)
    assert split(calibrate).calibrate == tuple(calibrate)
    assert not paragraphs(held_out) & paragraphs(calibrate)


def test_no_module_of_the_library_is_imported():
    before = set(sys.modules)
    read_corpus(PART)
    assert set(sys.modules) - before <= {"pydoc_data", "pydoc_data.topics"}


def test_topics_are_sorted_and_whole():
    topics = read_topics()
    assert topics == sorted(topics)
    assert "if_stmt" in dict(topics)["topic:if"]


def test_docstrings_are_read_under_the_names_they_explain(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").write_text('"""A package."""\n')
    (tmp_path / "package/part.py").write_text(
        '"""A module."""\nraise SystemExit\nclass A:\n    """A class."""\n'
        '    def f(self, x=1):\n        """A method."""\n'
        'if True:\n    async def g(*, y):\n        """A function\n        of two lines."""\n'
    )
    (tmp_path / "test").mkdir()
    (tmp_path / "test/part.py").write_text('"""A test."""')
    (tmp_path / "broken.py").write_text("def (")
    assert read_docstrings(tmp_path) == [
        Document("module:package", "package\n\nA package."),
        Document(
            "module:package.part",
            "package.part\n\nA module.\n\npackage.part.A\n\nA class.\n\n"
            "package.part.A.f(self, x=1)\n\nA method.\n\n"
            "package.part.g(*, y)\n\nA function\nof two lines.",
        ),
    ]


def test_a_quotation_is_dropped_and_an_idiom_is_not():
    filler = "\n\n".join(f"filler number {n}" for n in range(20))
    first = Document("a", f"{LONG}\n\nSee also:\n\n{filler}")
    second = Document("b", f"  {LONG}\n\nSee also:\n\n{filler}")
    kept = drop_quotations([second, first])
    assert kept == [first, Document("b", f"See also:\n\n{filler}")]


def test_a_document_of_a_few_words_is_dropped():
    assert drop_quotations([Document("a", "too short to continue")]) == []


def test_a_document_stays_in_its_part_whatever_lies_beside_it(corpus):
    alone = split(corpus.held_out[:1])
    assert alone.held_out == corpus.held_out[:1] and not alone.train
