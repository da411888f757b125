"""How an artifact was made, as its `lqec.json` keeps it: what another run needs to make it again.

Texts and models go by name, without the place where they lay, and by the digest that counts: of a
text that of its windows, of a model that of its bytes.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lqec_jax.errors import InputError
from lqec_jax.evaluate.card import describe_base
from lqec_jax.io.sources.hf import EMBEDDED
from lqec_jax.runs.job import Job

COMPRESS, FINETUNE = "compress", "finetune"
KINDS = {"recipe": str, "seed": int, "model": str, "calibration": str, "eval": str, "dtype": str,
         "seqlen": int, "windows": int, "val_ratio": (int, float)}  # fmt: skip
NAMES = ("model_name", "calib_name", "eval_name", "mesh")  # None where there is none


def describe_making(
    job: Job, *, calib: Any, held_out: Any, val_ratio: float, mesh: Any
) -> dict[str, Any]:
    """Returns the record of a compression.

    Args:
      calib, held_out: as they were given.
    """
    folder = job.source.folder
    base = {"name": "demo"} if folder == EMBEDDED else describe_base(folder)
    return {
        "verb": COMPRESS,
        **job.fingerprint,
        "model_name": base.get("hub_id", base.get("name")),
        "calib_name": _name_text(calib),
        "eval_name": _name_text(held_out),
        "seqlen": job.text.seqlen,
        "windows": int(job.asked),
        "val_ratio": float(val_ratio),
        "mesh": None if mesh is None else str(dict(mesh.shape)),
        "threads": count_threads(),
    }


def read_making(made: Mapping[str, Any], where: Path) -> Mapping[str, Any]:
    """Returns the record of a compression, checked.

    Raises:
      InputError: there is none, or it is damaged, or it is of another verb.
    """
    if not made:
        raise InputError(
            f"{where} does not say how it was made: it is older than such records, or was put "
            "together by hand; compress again to have one"
        )
    if made.get("verb") == FINETUNE:
        raise InputError(
            f"{where} was made by finetune, from another artifact and rows with the digest "
            f"{str(made.get('examples'))[:12]}; reproduce runs compressions, so reproduce that "
            "artifact, run finetune again, and compare with `lqec verify`"
        )
    named = all(isinstance(made.get(name), str | None) for name in NAMES)
    if (
        not named
        or made.get("verb") != COMPRESS
        or not all(isinstance(made.get(name), kind) for name, kind in KINDS.items())
    ):
        raise InputError(f"{where}: `made` in its lqec.json is damaged; restore the file")
    return made


def count_threads() -> int:
    """Returns how many cores this process may use, on which the order of some sums depends."""
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def _name_text(text: Any) -> str | None:
    """Returns a text's name without its place; None for ids that came from memory."""
    if not isinstance(text, str | Path):
        return None
    return str(text) if str(text).startswith(("hf:", "demo:")) else Path(text).name
