"""The laws of the house that a machine can check: who imports whom, what a method is, mirrors."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lqec_jax.methods import METHODS
from tests.ladder import LADDER, SIDEWAYS, draw_table, level_of, part_of
from tests.sources import (
    BENCH,
    KERNELS,
    ROOT,
    SOURCES,
    STUDIES,
    imported,
    imported_at_top,
    name_of,
    parse,
)

METHOD_FOLDERS = ("quantizers", "sparsifiers", "compensation", "transforms", "trainings")

# Imported only inside the function that needs it, wherever that is.
LAZY = {"orbax", "transformers", "torch", "triton", "jax_triton", "matplotlib", "pyarrow",
        "datasets", "huggingface_hub", "peft"}  # fmt: skip
# Sources whose test has another name, and why.
MIRRORS = {
    "lqec_jax/core/progress.py": ("tests/cli/test_progress.py", "a protocol that the cli fills"),
    "lqec_jax/models/config.py": ("tests/models/test_llama_config.py", "records, no behaviour"),
    "lqec_jax/models/raw_config.py": ("tests/models/test_llama_config.py", "read by a family"),
    "lqec_jax/models/families.py": ("tests/models/test_llama_config.py", "the families' table"),
    "lqec_jax/models/llama.py": ("tests/models/test_llama_config.py", "a family is its config"),
    "lqec_jax/models/mistral.py": ("tests/models/test_family_configs.py", "a family is its config"),
    "lqec_jax/models/qwen2.py": ("tests/models/test_family_configs.py", "a family is its config"),
    "lqec_jax/models/qwen3.py": ("tests/models/test_family_configs.py", "a family is its config"),
    "lqec_jax/models/opt.py": ("tests/models/test_family_configs.py", "a family is its config"),
    "lqec_jax/models/gemma2.py": ("tests/models/test_family_configs.py", "a family is its config"),
    "lqec_jax/models/rotary.py": ("tests/models/test_family_configs.py", "what families share"),
    "lqec_jax/models/parameters.py": (
        "tests/models/test_family_logits.py",
        "named and loaded there",
    ),
    "lqec_jax/models/layers.py": ("tests/models/test_llama_logits.py", "parts of a decoder"),
    "lqec_jax/models/decoder.py": ("tests/models/test_llama_logits.py", "equals the original"),
    "lqec_jax/io/sources/chat_worker.py": (
        "tests/io/sources/test_chat.py",
        "the process that chat.py starts, run there",
    ),
    "lqec_jax/analysis/__init__.py": ("tests/analysis/test_ranks.py", "a docstring"),
    "lqec_jax/planning/__init__.py": ("tests/planning/test_plan.py", "a docstring"),
    "lqec_jax/planning/machines.py": ("tests/planning/test_plan.py", "figures of the makers"),
    "lqec_jax/__init__.py": ("tests/test_house.py", "names only; loading them is tested here"),
    "lqec_jax/demo/__init__.py": ("tests/demo/test_run.py", "a path"),
    "lqec_jax/train/__init__.py": ("tests/train/test_update.py", "re-exports"),
    "lqec_jax/cli/__init__.py": ("tests/cli/test_app.py", "re-exports main"),
    "lqec_jax/__main__.py": ("tests/test_house.py", "one line, run below as a subprocess"),
    "kernels/lqec_kernels/fields.py": ("tests/kernels/test_formats.py", "how formats say theirs"),
    "kernels/lqec_kernels/triton_codes.py": (
        "tests/kernels/test_triton_source.py",
        "what the kernels read, compiled and interpreted with them",
    ),
    "kernels/lqec_kernels/mosaic_kernel.py": (
        "tests/kernels/test_mosaic_matmul.py",
        "interpreted, lowered and compiled where it is called",
    ),
    "kernels/lqec_kernels/mosaic_steps.py": (
        "tests/kernels/test_mosaic_matmul.py",
        "what the kernel is made of, interpreted and compiled with it",
    ),
    "kernels/lqec_kernels/__init__.py": ("tests/kernels/test_api.py", "re-exports"),
}


def part_of_file(path: Path) -> str:
    for part, paths in (("lqec_kernels", KERNELS), ("bench", BENCH), ("studies", STUDIES)):
        if path in paths:
            return part
    return path.relative_to(ROOT / "lqec_jax").parts[0].removesuffix(".py")


def method_modules() -> dict[str, list[str]]:
    """Returns the module of every row of the table -> the names of its rows."""
    modules: dict[str, list[str]] = {}
    for name, row in METHODS.items():
        modules.setdefault(row.factory.partition(":")[0], []).append(name)
    return modules


def test_the_walk_sees_the_house():
    names = {name_of(path) for path in SOURCES}
    assert {"lqec_jax/core/types.py", "kernels/lqec_kernels/packing.py"} <= names
    assert len(names) >= 30
    assert "jax" in imported_at_top(parse(ROOT / "lqec_jax/core/types.py"))


# Imports


def find_arrows() -> Iterator[tuple[str, str, str]]:
    """Yields (part, part it imports, where) of every import from one part of another."""
    for path in SOURCES + BENCH + STUDIES:
        part = part_of_file(path)
        for module in imported(parse(path)):
            if (other := part_of(module)) not in (None, part):
                yield part, other, f"{name_of(path)} imports {module}"


def test_imports_go_down_the_ladder():
    wrong = [
        where
        for part, other, where in find_arrows()
        if level_of(other) >= level_of(part) and (part, other) not in SIDEWAYS
    ]
    assert not wrong


def test_the_ladder_has_ten_levels_at_most_and_no_empty_step():
    assert len(LADDER) <= 10
    here = {part_of_file(path) for path in SOURCES + BENCH + STUDIES}
    assert {part for parts in LADDER for part in parts} == here
    arrows = {(part, other) for part, other, _ in find_arrows()}
    assert set(SIDEWAYS) <= arrows, "nobody takes these ways any more"
    assert all(level_of(part) == level_of(other) for part, other in SIDEWAYS)


def test_the_benchmarks_of_kernels_use_kernels_alone():
    parts = {part_of(module) for path in BENCH for module in imported(parse(path))}
    assert parts - {None} == {"lqec_kernels"}


def test_the_readme_draws_the_ladder():
    # `python -m tests.ladder` writes it.
    assert draw_table() in (ROOT / "README.md").read_text()


def test_kernels_depend_on_jax_only():
    # numpy comes with jax; Triton's kernels are written in one package and called by another.
    more = {"triton_source.py": {"triton"}, "triton_codes.py": {"triton"},
            "triton_matmul.py": {"jax_triton"}}  # fmt: skip
    for path in KERNELS:
        packages = {module.partition(".")[0] for module in imported(parse(path))}
        known = {"jax", "numpy", "lqec_kernels"} | more.get(path.name, set())
        assert packages - sys.stdlib_module_names <= known, path


def test_flax_is_imported_by_models_only():
    # Ours, and the bridge to other people's.
    models = ("lqec_jax/models/", "lqec_jax/foreign/")
    wrong = [
        name_of(path)
        for path in SOURCES
        if "flax" in {module.partition(".")[0] for module in imported(parse(path))}
        and not name_of(path).startswith(models)
        and name_of(path) not in ("lqec_jax/io/exports/flax.py", "lqec_jax/io/sources/flax.py")
    ]
    assert not wrong


def test_optional_packages_are_imported_where_they_are_needed():
    # Triton compiles a kernel from its module, which `triton_matmul` imports where it calls one.
    kernels = [f"kernels/lqec_kernels/triton_{part}.py" for part in ("source", "codes")]
    wrong = {
        name_of(path): imported_at_top(parse(path)) & LAZY
        for path in SOURCES
        if name_of(path) not in kernels
    }
    assert not {name: packages for name, packages in wrong.items() if packages}


def test_errors_methods_and_the_front_door_need_the_standard_library_only():
    for name in ("errors", "methods", "__init__"):
        packages = {
            module.partition(".")[0] for module in imported(parse(ROOT / f"lqec_jax/{name}.py"))
        }
        assert packages - sys.stdlib_module_names <= {"lqec_jax"}, name


@pytest.mark.parametrize(
    "command",
    [
        ["-c", "import lqec_jax; dir(lqec_jax)"],
        ["-m", "lqec_jax", "--help"],
        ["-m", "lqec_jax", "methods"],
    ],
    ids=["import", "help", "methods"],
)
def test_the_front_door_loads_no_jax(command):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "TERM": "dumb"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    modules = (line.rpartition("|")[2].strip() for line in done.stderr.splitlines())
    loaded = {module.partition(".")[0] for module in modules}
    assert "lqec_jax" in loaded
    assert not loaded & {"jax", "jaxlib", "flax", "optax", "lqec_kernels", *LAZY}
    if "methods" in command:
        assert all(name in done.stdout for name in METHODS)


def test_every_public_name_can_be_loaded():
    package = importlib.import_module("lqec_jax")
    first = {name: getattr(package, name) for name in package.__all__}
    assert None not in first.values()
    # Importing a module sets an attribute of its package, which must not hide a verb.
    assert {name: getattr(package, name) for name in package.__all__} == first
    with pytest.raises(AttributeError, match="lqec_jax.*no_such_name"):
        package.no_such_name  # noqa: B018


# Methods


@pytest.mark.parametrize("module", method_modules())
def test_a_method_knows_what_is_below_it_and_no_other_method(module):
    path = ROOT / (module.replace(".", "/") + ".py")
    reach = {part_of(name) for name in imported(parse(path))} - {None}
    allowed = {"core", "errors", "lqec_kernels"}
    if any(METHODS[name].scope != "linear" for name in method_modules()[module]):
        allowed |= {"train"}
    assert reach <= allowed


def test_every_file_of_a_method_folder_is_a_row_of_the_table():
    files = {
        name_of(path).removesuffix(".py").replace("/", ".")
        for folder in METHOD_FOLDERS
        for path in (ROOT / "lqec_jax" / folder).glob("*.py")
        if path.name != "__init__.py"
    }
    assert files == set(method_modules())


@pytest.mark.parametrize("name", METHODS)
def test_a_row_is_one_line_and_its_factory_takes_named_arguments_with_defaults(name):
    row = METHODS[name]
    table = (ROOT / "lqec_jax/methods.py").read_text().splitlines()
    assert sum(line.startswith(f'    "{name}": Method(') for line in table) == 1
    module, _, attribute = row.factory.partition(":")
    factory = getattr(importlib.import_module(module), attribute)
    for parameter in inspect.signature(factory).parameters.values():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, parameter
    assert row.scope in ("linear", "block", "model")
    assert all(row) and row.idea[0].islower() and not row.idea.endswith(".")


@pytest.mark.parametrize("module", method_modules())
def test_a_method_cites(module):
    loaded = importlib.import_module(module)
    paper = re.compile(r"arXiv:\d{4}\.\d{5}|[A-Z][a-z]+( et al\.| & [A-Z]\w+)?,? \(?(19|20)\d\d")
    assert paper.search(" ".join(loaded.__doc__.split())), "the module's docstring names no paper"
    for name in method_modules()[module]:
        cited, said = (
            re.sub(r"[^\w.]+", " ", text) for text in (METHODS[name].paper, loaded.__doc__)
        )
        assert cited.partition(" §")[0] in said, f"the table cites {cited}, the docstring does not"
    assert isinstance(loaded.REFERENCE, str) and loaded.REFERENCE
    code = re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{7,40} \S.*", loaded.REFERENCE)
    assert code or loaded.REFERENCE in ("closed form", "our choice"), "code@commit file, or a word"


# Tests


def mirror_of(path: Path) -> str:
    if path in KERNELS:
        return f"tests/kernels/test_{path.name}"
    inside = path.relative_to(ROOT / "lqec_jax")
    return (Path("tests") / inside.parent / f"test_{path.name}").as_posix()


def test_every_source_has_its_mirror():
    expected = {
        name_of(path): MIRRORS.get(name_of(path), (mirror_of(path), ""))[0] for path in SOURCES
    }
    missing = [
        f"{name} has no {test}" for name, test in expected.items() if not (ROOT / test).is_file()
    ]
    assert not missing, "\n".join(missing)


def test_every_exemption_is_needed():
    for source, (_, reason) in MIRRORS.items():
        assert reason and (ROOT / source).is_file(), source
        assert not (ROOT / mirror_of(ROOT / source)).is_file(), f"{source} has its mirror"


# Addresses

OTHER_TREES = {
    "lqec_jax/foreign/axes.py": "an example of somebody's tree",
    "lqec_jax/io/sources/flax.py": "a name in transformers' Flax trees",
}


def spells_an_address(path: Path) -> bool:
    """Says whether a string other than a docstring holds the address of a linear's weight."""
    tree = parse(path)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return any(
        isinstance(node, ast.Constant) and isinstance(node.value, str)
        and "/kernel" in node.value and id(node) not in prose
        for node in ast.walk(tree)
    )  # fmt: skip


def test_addresses_of_weights_are_spelled_by_their_owner_alone():
    found = {name_of(path) for path in SOURCES if spells_an_address(path)}
    assert found == set(OTHER_TREES)
