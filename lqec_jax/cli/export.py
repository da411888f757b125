"""`lqec export`: a model for other tools; `lqec verify`: whether it is what it stands for."""

from pathlib import Path
from typing import Annotated

import typer

from lqec_jax.io.exports.table import FORMATS

Format = Annotated[str, typer.Option("--format", metavar="F",
    help=f"{', '.join([*FORMATS][:-1])} or {[*FORMATS][-1]}.")]  # fmt: skip
BaseOnly = Annotated[bool, typer.Option("--base-only",
    help="Leave out the adapters, which --format peft writes beside it.")]  # fmt: skip
Dtype = Annotated[str, typer.Option(metavar="D",
    help="Of floating tensors: float32, bfloat16, float16; auto rounds nothing.")]  # fmt: skip
GptqVersion = Annotated[int | None, typer.Option(metavar="1|2",
    help="gptq: 1 stores zeros less one, 2 as they are. [default: 1]")]  # fmt: skip
Base = Annotated[Path | None, typer.Option(metavar="FOLDER",
    help="peft: the exported base of the adapter; checked, and named in its config.")]  # fmt: skip
Dense = Annotated[bool, typer.Option("--dense", help="flax: unpack the weights.")]
Json = Annotated[str | None, typer.Option("--json", metavar="[FILE]",
    help="The numbers as JSON, to FILE or standard output.")]  # fmt: skip


def export(
    model: Annotated[str, typer.Argument(help="An artifact, a Hugging Face folder or hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    *,
    format: Format,
    base_only: BaseOnly = False,
    dtype: Dtype = "auto",
    gptq_version: GptqVersion = None,
    base: Base = None,
    dense: Dense = False,
) -> None:
    """Write a model in another tool's format."""
    from lqec_jax import api
    from lqec_jax.cli.printing import format_bytes, print_line

    done = api.export(model, out, format, base_only=base_only, dtype=dtype, base=base, dense=dense,
                      gptq_version=gptq_version)  # fmt: skip
    for note in done.notes:
        print_line(note)
    print_line(f"{format}, {format_bytes(done.stored_bytes)}, written to {done.folder}")


def verify(
    out: Annotated[Path, typer.Argument(help="A folder that lqec export wrote.")],
    *,
    against: Annotated[str | None, typer.Option(metavar="MODEL",
        help="The model it was written from. [default: the one that it names]")] = None,
    json: Json = None,
) -> None:  # fmt: skip
    """Read an export back and compare its weights and logits with the model's."""
    from lqec_jax.cli.printing import STDOUT, check_json, print_line, write_json

    check_json(json)
    from lqec_jax import api

    found = api.verify(out, against)
    if json is not None:
        write_json(json, {**vars(found), "folder": str(found.folder)})
    if json != STDOUT:
        worst = f"differ by at most {found.weight_difference:.3g}, in {found.weight_path}"
        print_line(
            f"{found.folder}: {found.format}, {found.weights} weights "
            f"{worst if found.weight_path else 'equal to the bit'}"
        )
        print_line(
            f"logits differ by at most {found.logit_difference:.3g}; the largest is "
            f"{found.largest_logit:.4g}"
        )
