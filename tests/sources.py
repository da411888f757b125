"""The sources as text, for the tests that read them instead of running them."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "lqec_jax").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels" / "lqec_kernels").rglob("*.py"))
SOURCES = PACKAGE + KERNELS
# Scripts that use them: measurements of products alone, and of whole models.
BENCH = sorted(p for p in (ROOT / "kernels").rglob("*.py") if p not in KERNELS)
STUDIES = sorted((ROOT / "configs").rglob("*.py"))
# Everything written here is read by the same reader; scripts beside the package count too.
WRITTEN = sorted(
    path
    for folder in ("lqec_jax", "kernels", "tests", "colab", "configs")
    for path in (ROOT / folder).rglob("*.py")
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imported(tree: ast.AST) -> Iterator[str]:
    """Yields every module, and every name taken from one, that is imported anywhere below."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_at_top(tree: ast.Module) -> set[str]:
    """Returns the packages imported when the module is: those outside every function."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    found, left = set(), list(ast.iter_child_nodes(tree))
    while left:
        node = left.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {name.partition(".")[0] for name in imported(node)}
        elif not isinstance(node, functions):
            left += ast.iter_child_nodes(node)
    return found
