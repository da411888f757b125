"""report.html: a report as one page that needs no other file, no script and no network.

The page is made from report.json alone, and the same report gives the same bytes. What a report
does not hold the page leaves out.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lqec_jax.evaluate.figures import draw_errors, draw_losses, draw_pareto

PAGE = "report.html"
TEACHER = "teacher"  # in the place of a recipe
NOT_FINITE, NOT_MEASURED = "not finite", "not measured"


def render_report(report: Mapping[str, Any]) -> str:
    """Returns a report as an HTML page.

    Args:
      report: as `report.build_report` returns it, or read from report.json; any field may be
        missing.
    """
    stages, linears = report.get("stages", ()), list(_split_paths(report.get("linears", ())))
    measured = [linear for linear in linears if linear["relative_error"] is not None]
    in_depth = [linear for linear in measured if linear["layer"] is not None]
    return render(
        "report.html.j2",
        title=_title(report),
        recipe=report.get("recipe", ""),
        facts=list(_facts(report)),
        stages=list(tabulate_stages(stages)),
        fits=[_show_fit(number, fit) for number, fit in enumerate(report.get("fits", ()))],
        errors=Markup(draw_errors("errors", in_depth)) if in_depth else None,
        kinds=list(_tabulate_kinds(linears)),
        linears=[_show_linear(linear) for linear in linears],
        skipped=report.get("skipped", ()),
        environment=list(_flatten(report.get("environment", {}))),
    )


def render_comparison(results: Mapping[str, Any]) -> str:
    """Returns a comparison as an HTML page: perplexity over bits per weight, and a row a recipe.

    Args:
      results: as results.json of `comparison.compare`.
    """
    rows = [
        {**row, "number": number, "family": " | ".join(find_methods(row["recipe"]))}
        for number, row in enumerate(results["rows"])
    ]
    teacher = next((row["ppl"] for row in rows if row["recipe"] == TEACHER), None)
    made = [row for row in rows if row["recipe"] != TEACHER]
    digests = {f"{name}, sha256" if len(str(value)) == 64 else name: value
               for name, value in results["settings"].items()}  # fmt: skip
    return render(
        "comparison.html.j2",
        title=f"{results['model']}: {len(made)} ways to compress it",
        protocol=results["protocol"],
        tokens=next((row["tokens"] for row in rows if "tokens" in row), 0),
        pareto=Markup(draw_pareto("pareto", made, teacher))
        if any(r["ppl"] for r in made)
        else None,
        rows=[show_row(row) | {"number": row["number"], "error": row["error"]} for row in rows],
        settings=list(_flatten({**digests, **results["environment"]})),
    )


def show_row(row: Mapping[str, Any]) -> dict[str, str]:
    """Returns the numbers of a row of a comparison as text; what was not measured is empty."""

    def number(name: str, digits: int) -> str:
        return "" if row[name] is None else format_number(row[name], digits)

    scored = row["error"] is None
    interval = f"{format_number(row['low'])} to {format_number(row['high'])}" if scored else ""
    return {
        "recipe": row["recipe"],
        "artifact": row["artifact"] or "",
        "seed": "" if row["seed"] is None else str(row["seed"]),
        "bits_per_weight": number("bits_per_weight", 3),
        "ppl": format_number(row["ppl"]) if scored else "",
        "interval": interval,
        "kl": format_number(row["kl"], 4) if scored else "",
        "top1": f"{row['top1']:.1%}" if scored else "",
        "seconds": number("seconds", 1),
        "peak_rss_mb": number("peak_rss_mb", 0),
    }


def find_methods(recipe: str) -> list[str]:
    """Returns the names of a recipe's steps, in order.

    Example:
      >>> find_methods("rtn(bits=2, group_size=32) | svd")
      ['rtn', 'svd']
    """
    return re.findall(r"(?:^|\| )(\w+)", recipe)


def render(template: str, **values: Any) -> str:
    """Fills a template of this folder; text is escaped, a `Markup` is not."""
    environment = Environment(
        loader=PackageLoader("lqec_jax", "evaluate"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)


def tabulate_stages(stages: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields a table a protocol, its numbers as text: two protocols never share a column."""
    for protocol in dict.fromkeys(stage.get("protocol", "") for stage in stages):
        same = [stage for stage in stages if stage.get("protocol", "") == protocol]
        yield {"protocol": protocol or "no protocol", "rows": [_show_stage(s) for s in same]}


def format_number(value: float | None, digits: int = 3) -> str:
    """Writes a number of a report with so many digits after the point; fewer where it is large."""
    if value is None:
        return NOT_FINITE
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.0f}"


