"""`lqec eval`: perplexity, and the distance to a teacher."""

from collections.abc import Mapping
from typing import Any

from lqec_jax.cli.options import TEXTS, AnyModel, Check, Dtype, NumbersJson, flag, option

ScoredText = option(str, "FILE", TEXTS)
Seqlen = option(int, "N", "Tokens of a window, each fed alone.")
Windows = option(int | None, "N", "Only the first so many windows.")
Protocol = option(str, "P", "How documents become windows: documents or gptq.")
Against = option(
    str | None, "TEACHER", "Also KL(teacher || model) and how often their first choices agree."
)
Quiet = flag("--quiet", "No progress.", "-q")


def evaluate(
    model: AnyModel,
    *,
    text: ScoredText,
    seqlen: Seqlen,
    windows: Windows = None,
    protocol: Protocol = "documents",
    against: Against = None,
    dtype: Dtype = "auto",
    check: Check = "auto",
    json: NumbersJson = None,
    quiet: Quiet = False,
) -> None:
    """Score a model on a text: perplexity, and its distance to a teacher."""
    from lqec_jax.cli.printing import STDOUT, check_json, write_json
    from lqec_jax.cli.progress import reporting

    check_json(json)
    from lqec_jax import api
    from lqec_jax.evaluate.report import make_finite
    from lqec_jax.io.carried import compare_models
    from lqec_jax.runs.text import read_windows

    row, notes = {"model": model, "text": text, "against": against}, []
    with reporting(quiet) as reporter:
        student = api.load(model, dtype, check)
        tokens, protocol = read_windows(student, text, seqlen, windows, protocol, notes.append)
        options = {"protocol": protocol, "reporter": reporter}
        if against is not None:
            teacher = api.load(against, dtype, check)
            notes += compare_models(student, teacher)
            distance = api.divergence(student, teacher, tokens, seqlen, **options)
            row |= {"kl": distance.kl, "top1": distance.top1}
        row |= vars(api.perplexity(student, tokens, seqlen, **options))
    row = make_finite(row | _circumstances(student) | ({"notes": notes} if notes else {}))
    if json is not None:
        write_json(json, row)
    if json != STDOUT:
        _print_score(row)


def _circumstances(model) -> dict[str, Any]:
    """Returns what else decides the numbers."""
    import numpy as np

    from lqec_jax.evaluate.report import describe_environment

    compute = {"compute_dtype": np.dtype(model.dtype).name}
    return {"recipe": model.recipe, "environment": describe_environment() | compute}


def _print_score(row: Mapping[str, Any]) -> None:
    from lqec_jax.cli.printing import format_number, print_line

    print_line(
        f"perplexity {format_number(row['ppl'])} (95% interval {format_number(row['low'])} - "
        f"{format_number(row['high'])}) over {row['tokens']} tokens in {row['windows']} windows, "
        f"protocol {row['protocol']}"
    )
    if row["against"] is not None:
        print_line(
            f"against {row['against']}: KL {format_number(row['kl'], 6)} nats per token, the same "
            f"first choice at {format_number(row['top1'])} of the tokens"
        )
    for note in row.get("notes", ()):
        print_line(note)
