"""Training state between two runs, kept by Orbax; nothing else is."""

import logging
from pathlib import Path
from typing import Any

import jax


class Checkpoints:
    """Keeps the newest training state under a folder: three methods around Orbax's manager.

    A state is (arrays, facts): a pytree, and JSON. It is written under a temporary name and
    renamed, so a kill leaves the one before.
    """

    def __init__(self, folder: Path):
        import orbax.checkpoint as ocp

        # Orbax logs every file it touches, and the failures of its own threads, as if ours.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self._args = ocp.args
        options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, update: int, arrays: Any, facts: dict) -> None:
        """Begins to write a state; the arrays may be consumed as soon as this returns."""
        self._manager.save(
            update,
            args=self._args.Composite(
                arrays=self._args.StandardSave(arrays), facts=self._args.JsonSave(facts)
            ),
        )

    def restore(self, like: Any) -> tuple[Any, dict] | None:
        """Returns the newest whole state, its arrays placed like `like`, or None."""
        update = self._manager.latest_step()
        if update is None:
            return None
        target = jax.tree.map(_abstract, like)
        saved = self._manager.restore(
            update,
            args=self._args.Composite(
                arrays=self._args.StandardRestore(target), facts=self._args.JsonRestore()
            ),
        )
        return saved["arrays"], saved["facts"]

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.close()


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
