"""Folders of the hub's cache are told from others by where they lie."""

from pathlib import Path

import pytest

from lqec_jax.core.hub_cache import find_repository, read_hub_id

CACHE = Path("/home/someone/hub/models--org--tiny--llama")


def test_a_snapshot_knows_its_repository():
    assert find_repository(CACHE / "snapshots" / "0123abc") == CACHE
    assert read_hub_id(CACHE) == "org/tiny--llama"


@pytest.mark.parametrize(
    "folder",
    [
        CACHE,
        CACHE / "snapshots",
        CACHE / "blobs" / "0123abc",
        CACHE / "snapshots" / "0123abc" / "below",
        CACHE.with_name("tiny") / "snapshots" / "0123abc",
    ],
)
def test_other_folders_have_none(folder):
    assert find_repository(folder) is None
