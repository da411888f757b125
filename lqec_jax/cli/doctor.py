"""`lqec doctor`: versions, devices, and pairs of versions that are known not to work together."""

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import import_module, metadata
from typing import NamedTuple

from lqec_jax.errors import CheckFailed

NEEDED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "safetensors",
          "tokenizers", "jinja2", "matplotlib", "PyYAML", "typer", "rich")  # fmt: skip
# Package -> (extra that installs it, what needs it).
OPTIONAL = {
    "transformers": ("hf", "older tokenizer files"),
    "huggingface_hub": ("hf", "models by hub id"),
    "datasets": ("hf", "texts named hf:NAME"),
    "pyarrow": ("parquet", "texts in .parquet"),
    "torch": ("parity", "parity tests"),
    "peft": ("parity", "parity tests"),
}
# What must import for anything to run; flax.nnx is not among them, the models are linen.
MODULES = ("jax", "flax.linen", "optax", "orbax.checkpoint", "safetensors", "tokenizers",
           "lqec_kernels", "lqec_jax.api")  # fmt: skip


class BadPair(NamedTuple):
    """Versions that do not work together, and what to do about them."""

    hit: Callable[[Mapping[str, tuple]], bool]
    text: str


BAD_PAIRS = (
    BadPair(
        lambda v: v["flax"] < (0, 12, 12) and v["jax"] >= (0, 11, 1),
        "flax below 0.12.12 with jax >= 0.11.1: `import flax.nnx` fails (lqec uses flax.linen, "
        "which imports); upgrade flax, or pin jax<0.11.1",
    ),
    BadPair(
        lambda v: v["flax"] >= (0, 12, 12) and v["jax"] < (0, 11, 1),
        "flax >= 0.12.12 asks for jax >= 0.11.1; upgrade jax, or pin flax==0.12.8",
    ),
    BadPair(
        lambda v: v["python"] < (3, 12) and v["jax"] >= (0, 11),
        "jax >= 0.11 does not support Python 3.11; use Python 3.12, or pin jax<0.11",
    ),
)


def doctor() -> None:
    """Show versions and devices, and check that they work together."""
    from lqec_jax.cli.printing import print_line, print_table

    installed = {name: find_version(name) for name in (*NEEDED, *OPTIONAL)}
    print_table(("package", "version", ""), describe_packages(installed))
    for pair in find_bad_pairs(installed, sys.version_info[:3]):
        print_line(f"known bad pair: {pair.text}")
    broken = [f"{name} is not installed" for name in NEEDED if installed[name] is None]
    broken += import_errors()
    if broken:
        raise CheckFailed(f"doctor: {'; '.join(broken)}")
    for line in describe_devices():
        print_line(line)
    print_line("everything that is needed works")


def find_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_packages(installed: Mapping[str, str | None]) -> list[tuple[str, str, str]]:
    """Returns a table's rows: package, version, what is missed without it."""
    rows = [("python", ".".join(map(str, sys.version_info[:3])), "")]
    for name, version in installed.items():
        note = "" if version else "needed"
        if not version and name in OPTIONAL:
            extra, purpose = OPTIONAL[name]
            note = f"optional, for {purpose}: pip install 'lqec-jax[{extra}]'"
        rows.append((name, version or "-", note))
    return rows


def find_bad_pairs(installed: Mapping[str, str | None], python: tuple[int, ...]) -> list[BadPair]:
    """Returns the known bad pairs among these versions; packages that are missing make none."""
    names = ("jax", "jaxlib", "flax")
    if not all(installed.get(name) for name in names):
        return []
    versions = {name: parse_version(installed[name]) for name in names} | {"python": python}
    return [pair for pair in BAD_PAIRS if pair.hit(versions)]


def parse_version(text: str) -> tuple[int, ...]:
    """Reads the leading numbers: '0.11.2rc1' is (0, 11, 2)."""
    numbers = []
    for part in text.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def import_errors() -> list[str]:
    """Imports what lqec needs; returns one line for each module that does not import."""
    lines = []
    for name in MODULES:
        try:
            import_module(name)
        except Exception as error:  # a broken package raises whatever it likes
            lines.append(f"import {name}: {type(error).__name__}: {' '.join(str(error).split())}")
    return lines


def describe_devices() -> list[str]:
    """Returns one line for each kind of device.

    Raises:
      CheckFailed: jax finds none.
    """
    import jax

    try:
        found = jax.devices()
    except RuntimeError as error:
        raise CheckFailed(f"doctor: jax finds no device: {' '.join(str(error).split())}") from error
    kinds = Counter((device.platform, device.device_kind) for device in found)
    return [f"devices: {count} x {kind} ({platform})" for (platform, kind), count in kinds.items()]
