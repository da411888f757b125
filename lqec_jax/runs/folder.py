"""The folder of an unfinished run: `OUT.partial`, until it is renamed to `OUT`.

    state.json                    fingerprint, how far the run is, what it measured
    streams/NAME-SLOT.bin         hidden states of all windows before and after the block at work
    phase-P/block-I.safetensors   blocks that are finished
    phase-P/outer.safetensors     the student's embedding, norm and head, where a step trained them
    phase-P/training/             Orbax's, while a model step runs
    artifact/                     the finished folder, until it is named OUT

A stream is read from one slot and written to the other, so a kill in the middle of a block leaves
whole what the block began with. Recomputing it instead would change the result's last bits.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lqec_jax.core.types import Params
from lqec_jax.errors import InputError
from lqec_jax.io.artifact.artifact import check_free
from lqec_jax.io.artifact.leaves import flatten, unflatten
from lqec_jax.io.files import read_json, replace_folder, write_json, write_tensors
from lqec_jax.io.tensor_file import read_entry, read_header
from lqec_jax.runs.checkpoints import Checkpoints

STATE, ARTIFACT = "state.json", "artifact"


class Run:
    """One compression, resumable from its folder.

    Attributes:
      state: 'phase' and 'blocks' finished so far, and what the driver adds to be kept with them.
    """

    def __init__(self, folder: Path, out: Path | None, state: dict):
        self.folder, self.out, self.state = folder, out, state

    @classmethod
    def begin(
        cls, out: Path | None, fingerprint: Mapping[str, Any], *, resume: bool, overwrite: bool
    ) -> "Run":
        """Starts a run, or takes up the one that `out` was left with.

        Args:
          out: the finished folder to be; None works in a temporary folder and cannot resume.
          fingerprint: everything that decides the result, by name.
        Raises:
          InputError: `out` exists; an unfinished run is there and neither `resume` nor `overwrite`
            was said; the unfinished run was of other settings (names them); there is nothing to
            resume.
        """
        fresh = {"fingerprint": dict(fingerprint), "phase": 0, "blocks": 0}
        if out is None:
            return cls(Path(tempfile.mkdtemp(prefix="lqec-")), None, fresh)
        check_run(out, resume=resume, overwrite=overwrite)
        folder = partial_folder(out)
        if resume:
            return cls(folder, out, _resumed(folder, fingerprint))
        try:
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
        except OSError as error:
            raise InputError(
                f"{folder} cannot be made: {error.strerror}; choose another place"
            ) from error
        run = cls(folder, out, fresh)
        run.commit()
        return run

    def commit(self, **changes: Any) -> None:
        """Records progress; everything it speaks of must be on disk already."""
        self.state |= changes
        write_json(self.folder / STATE, self.state)

    def save_block(self, phase: int, number: int, tree: Params) -> None:
        folder = self.folder / f"phase-{phase}"
        folder.mkdir(exist_ok=True)
        arrays, weights = flatten(tree)
        write_tensors(folder / f"block-{number}.safetensors", arrays)
        write_json(folder / f"block-{number}.json", weights)

    def load_block(self, phase: int, number: int) -> Params:
        path = self.folder / f"phase-{phase}" / f"block-{number}.safetensors"
        arrays = {name: read_entry(entry) for name, entry in read_header(path).items()}
        tree = unflatten(arrays, read_json(path.with_suffix(".json")))
        return jax.tree.map(jax.numpy.asarray, tree)

    def save_outer(self, phase: int, tree: Params) -> None:
        """Keeps what is outside the blocks, where a phase trained some of it."""
        folder = self.folder / f"phase-{phase}"
        folder.mkdir(exist_ok=True)
        write_tensors(folder / "outer.safetensors", flatten(tree)[0])

    def load_outer(self, phase: int) -> Params | None:
        """Returns what the latest phase up to this one kept, or None."""
        paths = (self.folder / f"phase-{n}" / "outer.safetensors" for n in range(phase, -1, -1))
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            return None
        arrays = {name: read_entry(entry) for name, entry in read_header(path).items()}
        return jax.tree.map(jax.numpy.asarray, unflatten(arrays, {}))

    def stream(self, name: str, slot: int, shape: tuple[int, ...], dtype: Any) -> np.memmap:
        """Opens one side of a stream, making it if need be."""
        path = self.folder / "streams" / f"{name}-{slot}.bin"
        path.parent.mkdir(exist_ok=True)
        return np.memmap(path, np.dtype(dtype), "r+" if path.exists() else "w+", shape=shape)

    def training(self, phase: int) -> Checkpoints:
        """Opens the checkpoints of a model step."""
        return Checkpoints(self.folder / f"phase-{phase}" / "training")

    def begin_artifact(self) -> Path:
        """Makes the empty folder that the artifact is written into."""
        folder = self.folder / ARTIFACT
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run wrote of it
        folder.mkdir()
        folder.chmod(0o755)
        return folder

    @property
    def artifact(self) -> Path | None:
        """Returns the artifact that is whole and waits for its name, None where there is none."""
        folder = self.folder / ARTIFACT
        return folder if self.state.get("artifact") and folder.is_dir() else None

    def finish(self, artifact: Path) -> None:
        """Gives the finished artifact its name and removes what is left of the run."""
        replace_folder(artifact, self.out)
        self.discard()

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def partial_folder(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def check_run(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuses what `Run.begin` would refuse whatever the settings; writes nothing."""
    check_free(out, overwrite)
    folder = partial_folder(out)
    begun = (folder / STATE).is_file()
    if resume and not begun:
        raise InputError(f"there is no unfinished run at {folder}; leave out --resume")
    if resume or not os.path.lexists(folder):
        return
    if not begun and not _is_empty(folder):
        raise InputError(f"{folder} exists and is no unfinished run; move it away")
    if begun and not overwrite:
        raise InputError(
            f"{folder} holds an unfinished run; add --resume to continue it, "
            "or --overwrite to begin again"
        )


def _is_empty(folder: Path) -> bool:
    """Says whether a folder holds nothing but what a kill in a run's first instant leaves."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {f"{STATE}.tmp"}


def read_state(folder: Path) -> dict[str, Any]:
    """Reads how far a run is.

    Raises:
      InputError: the file is missing or damaged.
    """
    state = read_json(folder / STATE)
    kinds = {"fingerprint": dict, "phase": int, "blocks": int}
    if not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        raise InputError(f"{folder / STATE} is damaged; --overwrite begins again")
    return state


def _resumed(folder: Path, fingerprint: Mapping[str, Any]) -> dict:
    state = read_state(folder)
    before = state["fingerprint"]
    changed = [name for name in fingerprint if before.get(name) != fingerprint[name]]
    if changed:
        shown = "; ".join(f"{n} was {before.get(n)!r}, is {fingerprint[n]!r}" for n in changed)
        raise InputError(
            f"{folder} was begun with other settings: {shown}; "
            "give the same ones, or --overwrite to begin again"
        )
    return state
