"""`lqec export`: a model for other tools; `lqec verify`: whether a folder is what it was."""

from pathlib import Path

from lqec_jax.cli.options import Check, NumbersJson, argument, flag, option
from lqec_jax.io.exports.table import FORMATS

Format = option(str, "F", f"{', '.join([*FORMATS][:-1])} or {[*FORMATS][-1]}.")
BaseOnly = flag("--base-only", "Leave out the adapters, which --format peft writes beside it.")
Dtype = option(str, "D", "Of floating tensors: float32, bfloat16, float16; auto rounds nothing.")
GptqVersion = option(
    int | None, "1|2", "gptq: 1 stores zeros less one, 2 as they are. [default: 1]"
)
Base = option(
    Path | None,
    "FOLDER",
    "peft: the exported base of the adapter; checked, and named in its config.",
)
Dense = flag("--dense", "flax: unpack the weights.")
Model = argument(str, "An artifact, a Hugging Face folder or hub id.")
NewFolder = argument(Path, "The folder to write; it must not exist.")
Exported = argument(Path, "A folder that lqec export wrote, or an artifact.")
Against = option(
    str | None, "MODEL", "The model it was written from. [default: the one that it names]"
)


def export(
    model: Model,
    out: NewFolder,
    *,
    format: Format,
    base_only: BaseOnly = False,
    dtype: Dtype = "auto",
    gptq_version: GptqVersion = None,
    base: Base = None,
    dense: Dense = False,
    check: Check = "auto",
) -> None:
    """Write a model in another tool's format."""
    from lqec_jax import api
    from lqec_jax.cli.printing import format_bytes, print_line

    done = api.export(model, out, format, base_only=base_only, dtype=dtype, base=base, dense=dense,
                      gptq_version=gptq_version, check=check)  # fmt: skip
    for note in done.notes:
        print_line(note)
    print_line(f"{format}, {format_bytes(done.stored_bytes)}, written to {done.folder}")


def verify(
    out: Exported,
    *,
    against: Against = None,
    json: NumbersJson = None,
) -> None:
    """Compare an export's weights and logits with the model's; an artifact with its digests."""
    from lqec_jax.cli.printing import STDOUT, check_json, format_bytes, print_line, write_json

    check_json(json)
    from lqec_jax import api

    found = api.verify(out, against)
    if json is not None:
        write_json(json, {**vars(found), "folder": str(found.folder)})
    if json != STDOUT and found.format == "artifact":
        print_line(
            f"{found.folder}: {found.tensors} tensors, {format_bytes(found.bytes)}, and "
            f"{', '.join(found.files)} are as they were written"
        )
    elif json != STDOUT:
        worst = f"differ by at most {found.weight_difference:.3g}, in {found.weight_path}"
        print_line(
            f"{found.folder}: {found.format}, {found.weights} weights "
            f"{worst if found.weight_path else 'equal to the bit'}"
        )
        print_line(
            f"logits differ by at most {found.logit_difference:.3g}, half of them by "
            f"{found.logit_median:.2g} or less; the largest is {found.largest_logit:.4g}; KL "
            f"{found.kl:.3g} nats a token, of which rounding explains {found.kl_of_rounding:.3g}"
        )
