"""`lqec inspect`: what is in a folder, read from headers alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lqec_jax.cli.options import argument, json_of

AnyFolder = argument(str, "A model folder, an artifact, or an OUT.partial.")
Json = json_of("The same")


def inspect(
    path: AnyFolder,
    *,
    json: Json = None,
) -> None:
    """Show what is in a model folder, an artifact, or an unfinished run."""
    from lqec_jax.cli.printing import STDOUT, check_json, write_json

    check_json(json)
    facts = describe(path)
    if json is not None:
        write_json(json, facts)
    if json != STDOUT:
        _PRINTERS[facts["kind"]](facts)


def describe(path: str) -> dict[str, Any]:
    """Returns what a folder holds; 'kind' is dense, artifact or run.

    Raises:
      InputError: it is none of these, or damaged.
    """
    from lqec_jax.io.sources.source import open_folder
    from lqec_jax.runs.folder import STATE, partial_folder

    folder = Path(path)
    if not folder.exists() and folder.name and (partial_folder(folder) / STATE).is_file():
        folder = partial_folder(folder)
    if (folder / STATE).is_file():
        return _describe_run(folder)
    found = open_folder(path)
    return _describe_artifact(found.folder) if found.kind == "artifact" else _describe_dense(found)


def _describe_dense(found) -> dict[str, Any]:
    from lqec_jax.core.sites import kernel_path
    from lqec_jax.io.sources.source import open_dense
    from lqec_jax.models.parameters import linear_sites

    checkpoint, config, family = open_dense(found)
    tensors = family.block_tensors(config)
    layers = range(config.layers)
    linears = [
        row
        for path, tensor in ((s.path, tensors[kernel_path(s)]) for s in linear_sites(config))
        for row in _rows(path, [_stored(checkpoint, tensor, layer) for layer in layers])
    ]
    return {"kind": "dense", **_model(config, checkpoint), "linears": linears}


def _stored(checkpoint, tensor, layer: int) -> Any:
    """Returns a dense weight as shapes."""
    import jax

    dtype = checkpoint.dtype(tensor.name.format(layer=layer))
    return jax.ShapeDtypeStruct(tensor.inner_shape, dtype)


def _describe_artifact(folder: Path) -> dict[str, Any]:
    from lqec_jax.core import sites
    from lqec_jax.io.artifact.artifact import load_shapes
    from lqec_jax.io.artifact.digests import find_changes, read_digests
    from lqec_jax.io.artifact.report import read_report
    from lqec_jax.models.parameters import linear_sites

    meta, checkpoint, config, tree = load_shapes(folder)
    linears = [
        row
        for site in linear_sites(config)
        for row in _rows(site.path, [sites.get(block, site) for block in tree["blocks"]])
    ]
    weights = sum(row["count"] * row["d_in"] * row["d_out"] for row in linears)
    report, digests = read_report(folder), read_digests(folder, meta)
    return {
        "kind": "artifact",
        **_model(config, checkpoint),
        "recipe": meta["recipe"],
        "seed": meta.get("seed"),
        "base_fingerprint": meta["base_fingerprint"],
        "versions": meta.get("versions", {}),
        "bits_per_weight": 8 * sum(row["stored_bytes"] for row in linears) / weights,
        "changed": find_changes(folder, meta, digests, checkpoint.entries) if digests else None,
        "linears": linears,
        "stages": _stages(report),
        "data": [fit["data"]["file"] for fit in report.get("fits", []) if "data" in fit],
    }


def _describe_run(folder: Path) -> dict[str, Any]:
    from lqec_jax.runs.folder import read_state

    state = read_state(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {
        "kind": "run",
        "folder": str(folder),
        "stored_bytes": size,
        "settings": state["fingerprint"],
        "phase": state["phase"],
        "blocks": state["blocks"],
        "stages": _stages(state),
    }


def _model(config, checkpoint) -> dict[str, Any]:
    entries = checkpoint.entries.values()
    return {
        "folder": str(checkpoint.folder),
        "family": config.family,
        "layers": config.layers,
        "d_model": config.d_model,
        "d_ff": config.d_ff,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "vocab_size": config.vocab_size,
        "max_length": config.max_length,
        "parameters": _parameters(config),
        "stored_bytes": sum(entry.bytes for entry in entries),
    }


def _parameters(config) -> int:
    import math

    from lqec_jax.models import families

    family = families.family(config.family)
    block = sum(math.prod(shape) for shape in family.block_shapes(config).values())
    outer = sum(math.prod(stored.shape) for stored in family.outer_tensors(config).values())
    return outer + config.layers * block


def _rows(path: str, weights: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns one row for each make of one linear over the blocks, most often just one."""
    from lqec_jax.core.tree import is_compressed
    from lqec_jax.io.artifact.leaves import name_format
    from lqec_kernels.formats import CompressedLinear, Dense

    leaves = [w if is_compressed(w) else CompressedLinear(Dense(w)) for w in weights]
    makes: dict[tuple[str, int], list] = {}
    for leaf in leaves:
        makes.setdefault((name_format(leaf), leaf.stored_bits()), []).append(leaf)
    return [
        {
            "path": path,
            "count": len(same),
            "d_in": same[0].d_in,
            "d_out": same[0].d_out,
            "format": name,
            "bits_per_weight": same[0].bits_per_weight,
            "stored_bytes": len(same) * bits // 8,
        }
        for (name, bits), same in makes.items()
    ]


def _stages(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = ("name", "ppl", "low", "high", "protocol", "seconds")
    return [{name: stage.get(name) for name in names} for stage in report.get("stages", [])]


def _print_dense(facts: Mapping[str, Any]) -> None:
    from lqec_jax.cli.printing import print_linears

    _print_model(facts)
    print_linears(facts["linears"])


def _print_artifact(facts: Mapping[str, Any]) -> None:
    from lqec_jax.cli.printing import print_line, print_linears, print_stages

    _print_model(facts)
    print_linears(facts["linears"])
    print_line(f"{facts['bits_per_weight']:.4f} bits per weight")
    print_line(f"recipe: {facts['recipe']}")
    for name in facts["data"]:
        print_line(f"finetune: on the rows of {name}, not on a calibration text")
    for fault in facts["changed"] or ():
        print_line(f"changed since: {fault}")
    print_line(f"seed {facts['seed']}, made from {facts['base_fingerprint']}")
    print_stages(facts["stages"])


def _print_run(facts: Mapping[str, Any]) -> None:
    from lqec_jax.cli.printing import format_bytes, print_line, print_stages

    print_line(f"{facts['folder']}: an unfinished run, {format_bytes(facts['stored_bytes'])}")
    print_line(f"finished: {facts['phase']} phases, and {facts['blocks']} blocks of the next")
    for name, value in facts["settings"].items():
        print_line(f"{name}: {value}")
    print_stages(facts["stages"])
    print_line("the command that began it continues it with --resume")


_PRINTERS = {"dense": _print_dense, "artifact": _print_artifact, "run": _print_run}


def _print_model(facts: Mapping[str, Any]) -> None:
    from lqec_jax.cli.printing import format_bytes, print_line

    print_line(
        f"{facts['folder']}: {facts['family']}, {facts['parameters']} parameters, "
        f"{format_bytes(facts['stored_bytes'])}"
    )
    print_line(
        f"{facts['layers']} layers, d_model {facts['d_model']}, d_ff {facts['d_ff']}, "
        f"{facts['heads']} heads ({facts['kv_heads']} for keys and values), "
        f"{facts['vocab_size']} tokens, context {facts['max_length']}"
    )
