"""Files of a model's folder that go into artifacts and exports as they are, byte for byte.

The tokenizer's, the chat template and generation_config.json. A folder may come from a stranger,
and what is written may go to others: a name in it that is a link to a file elsewhere would carry
that file, whatever it is, along.
"""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lqec_jax.core.hub_cache import find_repository
from lqec_jax.errors import InputError
from lqec_jax.io.sources.tokenizer import GENERATION
from lqec_jax.models.model import Model


def find_carried(tokenizer: object | None, folder: Path | None) -> list[Path]:
    """Returns the files to carry, each checked to lie in its folder.

    Args:
      tokenizer: has `files`; its folder's generation_config.json is one of them.
      folder: the model's, asked where there is no tokenizer.
    Raises:
      InputError: a file is a link that leads out of its folder.
    """
    if tokenizer is not None:
        paths = tokenizer.files()
    else:
        paths = [folder / GENERATION] if folder is not None else []
    for path in paths:
        _check_inside(path)
    return [path for path in paths if path.is_file()]


def copy_carried(model: Model, folder: Path) -> None:
    """Copies a model's carried files into a folder.

    Raises:
      InputError: as `find_carried`.
    """
    for path in find_carried(model.tokenizer, model.folder):
        shutil.copyfile(path, folder / path.name)


def compare_models(model: Model, other: Model) -> list[str]:
    """Returns, in words, where two models that are compared read a text otherwise or are unlike."""
    notes = []
    if model.tokenizer is not None and other.tokenizer is not None:
        ours, theirs = (_read_files(m.tokenizer) for m in (model, other))
        names = [n for n in sorted({*ours, *theirs}) if ours.get(n) != theirs.get(n)]
        notes += [
            f"{other.folder} has another tokenizer ({', '.join(names)}); the text was read by the "
            "model's own"
        ] * bool(names)
    ours, theirs = asdict(model.config), asdict(other.config)
    fields = [name for name in ours if ours[name] != theirs[name]]
    if fields:
        notes.append(f"{other.folder} has another config.json ({', '.join(fields)})")
    return notes


def _read_files(tokenizer: Any) -> dict[str, bytes]:
    """Returns what a tokenizer reads, by file; where texts end does not enter."""
    return {path.name: path.read_bytes() for path in tokenizer.files() if path.name != GENERATION}


def _check_inside(path: Path) -> None:
    home, target = path.parent.resolve(), path.resolve()
    roots = {home, find_repository(home) or home}  # the cache's snapshots are links to its blobs
    if not any(target.is_relative_to(root) for root in roots):
        raise InputError(
            f"{path} is a link to {target}, outside of the model's folder, and would be copied "
            "along; put the file itself in its place"
        )
