"""The text that every CPython carries: pydoc's topics and the standard library's docstrings.

Sources are parsed, never imported, so that the text depends on the Python version alone. A document
is a topic, or a module with the docstrings of all it defines. A paragraph is kept where it first
comes, in the order of names: topics quote one another, and a held-out text must not be quoted in
the text that is trained on. Which part a document is in depends on its name alone.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# Folders of the library that are no documentation, or not everywhere.
SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "_bundled",
}
# Characters from which on a repeated paragraph is a quotation and no idiom ("See also:").
QUOTATION = 60
# Shorter documents, in characters, say nothing that could be continued.
SHORTEST = 200
# Of 256 values of a hash: those below are held out; the next ones calibrate, and are trained on.
HELD_OUT, CALIBRATE = 13, 40


class Document(NamedTuple):
    name: str
    text: str


class Corpus(NamedTuple):
    """Documents by what they are for; `calibrate` is a part of `train`, `held_out` of neither."""

    train: tuple[Document, ...]
    calibrate: tuple[Document, ...]
    held_out: tuple[Document, ...]

    @property
    def sha256(self) -> str:
        """Hashes every document, its name and its part."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            for document in part:
                digest.update(f"{document.name}\0{document.text}\0".encode())
            digest.update(b"\1")
        return digest.hexdigest()


def read_corpus(library: Path | None = None) -> Corpus:
    """Gathers the running Python's text and splits it.

    Args:
      library: the folder of the standard library; the running Python's unless given.
    Example:
      >>> [len(part) for part in read_corpus()]  # Python 3.11.7
      [517, 51, 22]
    """
    library = Path(library or sysconfig.get_path("stdlib"))
    return split(drop_quotations([*read_topics(), *read_docstrings(library)]))


def read_topics() -> list[Document]:
    """Returns what `help('if')` and its like print."""
    from pydoc_data.topics import topics

    return [Document(f"topic:{name}", topics[name].strip()) for name in sorted(topics)]


def read_docstrings(library: Path) -> list[Document]:
    """Returns one document a module, of every docstring in it under the name it explains."""
    documents = []
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if SKIPPED & set(parts):
            continue
        name = ".".join(parts).removesuffix(".__init__")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # templates and samples of other Pythons lie there too
        documents.append(Document(f"module:{name}", "\n\n".join(_explanations(tree, name))))
    return documents


def drop_quotations(documents: Iterable[Document]) -> list[Document]:
    """Keeps every long paragraph where it first comes, and documents that are still worth it."""
    seen: set[str] = set()
    kept = []
    for name, text in sorted(documents):
        paragraphs = [p for p in text.split("\n\n") if p.strip() and not _is_known(p, seen)]
        if len(text := "\n\n".join(paragraphs)) >= SHORTEST:
            kept.append(Document(name, text))
    return kept


def split(documents: Iterable[Document]) -> Corpus:
    """Deals documents out by the hash of their names."""
    dealt = [(hashlib.sha256(document.name.encode()).digest()[0], document)
             for document in documents]  # fmt: skip
    return Corpus(
        train=tuple(document for place, document in dealt if place >= HELD_OUT),
        calibrate=tuple(document for place, document in dealt if HELD_OUT <= place < CALIBRATE),
        held_out=tuple(document for place, document in dealt if place < HELD_OUT),
    )


def _explanations(node: ast.AST, name: str) -> Iterator[str]:
    """Yields the docstring of a definition and of those inside it, each under its name."""
    defines = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    if defines and (docstring := ast.get_docstring(node)):
        yield f"{_title(node, name)}\n\n{docstring.strip()}"
    for child in ast.iter_child_nodes(node):
        inner = getattr(child, "name", None) if isinstance(child, ast.stmt) else None
        yield from _explanations(child, f"{name}.{inner}" if inner else name)


def _title(node: ast.AST, name: str) -> str:
    takes = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return f"{name}({ast.unparse(node.args)})" if takes else name


def _is_known(paragraph: str, seen: set[str]) -> bool:
    """Says whether a long paragraph came before, however it was indented, and remembers it."""
    words = " ".join(paragraph.split())
    if len(words) < QUOTATION:
        return False
    known = words in seen
    seen.add(words)
    return known
