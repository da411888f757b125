"""`lqec plan`: what a compression will take, from config.json and file headers alone."""

from collections.abc import Mapping
from typing import Any

from lqec_jax.cli.options import argument, json_of, option

Model = argument(str, "A folder, weights in it or not, or a hub id.")
RecipeText = option(str, "R", "As for compress.")
Seqlen = option(int, "N", "Tokens of a calibration window.")
Windows = option(int, "N", "Calibration windows.")
ValRatio = option(float, "X", "Of them, for validation.")
Paper = option(str | None, "P", "Also that paper's accounting of the model: int2.1.")
Json = json_of("The plan")


def plan(
    model: Model,
    *,
    recipe: RecipeText,
    seqlen: Seqlen = 512,
    windows: Windows = 320,
    val_ratio: ValRatio = 0.2,
    paper: Paper = None,
    json: Json = None,
) -> None:
    """Say what a compression will take, and which machines hold it."""
    from lqec_jax.cli.printing import STDOUT, check_json, write_json

    check_json(json)
    from lqec_jax.planning.plan import plan as make_plan

    facts = make_plan(
        model, recipe, seqlen=seqlen, windows=windows, val_ratio=val_ratio, paper=paper
    )
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
    if "int21" in facts:
        print_line()
        _print_int21(facts)


def _print_here(facts: Mapping[str, Any]) -> None:
    from lqec_jax.cli.printing import format_size, print_line, print_table

    here = facts["here"]
    rows = [
        (phase["name"], where, part, format_size(size))
        for phase in here["phases"]
        for where in ("host", "device")
        for part, size in phase[where].items()
        if size
    ]
    print_table(("phase", "where", "part", "size"), rows, right=1)
    together = " (host and device are one memory)" if here["device_peak_bytes"] is None else ""
    device = "" if together else f", device {format_size(here['device_peak_bytes'])}"
    print_line(
        f"estimated peaks here, on {here['backend']}: host {format_size(here['host_peak_bytes'])}"
        f"{device}{together}; OUT.partial holds {format_size(facts['run_bytes'])}"
    )


def _print_machines(machines: list[Mapping[str, Any]]) -> None:
    from lqec_jax.cli.printing import format_size, print_line, print_table

    rows = [
        (
            machine["name"],
            "fits" if machine["fits"] else f"does not fit; would: {machine['change']}",
            f"{format_size(machine['host_peak_bytes'])} of {format_size(machine['host_bytes'])}",
            f"{format_size(machine['device_peak_bytes'])} of "
            f"{format_size(machine['device_bytes'])}",
            _time(machine["seconds"]),
        )
        for machine in machines
    ]
    print_table(("machine", "", "host", "device", "passes"), rows, right=3)
    print_line(
        "estimates: memory within a fifth on the CPU it was measured on, host memory beside an "
        "accelerator assumed; time at 35% of the peak arithmetic, quantizing not counted"
    )


def _print_int21(facts: Mapping[str, Any]) -> None:
    from lqec_jax.cli.printing import format_size, print_line

    theirs = facts["int21"]
    print_line(
        f"INT2.1's layout of this model ({theirs['bits']} bits, groups of {theirs['group_size']}, "
        f"rank {theirs['rank']}): {format_size(theirs['base_bytes'])}, with adapters x "
        f"{theirs['overhead']:.3f} (x {theirs['overhead_without_down']:.3f} without those of the "
        f"down projections; the paper's name says x {theirs['paper']['overhead']}); this recipe's "
        f"whole artifact: {format_size(facts['file_bytes'])}"
    )
    training, paper = theirs["training"], theirs["paper"]
    dense16, dense32 = (format_size(training[f"dense{bits}_bytes"]) for bits in (16, 32))
    print_line(
        f"INT2.1's fine-tuning of it (adapters of rank {training['rank']} on "
        f"{' and '.join(training['linears'])}, one window of {training['tokens']} tokens, blocks "
        f"recomputed), estimated: {format_size(training['packed_bytes'])}, "
        f"{training['saving']:.1f} times less than the {dense16} over 16-bit weights and "
        f"{training['saving_from_32']:.1f} times less than the {dense32} over 32-bit ones; the "
        f"paper's figures, of LLaMA-7B: {format_size(paper['packed_bytes'])} and "
        f"{paper['saving']} times, so "
        f"{format_size(round(paper['packed_bytes'] * paper['saving']))} before"
    )


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"
