"""`lqec reproduce`: an artifact made again from its own record."""

from lqec_jax.cli.options import NumbersJson, Quiet, argument, option

Artifact = argument(str, "An artifact that `lqec compress` wrote.")
Model = option(str | None, "MODEL", "Where the dense model lies. [default: as the record names it]")
Calib = option(str | None, "TEXT", "Where the calibration text lies. [default: as recorded]")
Eval = option(str | None, "TEXT", "Where the scored text lies. [default: as recorded]")


def reproduce(
    artifact: Artifact,
    *,
    model: Model = None,
    calib: Calib = None,
    eval: Eval = None,
    json: NumbersJson = None,
    quiet: Quiet = False,
) -> None:
    """Make an artifact again from its own record and compare the bytes."""
    from lqec_jax.cli.printing import STDOUT, check_json, print_line, write_json
    from lqec_jax.cli.progress import reporting

    check_json(json)
    from lqec_jax.analysis.reproduction import reproduce

    with reporting(quiet) as reporter:
        found = reproduce(artifact, model=model, calib=calib, eval=eval, reporter=reporter)
    if json is not None:
        write_json(json, {**vars(found), "folder": str(found.folder)})
    if json != STDOUT:
        print_line(f"{found.folder}: reproduced, {found.tensors} tensors equal to the bit")
        for words in found.unlike:
            print_line(f"though unlike then: {words}")
