"""report.json read back: fields that are there are of the kinds that a run writes.

What goes on with an artifact, `finetune`, adds to its report hours later; a damaged one is found
when the artifact is opened.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lqec_jax.errors import InputError
from lqec_jax.io.files import read_json

REPORT = "report.json"
NUMBER = (int, float, type(None))
# Of a report, of a row of its lists; any field may be missing but those that every row has.
KINDS = {"base": dict, "recipe": str, "seed": NUMBER, "bits_per_weight": NUMBER, "stages": list,
         "linears": list, "fits": list, "skipped": list, "notes": list, "finetune": dict,
         "peak_rss_mb": NUMBER, "seconds": NUMBER, "environment": dict}  # fmt: skip
ROWS = {
    "stages": {"name": str, "ppl": NUMBER, "low": NUMBER, "high": NUMBER, "nll": NUMBER,
               "tokens": NUMBER, "protocol": str, "seconds": NUMBER},
    "linears": {"path": str, "d_in": int, "d_out": int, "bits_per_weight": NUMBER,
                "relative_error": NUMBER, "relative_error_before": NUMBER, "steps": list},
    "fits": {"method": str, "history": list, "best_update": int, "notes": list, "data": dict},
    "skipped": {"path": str, "reason": str},
}  # fmt: skip
ALWAYS = {"stages": (), "linears": ("path", "relative_error", "bits_per_weight"),
          "fits": ("method", "history", "best_update"), "skipped": ("path", "reason")}  # fmt: skip


def read_report(folder: Path) -> dict[str, Any]:
    """Reads an artifact's report; {} where it has none.

    Raises:
      InputError: it is no JSON; a field is of another kind than a run writes, by name.
    """
    if not (folder / REPORT).exists():
        return {}
    report = read_json(folder / REPORT)
    for fault in _find_faults(report):
        raise InputError(
            f"{folder / REPORT}: {fault}; restore the file, or move it away: the weights do not "
            "need it"
        )
    return report


def _find_faults(report: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is of another kind, in words."""
    yield from _find_kinds(report, KINDS, "")
    versions = report.get("environment", {}).get("versions", {})
    if not isinstance(versions, dict):
        yield "environment.versions is damaged"
    for name, kinds in ROWS.items():
        for number, row in enumerate(report.get(name, ())):
            place = f"{name}[{number}]"
            if not isinstance(row, dict):
                yield f"{place} is damaged"
            yield from _find_kinds(row, kinds, f"{place}.")
            yield from (f"{place} has no {field}" for field in ALWAYS[name] if field not in row)


def _find_kinds(row: Mapping[str, Any], kinds: Mapping[str, Any], place: str) -> Iterator[str]:
    for name, kind in kinds.items():
        if name in row and (not isinstance(row[name], kind) or isinstance(row[name], bool)):
            yield f"{place}{name} is {str(row[name])[:60]!r}, which no run writes"
