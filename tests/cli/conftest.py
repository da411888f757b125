"""What the tests of bad input spoil."""

import pytest

from tests.cli.spoiled import Place
from tests.golden.tiny_checkpoint import write_checkpoint, write_tokens


@pytest.fixture
def place(tmp_path):
    write_checkpoint(tmp_path / "model", num_hidden_layers=2)
    write_tokens(tmp_path / "calib.npy", 4)
    return Place(tmp_path)
