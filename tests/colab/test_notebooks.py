"""Every notebook runs from top to bottom at a tiny size, in a process of its own, offline."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/lqec-jax/lqec_jax/blob/main/colab/{name})"
)
MOST_CELLS = 14
# What makes a notebook tiny, and a line that it then prints.
SMALLER = {
    "01_quickstart": {"UPDATES = 120": "UPDATES = 2", "windows=64": "windows=4",
                      "windows=160": "windows=10", "seqlen=256": "seqlen=64",
                      "max_new_tokens=40": "max_new_tokens=8"},
    "02_write_a_method": {"windows=16)": "windows=4)", "windows=8)": "windows=2)",
                          "seqlen=256": "seqlen=64"},
    "03_flax": {"UPDATES = 300": "UPDATES = 8", "(4, 3, 2)": "(2,)"},
    "04_write_a_training": {"UPDATES = 60": "UPDATES = 2", "windows=48": "windows=5",
                            "seqlen=256": "seqlen=64"},
}  # fmt: skip
SAYS = {
    "01_quickstart": r"RILQ +\d+\.\d+ +\(",
    "02_write_a_method": r"sigma +\| svd: perplexity \d",
    "03_flax": r"held-out loss \d\.\d+ at 6\.0\d bits per weight",
    "04_write_a_training": r"end_to_end +perplexity \d+\.\d+ \(calib-val",
}
# Reads cells as JSON and runs each as the notebook would, in one namespace. A cell that would reach
# for the network fails.
RUNNER = """
import json, socket, sys

def refuse(*args):
    raise RuntimeError("a notebook must not need the network")

socket.socket.connect = refuse
names = {"__name__": "__main__"}
for number, source in enumerate(json.load(sys.stdin)):
    exec(compile(source, f"<code cell {number}>", "exec"), names)
"""


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def without_magics(source: str) -> str:
    """Makes lines for the notebook's shell do nothing: they install what is installed here."""
    return re.sub(r"^(\s*)([%!].*)$", r"\1pass  # not run here: \2", source, flags=re.M)


def code_of(path: Path) -> list[str]:
    cells = ("".join(c["source"]) for c in read(path)["cells"] if c["cell_type"] == "code")
    return [without_magics(source) for source in cells]


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == set(SMALLER) == set(SAYS)


def test_magics_are_taken_out_where_they_stand():
    source = "try:\n    import x\nexcept ImportError:\n    %pip install x\n!ls\ny = 7 % 4\n"
    tree = ast.parse(without_magics(source))
    assert [type(node).__name__ for node in tree.body] == ["Try", "Pass", "Assign"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_clean_and_opens_in_colab(path):
    cells = read(path)["cells"]
    assert len(cells) <= MOST_CELLS
    assert "".join(cells[0]["source"]).startswith(BADGE.format(name=path.name))
    install = "".join(cells[1]["source"])
    assert install.index("import lqec_jax") < install.index("%pip install -q lqec-jax")
    for cell in cells:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
    assert not re.search(r"/(root|home|work|tmp|Users|content)/", path.read_text())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    cells = code_of(path)
    for full, tiny in SMALLER[path.stem].items():
        assert any(full in cell for cell in cells), f"{full!r} is not in the notebook any more"
        cells = [cell.replace(full, tiny) for cell in cells]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(cells),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(SAYS[path.stem], done.stdout), done.stdout
