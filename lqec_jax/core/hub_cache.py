"""The hub's cache on disk: models--ORG--NAME/snapshots/REVISION, whose files link to its blobs."""

from pathlib import Path

_PREFIX = "models--"


def find_repository(snapshot: Path) -> Path | None:
    """Returns the cache's folder of the repository that a folder is a snapshot of; None elsewhere.

    Args:
      snapshot: an absolute path; links in it are not followed.
    """
    home = snapshot.parent.parent
    cached = snapshot.parent.name == "snapshots" and home.name.startswith(_PREFIX)
    return home if cached else None


def read_hub_id(repository: Path) -> str:
    """Returns 'org/name' of a folder that `find_repository` found."""
    return repository.name.removeprefix(_PREFIX).replace("--", "/", 1)
