"""Where the authors' numbers lie; tests that read them skip where that is not here."""

from collections.abc import Callable

import numpy as np
import pytest

from tests.golden.authors.problems import Linear
from tests.golden.authors.tiny_llama import TinyLlama


@pytest.fixture(scope="session")
def golden(shared) -> Callable[[str], dict]:
    """Returns a reader of one file of numbers by its name."""
    folder = shared / "data" / "golden"
    if not folder.is_dir():
        pytest.skip("the authors' numbers are not here: no folder ../shared/data/golden")

    def read(name: str) -> dict:
        with np.load(folder / f"{name}.npz") as stored:
            return dict(stored)

    return read


@pytest.fixture(scope="session")
def linear(golden) -> Linear:
    """The weight and inputs that all methods of single weights were run on, AWQ but for its own."""
    stored = golden("linear_problem")
    live, dead = stored["x_full"].astype(np.float32), int(stored["dead"])
    x = live.copy()
    x[:, dead] = 0
    return Linear(stored["w"].astype(np.float32), live, x, dead, int(stored["seqs"]))


@pytest.fixture(scope="session")
def llama(golden) -> TinyLlama:
    """The decoder that all trainings were run on."""
    return TinyLlama(golden("tiny_llama"))
