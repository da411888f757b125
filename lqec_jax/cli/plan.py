"""`lqec plan`: what a compression will take, from config.json and file headers alone."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

Recipe = Annotated[str, typer.Option(metavar="R", help="As for compress.")]
Seqlen = Annotated[int, typer.Option(metavar="N", help="Tokens of a calibration window.")]
Windows = Annotated[int, typer.Option(metavar="N", help="Calibration windows.")]
ValRatio = Annotated[float, typer.Option(metavar="X", help="Of them, for validation.")]
Json = Annotated[str | None, typer.Option("--json", metavar="[FILE]",
    help="The plan as JSON, to FILE or standard output.")]  # fmt: skip


def plan(
    model: Annotated[str, typer.Argument(help="A folder, weights in it or not, or a hub id.")],
    *,
    recipe: Recipe,
    seqlen: Seqlen = 512,
    windows: Windows = 320,
    val_ratio: ValRatio = 0.2,
    json: Json = None,
) -> None:
    """Say what a compression will take, and which machines hold it."""
    from lqec_jax.cli.printing import STDOUT, check_json, write_json

    check_json(json)
    from lqec_jax.planning.plan import plan as make_plan

    facts = make_plan(model, recipe, seqlen=seqlen, windows=windows, val_ratio=val_ratio)
    if json is not None:
        write_json(json, facts)
    if json != STDOUT:
        print_plan(facts)


def print_plan(facts: Mapping[str, Any]) -> None:
    """Prints sizes, peaks and verdicts as tables."""
    from lqec_jax.cli.printing import format_bytes, print_line, print_linears

    print_linears(facts["linears"])
    print_line(
        f"{facts['bits_per_weight']:.4f} bits per weight: {format_bytes(facts['stored_bytes'])}, "
        f"from {format_bytes(facts['dense_bytes'])}"
    )
    print_line(f"kept as they are (embedding, norms, head): {format_bytes(facts['kept_bytes'])}")
    print_line(f"the artifact's safetensors: {format_bytes(facts['file_bytes'])}, exactly")
    text = facts["text"]
    print_line(
        f"to read: {text['windows']} windows of {text['seqlen']} tokens, {text['score']} of them "
        "for validation"
    )
    print_line()
    _print_here(facts)
    print_line()
    _print_machines(facts["machines"])
    print_line()
    _print_int21(facts)


def _print_here(facts: Mapping[str, Any]) -> None:
    from lqec_jax.cli.printing import print_line, print_table

    here = facts["here"]
    rows = [
        (phase["name"], where, part, _giga(size))
        for phase in here["phases"]
        for where in ("host", "device")
        for part, size in phase[where].items()
    ]
    print_table(("phase", "where", "part", "GB"), rows, right=1)
    together = " (host and device are one memory)" if here["device_peak_bytes"] is None else ""
    device = "" if together else f", device {_giga(here['device_peak_bytes'])} GB"
    print_line(
        f"estimated peaks here, on {here['backend']}: host {_giga(here['host_peak_bytes'])} GB"
        f"{device}{together}; OUT.partial holds {_giga(facts['run_bytes'])} GB"
    )


def _print_machines(machines: list[Mapping[str, Any]]) -> None:
    from lqec_jax.cli.printing import print_line, print_table

    rows = [
        (
            machine["name"],
            "fits" if machine["fits"] else f"does not fit; would: {machine['change']}",
            f"{_giga(machine['host_peak_bytes'])} of {_giga(machine['host_bytes'])}",
            f"{_giga(machine['device_peak_bytes'])} of {_giga(machine['device_bytes'])}",
            _time(machine["seconds"]),
        )
        for machine in machines
    ]
    print_table(("machine", "", "host GB", "device GB", "passes"), rows, right=3)
    print_line(
        "estimates: memory within a fifth on the CPU it was measured on, host memory beside an "
        "accelerator assumed; time at 35% of the peak arithmetic, quantizing not counted"
    )


def _print_int21(facts: Mapping[str, Any]) -> None:
    from lqec_jax.cli.printing import print_line

    theirs = facts["int21"]
    print_line(
        f"INT2.1's layout of this model ({theirs['bits']} bits, groups of {theirs['group_size']}, "
        f"rank {theirs['rank']}): {_giga(theirs['base_bytes'])} GB, with adapters x "
        f"{theirs['overhead']:.3f} (x {theirs['overhead_without_down']:.3f} without those of the "
        f"down projections; the paper's name says x {theirs['paper']['overhead']}); this recipe's "
        f"whole artifact: {_giga(facts['file_bytes'])} GB"
    )
    training, paper = theirs["training"], theirs["paper"]
    print_line(
        f"INT2.1's fine-tuning of it (adapters of rank {training['rank']} on "
        f"{' and '.join(training['linears'])}, one window of {training['tokens']} tokens, blocks "
        f"recomputed), estimated: {_giga(training['packed_bytes'])} GB, "
        f"{training['saving']:.1f} times less than the {_giga(training['dense16_bytes'])} GB over "
        f"16-bit weights and {training['saving_from_32']:.1f} times less than the "
        f"{_giga(training['dense32_bytes'])} GB over 32-bit ones; the paper's figures, of "
        f"LLaMA-7B: {_giga(paper['packed_bytes'])} GB and {paper['saving']} times, so "
        f"{_giga(round(paper['packed_bytes'] * paper['saving']))} GB before"
    )


def _giga(size: int) -> str:
    return f"{size / 1e9:.2f}"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
