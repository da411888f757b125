"""`lqec finetune`: adapters, or scales, on a task; the base stays packed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

Data = Annotated[str, typer.Option("--data", metavar="FILE.jsonl",
    help='Rows {"text": ...}, all of it learned, or {"prompt": ..., "completion": ...}, '
    "of which the completion is.")]  # fmt: skip
Val = Annotated[str | None, typer.Option("--val", metavar="FILE.jsonl",
    help="Rows to look at. [default: the last tenth of --data]")]  # fmt: skip
ValRatio = Annotated[float, typer.Option(metavar="X", help="Their share of --data.")]
Seqlen = Annotated[int | None, typer.Option(metavar="N",
    help="Longest row in tokens; what is longer loses its end. [default: 512]")]  # fmt: skip
Train = Annotated[str, typer.Option("--train", metavar="WHAT",
    help="adapters, adapters+norms, adapters+rest or scales.")]  # fmt: skip
Rank = Annotated[str | None, typer.Option(metavar="R",
    help="Of new adapters, where the model has none: 16, or a fraction as 0.1.")]  # fmt: skip
Epochs = Annotated[float | None, typer.Option(metavar="X",
    help="Passes over the rows. [default: 3]")]  # fmt: skip
Updates = Annotated[int | None, typer.Option(metavar="N", help="In place of --epochs.")]
Batch = Annotated[int | None, typer.Option(metavar="N", help="Rows an update. [default: 8]")]
Lr = Annotated[float | None, typer.Option("--lr", metavar="X",
    help="The highest learning rate. [default: 0.256 over the model's width]")]  # fmt: skip
Warmup = Annotated[float | None, typer.Option(metavar="X",
    help="Share of the updates in which it rises. [default: 0.05]")]  # fmt: skip
Decay = Annotated[str | None, typer.Option(metavar="D",
    help="cosine, linear or constant. [default: cosine]")]  # fmt: skip
Optimizer = Annotated[str | None, typer.Option(metavar="O",
    help="adamw, adam or adafactor. [default: adamw]")]  # fmt: skip
WeightDecay = Annotated[float | None, typer.Option(metavar="X", help="[default: 0]")]
Patience = Annotated[int | None, typer.Option(metavar="N",
    help="Stops after so many looks without a new best; 0 never does. [default: 5]")]  # fmt: skip
EvalEvery = Annotated[int | None, typer.Option(metavar="N",
    help="Updates between two looks. [default: a twentieth of them]")]  # fmt: skip
Preset = Annotated[str | None, typer.Option(metavar="P",
    help="slim: its authors' settings, Adafactor, 469 updates of 64. [default: ours]")]  # fmt: skip
Seed = Annotated[int, typer.Option(metavar="N")]
Dtype = Annotated[str, typer.Option(metavar="D",
    help="Of activations: float32, bfloat16 or auto.")]  # fmt: skip
Resume = Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite",
    help="Replace the artifact at OUT, or an unfinished run to it.")]  # fmt: skip
Json = Annotated[str | None, typer.Option("--json", metavar="[FILE]",
    help="The report as JSON, to FILE or standard output.")]  # fmt: skip
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables.")]


def finetune(
    model: Annotated[str, typer.Argument(help="An artifact, as `lqec compress` writes it.")],
    out: Annotated[Path, typer.Argument(help="The artifact folder to write.")],
    *,
    data: Data,
    val: Val = None,
    val_ratio: ValRatio = 0.1,
    seqlen: Seqlen = None,
    train: Train = "adapters",
    rank: Rank = None,
    epochs: Epochs = None,
    updates: Updates = None,
    batch: Batch = None,
    lr: Lr = None,
    warmup: Warmup = None,
    decay: Decay = None,
    optimizer: Optimizer = None,
    weight_decay: WeightDecay = None,
    patience: Patience = None,
    eval_every: EvalEvery = None,
    preset: Preset = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Train a compressed model's adapters, or its scales, on examples; the base stays packed.

    Rows begin with the tokenizer's BOS and end with its EOS, where it has them. Adapters of the
    model are where training begins, quantized ones included; --rank adds new ones to a model
    without.
    """
    from lqec_jax.cli.compress import _resumable
    from lqec_jax.cli.printing import STDOUT, check_json, write_json
    from lqec_jax.cli.progress import reporting

    check_json(json)
    settings = {"train": train, "rank": _read_rank(rank), "epochs": epochs, "updates": updates,
                "batch": batch, "lr": lr, "warmup": warmup, "decay": decay, "patience": patience,
                "optimizer": optimizer, "weight_decay": weight_decay,
                "eval_every": eval_every, "preset": preset}  # fmt: skip
    with _resumable(out):
        from lqec_jax import api

        with reporting(quiet) as reporter:
            tuned = api.finetune(model, data, val=val, val_ratio=val_ratio, seqlen=seqlen,
                                 seed=seed, dtype=dtype, out=out, resume=resume,
                                 overwrite=overwrite, reporter=reporter, **settings)  # fmt: skip
    if json is not None:
        write_json(json, tuned.report)
    if json != STDOUT and not quiet:
        _print_fit(tuned.report, out)


def _read_rank(rank: str | None) -> int | float | None:
    """Reads '16' as a number and '0.1' as a fraction, and leaves anything else to be refused."""
    if rank is None:
        return None
    from lqec_jax.errors import InputError

    try:
        return float(rank) if "." in rank else int(rank)
    except ValueError:
        raise InputError(
            f"finetune: rank={rank!r}; an integer >= 1 or a fraction in (0, 1] was wanted"
        ) from None


def _print_fit(report: Mapping[str, Any], out: Path) -> None:
    from lqec_jax.cli.printing import format_number, print_line

    fit = report["fits"][-1]
    looks = {point["update"]: format_number(point["val_loss"]) for point in fit["history"]}
    best, last = fit["best_update"], fit["history"][-1]["update"]
    print_line(
        f"loss of a learned token on the rows to look at: {looks[0]} before, {looks[best]} at its "
        f"best, update {best} of {last}"
    )
    for note in fit["notes"]:
        print_line(note)
    print_line(f"{report['bits_per_weight']:.4f} bits per weight; written to {out}")
