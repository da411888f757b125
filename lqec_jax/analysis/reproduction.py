"""An artifact made again from its own record, and compared: the same bytes, or where they part.

What decides the bytes is on record: recipe, seed, dtype, digests of the model and of the windows of
its texts. Versions, the processor and its cores can change the last bits; where they are others,
that is said beside a difference.
"""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lqec_jax import api
from lqec_jax.core.progress import Reporter
from lqec_jax.errors import CheckFailed, InputError
from lqec_jax.evaluate.report import describe_environment
from lqec_jax.io.artifact.artifact import is_artifact, read_meta
from lqec_jax.io.artifact.digests import read_digests
from lqec_jax.runs.job import prepare
from lqec_jax.runs.making import count_threads, read_making

# Of `made`: what decides the result, and what a difference in it means.
DECIDES = {
    "model": "the model is another one (--model)",
    "calibration": "the calibration text gives other windows (--calib)",
    "eval": "the scored text gives other windows (--eval)",
    "recipe": "the recipe is spelled otherwise by this version",
}


@dataclass(frozen=True)
class Reproduced:
    """An artifact that came out the same.

    Attributes:
      tensors: how many were compared.
      unlike: what is not as it was then, in words: versions, cores.
    """

    folder: Path
    tensors: int
    unlike: tuple[str, ...]


def reproduce(
    artifact: str | Path,
    *,
    model: str | Path | None = None,
    calib: str | Path | None = None,
    eval: str | Path | None = None,
    reporter: Reporter | None = None,
) -> Reproduced:
    """Runs the compression that made an artifact again and compares every byte that counts.

    report.json and its pages hold times, and are not compared.

    Args:
      model, calib, eval: where they lie; what the record names, unless given.
    Raises:
      InputError: no record; something that the record names is not here, or is another one.
      CheckFailed: the bytes differ; names the first difference and what is unlike then.
    Cost: the compression's.
    """
    folder = Path(artifact)
    if not is_artifact(folder):
        raise InputError(f"reproduce: {folder} is no lqec artifact; name one that compress wrote")
    meta = read_meta(folder)
    made = read_making(meta.get("made", {}), folder)
    digests = read_digests(folder, meta)
    if digests is None:
        raise InputError(f"reproduce: {folder} has no digests to compare with; compress again")
    needed = {
        "model": _find(model, made["model_name"], "--model", made["model"]),
        "calib": _find(calib, made["calib_name"], "--calib", made["calibration"]),
        "eval": eval if made["eval_name"] is None else _find(
            eval, made["eval_name"], "--eval", made["eval"]
        ),
    }  # fmt: skip
    if made["mesh"] is not None:
        raise InputError(
            f"reproduce: it was made on a mesh {made['mesh']}, and reproduce runs on one device; "
            "run compress with that --mesh and compare the two lqec.json"
        )
    settings = {name: made[name] for name in ("seqlen", "windows", "val_ratio", "seed", "dtype")}
    _check_inputs(made, prepare(needed["model"], made["recipe"], needed["calib"],
                                eval=needed["eval"], **settings).fingerprint)  # fmt: skip
    unlike = tuple(_find_unlike(meta))
    with tempfile.TemporaryDirectory(prefix="lqec-") as place:
        again = Path(place) / "again"
        api.compress(needed["model"], made["recipe"], needed["calib"], eval=needed["eval"],
                     out=again, reporter=reporter, **settings)  # fmt: skip
        new = read_meta(again)
    for difference in _find_differences(meta, digests, new, new["digests"]):
        then = f"; unlike then: {', '.join(unlike)}" if unlike else "; versions and cores are alike"
        raise CheckFailed(f"{folder}: not reproduced: {difference}{then}")
    return Reproduced(folder, len(digests["tensors"]), unlike)


def _find(given: Any, name: str | None, option: str, digest: str) -> Any:
    """Returns where something lies: as given, or what the record names where that is here."""
    if given is not None:
        return given
    here = name is not None and (
        name == "demo" or name.startswith(("demo:", "hf:")) or Path(name).exists() or "/" in name
    )
    if not here:
        what = f"{name!r} is not here" if name else "it came from memory"
        raise InputError(
            f"reproduce: {what}; give {option}, whose digest is {digest[:12]} (sha256)"
        )
    return name


def _check_inputs(made: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    other = [words for name, words in DECIDES.items() if made[name] != fingerprint[name]]
    if other:
        raise InputError(f"reproduce: {'; '.join(other)}; give what the artifact was made of")


def _find_unlike(meta: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is not as it was when the artifact was made."""
    now, then = describe_environment()["versions"], meta.get("versions")
    then = then if isinstance(then, dict) else {}
    for name in now:
        if now[name] != then.get(name):
            yield f"{name} was {then.get(name)}, is {now[name]}"
    threads = meta["made"].get("threads")
    if threads != count_threads():
        yield f"{threads} cores then, {count_threads()} now"


def _find_differences(
    meta: Mapping[str, Any],
    old: Mapping[str, Any],
    again: Mapping[str, Any],
    new: Mapping[str, Any],
) -> Iterator[str]:
    """Yields where two artifacts part, in words, weights first."""
    for kind, what in (("tensors", "tensors"), ("files", "files")):
        names = sorted({*old[kind], *new[kind]})
        other = [name for name in names if old[kind].get(name) != new[kind].get(name)]
        if other:
            yield f"{len(other)} of {len(names)} {what} differ, first {other[0]!r}"
    for name in ("recipe", "seed", "base_fingerprint", "weights"):
        if meta.get(name) != again.get(name):
            yield f"{name} in lqec.json differs"