def _title(report: Mapping[str, Any]) -> str:
    name = report.get("base", {}).get("name")
    return f"{name}, compressed" if name else "A compressed model"


def _facts(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if report.get("bits_per_weight") is not None:
        yield "bits per weight", f"{report['bits_per_weight']:.3f}"
    scored = [stage for stage in report.get("stages", ()) if "ppl" in stage]
    if scored:
        last = scored[-1]
        yield "perplexity", format_number(last["ppl"])
        first = scored[0]
        if last is not first and first.get("protocol") == last.get("protocol"):
            yield f"the {first.get('name', 'first')}’s", format_number(first["ppl"])
    if report.get("seconds") is not None:
        yield "seconds", f"{report['seconds']:.1f}"
    if report.get("peak_rss_mb") is not None:
        yield "peak memory of the host", f"{report['peak_rss_mb']:.0f} MB"
    if report.get("seed") is not None:
        yield "seed", str(report["seed"])


def _show_stage(stage: Mapping[str, Any]) -> dict[str, str]:
    def number(name: str, digits: int = 3) -> str:
        return format_number(stage[name], digits) if name in stage else ""

    low, high = number("low"), number("high")
    return {
        "name": stage.get("name", ""),
        "ppl": number("ppl"),
        "interval": f"{low} to {high}" if low and high else "",
        "nll": number("nll", 4),
        "tokens": str(stage.get("tokens", "")),
        "seconds": number("seconds", 1),
    }


def _show_fit(number: int, fit: Mapping[str, Any]) -> dict[str, Any]:
    history, best = fit["history"], fit["best_update"]
    losses = {point["update"]: format_number(point["val_loss"], 4) for point in history}
    said = (
        f"validation loss {losses[history[0]['update']]} before, {losses[best]} at update {best} "
        f"of {history[-1]['update']}, which was kept."
    )
    plot = Markup(draw_losses(f"fit-{number}", history, best))
    name = f"{fit['method']}, block {fit['layer']}" if "layer" in fit else fit["method"]
    if "data" in fit:
        name += f", on {fit['data']['file']}"
    return {"method": name, "said": said, "notes": fit.get("notes", ()), "plot": plot}


def _split_paths(linears: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields linears with their block's number and what is the same in every block."""
    for linear in linears:
        parts = linear["path"].split("/", 2)
        in_block = len(parts) == 3 and parts[0] == "blocks" and parts[1].isdigit()
        kind, layer = (parts[2], int(parts[1])) if in_block else (linear["path"], None)
        yield {**linear, "kind": kind, "layer": layer}


def _tabulate_kinds(linears: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for kind in dict.fromkeys(linear["kind"] for linear in linears):
        same = [linear for linear in linears if linear["kind"] == kind]
        errors = [linear["relative_error"] for linear in same]
        known = [error for error in errors if error is not None]
        whole = len(known) == len(errors)
        bits = sorted({f"{linear['bits_per_weight']:.3f}" for linear in same}, key=float)
        yield {
            "kind": kind,
            "count": len(same),
            "shape": f"{same[0]['d_in']} × {same[0]['d_out']}",
            "bits": bits[0] if len(bits) == 1 else f"{bits[0]} to {bits[-1]}",
            "mean": format_number(sum(known) / len(known), 4) if whole else _say_absent(same),
            "worst": format_number(max(known), 4) if whole else _say_absent(same),
        }


def _show_linear(linear: Mapping[str, Any]) -> dict[str, str]:
    steps = (
        f"{step['method']}: {step['objective']} {format_number(step['before'], 4)} → "
        f"{format_number(step['after'], 4)}{''.join(f', {note}' for note in step['notes'])}"
        for step in linear.get("steps", ())
    )
    return {
        "path": linear["path"],
        "bits": f"{linear['bits_per_weight']:.3f}",
        "error": _show_error(linear),
        "steps": "; ".join(steps),
    }


def _show_error(linear: Mapping[str, Any]) -> str:
    if linear["relative_error"] is not None or "relative_error_before" not in linear:
        return format_number(linear["relative_error"], 4)
    return f"{format_number(linear['relative_error_before'], 4)} before it was trained"


def _say_absent(linears: Sequence[Mapping[str, Any]]) -> str:
    """Says why some weights have no error: it was no number, or they were trained since."""
    trained = any("relative_error_before" in linear for linear in linears)
    return NOT_MEASURED if trained else NOT_FINITE


def _flatten(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield name, ", ".join(f"{key} {inner or 'absent'}" for key, inner in value.items())
        elif isinstance(value, list | tuple):
            yield name, ", ".join(map(str, value))
        else:
            yield name.replace("_", " "), str(value)
