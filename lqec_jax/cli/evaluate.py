"""`lqec eval`: perplexity, and the distance to a teacher."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

Text = Annotated[str, typer.Option("--text", metavar="FILE",
    help=".txt, .jsonl, .parquet, a .npy of token ids, or hf:NAME.")]  # fmt: skip
Seqlen = Annotated[int, typer.Option(metavar="N", help="Tokens of a window, each fed alone.")]
Windows = Annotated[int | None, typer.Option(metavar="N", help="Only the first so many windows.")]
Protocol = Annotated[str, typer.Option(metavar="P",
    help="How documents become windows: documents or gptq.")]  # fmt: skip
Against = Annotated[str | None, typer.Option(metavar="TEACHER",
    help="Also KL(teacher || model) and how often their first choices agree.")]  # fmt: skip
Dtype = Annotated[str, typer.Option(metavar="D",
    help="Of activations: float32, bfloat16 or auto.")]  # fmt: skip
Json = Annotated[str | None, typer.Option("--json", metavar="[FILE]",
    help="The numbers as JSON, to FILE or standard output.")]  # fmt: skip
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def evaluate(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, hub id or artifact.")],
    *,
    text: Text,
    seqlen: Seqlen,
    windows: Windows = None,
    protocol: Protocol = "documents",
    against: Against = None,
    dtype: Dtype = "auto",
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Score a model on a text: perplexity, and its distance to a teacher."""
    from lqec_jax.cli.printing import STDOUT, check_json, write_json
    from lqec_jax.cli.progress import reporting

    check_json(json)
    from lqec_jax import api
    from lqec_jax.evaluate.report import make_finite
    from lqec_jax.runs.text import read_windows

    row = {"model": model, "text": text, "against": against}
    with reporting(quiet) as reporter:
        student = api.load(model, dtype)
        tokens, protocol = read_windows(student, text, seqlen, windows, protocol)
        options = {"protocol": protocol, "reporter": reporter}
        if against is not None:
            distance = api.divergence(student, api.load(against, dtype), tokens, seqlen, **options)
            row |= {"kl": distance.kl, "top1": distance.top1}
        row |= vars(api.perplexity(student, tokens, seqlen, **options))
    row = make_finite(row | _circumstances(student))
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
