"""The folder of an unfinished run: `OUT.partial`, until it is renamed to `OUT`.

    state.json                    fingerprint, how far the run is, what it measured, and size and
                                  digest of every file that a resumed run reads again
    streams/NAME-SLOT.bin         hidden states of all windows before and after the block at work
    phase-P/block-I.safetensors   blocks that are finished
    phase-P/outer.safetensors     the student's embedding, norm and head, where a step trained them
    phase-P/training/             Orbax's, while a model step runs
    artifact/                     the finished folder, until it is named OUT

A stream is read from one slot and written to the other, so a kill in the middle of a block leaves
whole what the block began with. Recomputing it instead would change the result's last bits.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lqec_jax.core.disk import map_array
from lqec_jax.core.types import Params
from lqec_jax.errors import InputError
from lqec_jax.io.artifact.artifact import check_free
from lqec_jax.io.artifact.leaves import flatten, unflatten
from lqec_jax.io.files import read_json, replace_folder, write_json, write_tensors
from lqec_jax.io.tensor_file import read_entry, read_header
from lqec_jax.runs.checkpoints import Checkpoints
from lqec_jax.runs.record import check_file, check_size, describe_file, refuse
from lqec_jax.runs.state import STATE, has_digest, read_state, write_state

ARTIFACT, FISHER = "artifact", "fisher"
NO_DIGESTS = (
    "the unfinished run was begun by an earlier version, which kept no digests: sizes of its files "
    "are checked, their bytes cannot be"
)
REMADE = "the finished artifact was damaged and is written again from the run's last block"


class Run:
    """One compression, resumable from its folder.

    Attributes:
      state: 'phase' and 'blocks' finished so far, and what the driver adds to be kept with them.
      notes: what the user should know of a run that was taken up.
    """

    def __init__(self, folder: Path, out: Path | None, state: dict, notes: tuple[str, ...] = ()):
        self.folder, self.out, self.state, self.notes = folder, out, state, notes

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
            resume; what is to be read again is not what was written (names the file).
        Cost: of a run taken up, everything that it will read again is read and hashed.
        """
        fresh = {"fingerprint": dict(fingerprint), "phase": 0, "blocks": 0}
        if out is None:
            return cls(Path(tempfile.mkdtemp(prefix="lqec-")), None, fresh)
        check_run(out, resume=resume, overwrite=overwrite)
        folder = partial_folder(out)
        if resume:
            return _take_up(cls(folder, out, _resumed(folder, fingerprint)))
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
        write_state(self.folder, self.state)

    @property
    def resumable(self) -> bool:
        """Says whether another process may take this run up; then its files go on record."""
        return self.out is not None

    def save_block(self, phase: int, number: int, tree: Params) -> None:
        arrays, weights = flatten(tree)
        self.save_arrays(f"phase-{phase}/block-{number}.safetensors", arrays)
        path = self.folder / f"phase-{phase}" / f"block-{number}.json"
        write_json(path, weights)
        self._enter(path)

    def load_block(self, phase: int, number: int) -> Params:
        name = f"phase-{phase}/block-{number}"
        weights = read_json(self.folder / f"{name}.json")
        try:
            tree = unflatten(self.load_arrays(f"{name}.safetensors"), weights)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise refuse(self.folder, f"{name} is damaged ({error})") from error
        return jax.tree.map(jax.numpy.asarray, tree)

    def save_outer(self, phase: int, tree: Params) -> None:
        """Keeps what is outside the blocks, where a phase trained some of it."""
        self.save_arrays(f"phase-{phase}/outer.safetensors", flatten(tree)[0])

    def load_outer(self, phase: int) -> Params | None:
        """Returns what the latest phase up to this one kept, or None."""
        names = (f"phase-{n}/outer.safetensors" for n in range(phase, -1, -1))
        name = next((name for name in names if (self.folder / name).exists()), None)
        if name is None:
            return None
        return jax.tree.map(jax.numpy.asarray, unflatten(self.load_arrays(name), {}))

    def save_arrays(self, name: str, arrays: Mapping[str, Any]) -> None:
        """Writes a file of arrays; it is on record from the next commit on."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        write_tensors(path, dict(arrays))
        self._enter(path)

    def load_arrays(self, name: str) -> dict[str, np.ndarray]:
        """Reads a file of arrays."""
        return {key: read_entry(entry) for key, entry in read_header(self.folder / name).items()}

    def _enter(self, path: Path) -> None:
        if self.resumable:
            name = path.relative_to(self.folder).as_posix()
            self.state["files"] = self.state.get("files", {}) | {name: describe_file(path)}

    def stream(self, name: str, slot: int, shape: tuple[int, ...], dtype: Any) -> np.memmap:
        """Opens one side of a stream to be filled, making it if need be.

        Raises:
          OSError: the disk has no place for all of it.
        """
        path = self.folder / stream_name(name, slot)
        path.parent.mkdir(exist_ok=True)
        return map_array(path, dtype, shape)

    def read_stream(self, name: str, slot: int, shape: tuple[int, ...], dtype: Any) -> np.memmap:
        """Opens one side of a stream to be read.

        Raises:
          InputError: it is missing, or not of this size.
        """
        own, dtype = stream_name(name, slot), np.dtype(dtype)
        if not (self.folder / own).is_file():
            raise refuse(self.folder, f"{own} is missing")
        check_size(self.folder, own, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
        return np.memmap(self.folder / own, dtype, "r", shape=shape)

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

    def commit_artifact(self) -> None:
        """Records that the artifact is whole, and what it holds."""
        known = self.state.get("files", {}).items()
        self.state["files"] = {n: r for n, r in known if not n.startswith(f"{ARTIFACT}/")}
        for path in sorted((self.folder / ARTIFACT).rglob("*")):
            if path.is_file():
                self._enter(path)
        self.commit(artifact=True)

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
    return folder.is_dir() and all(
        path.name.startswith(STATE) and path.suffix == ".tmp" for path in folder.iterdir()
    )


def stream_name(name: str, slot: int) -> str:
    """Returns where a stream's slot lies in the folder."""
    return f"streams/{name}-{slot}.bin"


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


def _take_up(run: Run) -> Run:
    """Compares what a run will read again with its record, before anything is read for its sake."""
    files, state = run.state.get("files", {}), run.state
    if not has_digest(run.folder):
        run.notes += (NO_DIGESTS,)
    if run.artifact is not None:
        try:
            for name in (name for name in files if name.startswith(f"{ARTIFACT}/")):
                check_file(run.folder, name, files[name])
            return run
        except InputError:
            state["artifact"] = False
            run.notes += (REMADE,)
    for name, record in files.items():
        if _is_read_again(name, state["phase"], state["blocks"]):
            check_file(run.folder, name, record)
    for name, record in state.get("streams", {}).items():
        check_file(run.folder, stream_name(name, record["slot"]), record)
    return run


def _is_read_again(name: str, phase: int, blocks: int) -> bool:
    """Says whether a file is read by a run that has so much behind it.

    Of its own phase it reads what is committed, which alone is sure to be whole; of the phase
    before all blocks; of every phase before the embedding, norm and head.
    """
    found = re.fullmatch(r"phase-(\d+)/(?:block-(\d+)|outer)\.\w+", name)
    if not found:
        return name.startswith(f"{FISHER}/")
    of = int(found[1])
    if found[2] is None:
        return of < phase
    return of == phase - 1 or (of == phase and int(found[2]) < blocks)
