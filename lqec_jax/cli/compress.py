"""`lqec compress`: the main job, and what it would make (`--dry-run`)."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lqec_jax.cli.options import (
    TEXTS,
    ArtifactOut,
    DenseModel,
    Overwrite,
    Quiet,
    ReportJson,
    Resume,
    flag,
    option,
)
from lqec_jax.errors import InputError

Calib = option(str | None, "TEXT", f"Calibration text: {TEXTS}")
RecipeText = option(
    str | None, "R", 'What to do, e.g. "rtn(bits=2, group_size=64) | rilq(rank=16)".'
)
Seqlen = option(int | None, "N", "Tokens of a calibration window. [default: 512]")
Windows = option(int | None, "N", "How many windows are read. [default: 320]")
ValRatio = option(float | None, "X", "Of them, the fraction for validation. [default: 0.2]")
Seed = option(int | None, "N", "[default: 0]")
Dtype = option(str | None, "D", "Of activations: float32, bfloat16 or auto. [default: auto]")
Mesh = option(
    str | None,
    "data=2,model=4",
    "Devices, or cores of a CPU, to split the work over. [default: one]",
)
Eval = option(
    str | None, "TEXT", "What the stages are scored on. [default: the validation windows]"
)
Config = option(str | None, "FILE", "YAML with any of these settings; flags win over it.")
Settings = option(
    list[str] | None,
    "A.B=C",
    "Changes one setting, after the file and the flags; may be repeated.",
    "--set",
)
DryRun = flag("--dry-run", "Check everything and print the sizes; write nothing.")


def compress(
    model: DenseModel,
    out: ArtifactOut,
    *,
    recipe: RecipeText = None,
    calib: Calib = None,
    seqlen: Seqlen = None,
    windows: Windows = None,
    val_ratio: ValRatio = None,
    seed: Seed = None,
    dtype: Dtype = None,
    mesh: Mesh = None,
    eval: Eval = None,
    config: Config = None,
    settings: Settings = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: ReportJson = None,
    quiet: Quiet = False,
) -> None:
    """Compress a model by a recipe into an artifact folder."""
    from lqec_jax.cli.config import resolve

    flags = {"recipe": recipe, "calib": calib, "seqlen": seqlen, "windows": windows, "seed": seed,
             "val_ratio": val_ratio, "dtype": dtype, "mesh": mesh, "eval": eval}  # fmt: skip
    chosen = resolve(flags, config, settings or ())
    for name in ("recipe", "calib"):
        if getattr(chosen, name) is None:
            raise InputError(f"compress: no {name}; give --{name}, or put {name}: into --config")
    if dry_run:
        _dry_run(model, out, chosen, resume=resume, overwrite=overwrite, json=json)
    else:
        _run(model, out, chosen, resume=resume, overwrite=overwrite, json=json, quiet=quiet)


def _run(model, out: Path, chosen, *, resume, overwrite, json, quiet) -> None:
    from lqec_jax.cli.printing import STDOUT, check_json, write_json
    from lqec_jax.cli.progress import reporting

    check_json(json)
    with _resumable(out):
        from lqec_jax import api

        arguments = _arguments(chosen)
        with reporting(quiet) as reporter:
            small = api.compress(model, chosen.recipe, chosen.calib, out=out, resume=resume,
                                 overwrite=overwrite, reporter=reporter, **arguments)  # fmt: skip
    if json is not None:
        write_json(json, small.report)
    if json != STDOUT and not quiet:
        _print_report(small.report, out)


def _arguments(chosen) -> dict[str, Any]:
    """Returns a configuration as keyword arguments of `api.compress`, its mesh made of devices."""
    from lqec_jax.train.sharding import make_mesh

    mesh = None
    if chosen.mesh is not None:
        _split_cpu(chosen.mesh.data * chosen.mesh.model)
        mesh = make_mesh(chosen.mesh.data, chosen.mesh.model)
    names = ("seqlen", "windows", "val_ratio", "seed", "eval", "dtype")
    return {name: getattr(chosen, name) for name in names} | {"mesh": mesh}


def _split_cpu(count: int) -> None:
    """Lets a CPU be as many devices as a mesh wants, a core each; nothing to an accelerator."""
    import os

    import jax

    # Refused once JAX has looked at its devices; then the mesh says how many there are.
    if count <= (os.cpu_count() or 1):
        with suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Says after an interruption that what was finished is kept."""
    try:
        yield
    except KeyboardInterrupt:
        import sys

        partial = out.with_name(out.name + ".partial")
        if (partial / "state.json").is_file():
            print(f"{partial} keeps what is finished; the same command with --resume continues it",
                  file=sys.stderr)  # fmt: skip
        raise


def _print_report(report: Mapping[str, Any], out: Path) -> None:
    from lqec_jax.cli.printing import format_number, print_line, print_stages

    print_stages(report["stages"])
    print_line(
        f"{report['bits_per_weight']:.4f} bits per weight over {len(report['linears'])} linears, "
        f"{report['seconds']:.1f} s, {report['peak_rss_mb']:.0f} MB at most"
    )
    for fit in report["fits"]:
        looks = {point["update"]: format_number(point["val_loss"]) for point in fit["history"]}
        best, last = fit["best_update"], fit["history"][-1]["update"]
        name = f"{fit['method']}, block {fit['layer']}" if "layer" in fit else fit["method"]
        print_line(
            f"{name}: validation loss {looks[0]} before, {looks[best]} at its best, "
            f"update {best} of {last}"
        )
        for note in fit["notes"]:
            print_line(f"{name}: {note}")
    for (name, note), count in _count_notes(report["linears"]).items():
        print_line(f"{name}: {note} ({count} of {len(report['linears'])} linears)")
    print_line(f"written to {out}")


def _count_notes(linears: Sequence[Mapping[str, Any]]) -> Counter:
    """Returns (method, note) -> of how many weights it was said."""
    return Counter(
        (step["method"], note)
        for linear in linears
        for step in linear["steps"]
        for note in step["notes"]
    )


def _dry_run(model, out: Path, chosen, *, resume, overwrite, json) -> None:
    from lqec_jax.cli.plan import print_plan
    from lqec_jax.cli.printing import STDOUT, check_json, print_line, write_json
    from lqec_jax.planning.plan import plan
    from lqec_jax.runs.folder import check_run
    from lqec_jax.runs.job import prepare

    check_json(json)
    check_run(out, resume=resume, overwrite=overwrite)
    arguments = _arguments(chosen)
    del arguments["mesh"]  # made, so it is possible
    job = prepare(model, chosen.recipe, chosen.calib, **arguments)
    names = ("seqlen", "windows", "val_ratio")
    facts = plan(model, job.recipe, **{name: getattr(chosen, name) for name in names})
    facts |= {"calibration": job.text_in_words}
    if json is not None:
        write_json(json, facts)
    if json != STDOUT:
        print_plan(facts)
        print_line(job.text_in_words)
        print_line(f"nothing was computed or written; leave out --dry-run to make {out}")
