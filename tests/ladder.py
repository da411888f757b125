"""Who may import whom: the one place where it is said. The README's table is drawn from it.

python -m tests.ladder      writes the table into README.md
"""

import re

from tests.sources import ROOT

# A part may import parts of lower levels and itself; parts of one level do not see one another,
# except where SIDEWAYS says so. Part -> what it is, where its name does not say it.
LADDER: tuple[dict[str, str], ...] = (
    {"errors": "", "lqec_kernels": "formats, packing, products (jax only; Triton where called)"},
    {
        "core": "types, tree, linear, grids, closed forms, argument checks",
        "bench": "products alone",
    },
    {"train": "parts, losses, one loop, one update, sharding"},
    {
        "quantizers": "",
        "sparsifiers": "",
        "compensation": "",
        "transforms": "",
        "trainings": "",
        "models": "families (flax)",
    },
    {
        "methods": "the table",
        "recipe": "",
        "calibration": "text to tokens",
        "evaluate": "scores and pages",
        "io": "disk to pytree and back",
    },
    {"runs": "one run: blocks, steps, checkpoints"},
    {
        "api": "the verbs",
        "planning": "",
        "analysis": "",
        "demo": "",
        "foreign": "other people's Flax models",
    },
    {"cli": ""},
    {"__init__": "public names, loaded when asked for", "__main__": ""},
    {"studies": "measurements, users of the verbs"},
)
SIDEWAYS = {
    ("recipe", "methods"): "a recipe names rows of the table",
    ("analysis", "api"): "a comparison is a user of the verbs",
    ("demo", "api"): "the demo is a user of the verbs",
}
# Parts that lie outside of lqec_jax.
FOLDERS = {
    "lqec_kernels": "kernels/lqec_kernels",
    "bench": "kernels/bench",
    "studies": "configs/studies",
}
HEAD = "| level | parts: each may import those above it, none beside it |\n|---|---|\n"


def level_of(part: str) -> int:
    levels = [level for level, parts in enumerate(LADDER) if part in parts]
    assert levels, f"{part!r} has no place on the ladder: give it one in tests/ladder.py"
    return levels[0]


def part_of(module: str) -> str | None:
    """Returns which part of the house a module belongs to, None for other people's."""
    first, _, rest = module.partition(".")
    if first == "lqec_kernels":
        return "lqec_kernels"
    if first == "lqec_jax":
        return rest.partition(".")[0] or "__init__"
    return "studies" if first == "configs" else None


def draw_table() -> str:
    """Returns the README's table."""
    return HEAD + "".join(f"| L{n} | {draw_level(parts)} |\n" for n, parts in enumerate(LADDER))


def draw_level(parts: dict[str, str]) -> str:
    cells = [f"`{FOLDERS.get(part, part)}`{note and ': ' + note}" for part, note in parts.items()]
    arrows = [f"`{one}` → `{other}`" for one, other in SIDEWAYS if one in parts]
    return " · ".join(cells) + (f"; but {', '.join(arrows)}" if arrows else "")


def write_table() -> None:
    """Puts the table in the place of the README's."""
    path = ROOT / "README.md"
    table = re.compile(re.escape(HEAD) + r"(\|.*\n)+")
    text, found = table.subn(lambda _: draw_table(), path.read_text())
    assert found == 1, f"README.md has no table that begins with {HEAD.splitlines()[0]}"
    path.write_text(text)


if __name__ == "__main__":
    write_table()
